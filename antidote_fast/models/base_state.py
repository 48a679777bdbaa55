"""What a base model is made of, to put it back; and whether any bit of its weights has changed."""

import collections
import hashlib
import secrets

import torch
from torch import nn

_WORDS = {"cpu": 1 << 17}  # of eight bytes at a time: 1 MiB stays in a core's cache
_MANY_WORDS = 1 << 22  # on other devices, where a launch costs more than a pass
_COPIED = (dict, collections.OrderedDict, set)


class ModuleTree:
    """The modules of a model and their attributes, hooks and flags; no weight is copied.

    Args:
        model: a live model, as it shall be again.
    """

    def __init__(self, model: nn.Module) -> None:
        owners = [*model.modules(), getattr(model, "config", None)]
        self._owners = [
            (o, {n: (v, v.copy() if type(v) in _COPIED else None) for n, v in vars(o).items()})
            for o in owners
            if hasattr(o, "__dict__")
        ]
        self._flags = [(p, p.requires_grad) for p in model.parameters()]

    def restore(self) -> None:
        """Put everything back: what was replaced, added or removed, hooked or switched since.

        Values inside of weights are not touched; :class:`Marks` tells of those.
        """
        for owner, attributes in self._owners:
            here = vars(owner)
            for name in here.keys() - attributes.keys():
                del here[name]
            for name, (value, contents) in attributes.items():
                if contents is not None:
                    value.clear()
                    value.update(contents)
                here[name] = value
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)


class Marks:
    """Digests of a model's weights that nobody can aim at, and comparisons with them.

    A digest is two sums over a tensor's words, each times a random odd number drawn for this
    object, of the words and of their upper halves, modulo 2**64: a single word that differs always
    shows, and any other difference but for a chance of some 2**-32. It is computed on the tensor's
    device from its raw bits, a MiB at a time; no copy of the weights is kept.

    Args:
        model: a live base model. Compared are its parameters and the buffers that it saves.
    """

    def __init__(self, model: nn.Module) -> None:
        self._rows = {}
        self._before = self._take(model)

    def _take(self, model):
        """{name: digest} of the model's weights, which are watched from now on."""
        self._places, self._digests = [], {}  # ids are of tensors that the places hold
        for prefix, module in model.named_modules():
            transient = module._non_persistent_buffers_set
            for tensors in (module._parameters, module._buffers):
                for leaf, tensor in tensors.items():
                    made_anew = tensors is module._buffers and leaf in transient  # rotary angles
                    if tensor is None or tensor.is_meta or made_anew:
                        continue
                    name = f"{prefix}.{leaf}" if prefix else leaf
                    self._places.append((name, tensors, leaf, tensor))
                    if id(tensor) not in self._digests:
                        self._digests[id(tensor)] = self._digest(tensor)
        return {name: self._digests[id(tensor)] for name, *_, tensor in self._places}

    def changed(self) -> str | None:
        """Name of the first weight that is another tensor, or has other bits, than at first."""
        seen = set()
        for name, tensors, leaf, tensor in self._places:
            if tensors.get(leaf) is not tensor:
                return name
            if id(tensor) not in seen and self._digest(tensor) != self._digests[id(tensor)]:
                return name
            seen.add(id(tensor))
        return None

    def release(self) -> None:
        """Keep the digests, and none of the model's tensors: it may be let go."""
        self._places = []

    def move_to(self, model: nn.Module) -> str | None:
        """After :meth:`release`: watch another model of the same weights from now on.

        Returns:
            The name of the first weight that differs from those before, or None.
        """
        before, self._before = self._before, self._take(model)
        after = self._before
        return next((n for n in (*before, *after) if before.get(n) != after.get(n)), None)

    @torch.no_grad()
    def _digest(self, tensor):
        if hasattr(tensor, "__tensor_flatten__"):  # a tensor made of others, as torchao's
            names, _ = tensor.__tensor_flatten__()
            return b"".join(self._digest(getattr(tensor, name)) for name in names)
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
        words, upper, work = self._scratch(data.device)
        sums = []
        for piece in data.split(8 * len(work)):
            if piece.numel() % 8 or piece.storage_offset() % 8:
                piece = torch.nn.functional.pad(piece, (0, -piece.numel() % 8))
            piece = piece.view(torch.int64)
            size, here = len(piece), work[: len(piece)]
            sums.append(torch.mul(piece, words[:size], out=here).sum())
            torch.bitwise_right_shift(piece, 32, out=here)
            sums.append(here.mul_(upper[:size]).sum())
        text = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
        text += torch.stack(sums).cpu().numpy().tobytes() if sums else b""
        return hashlib.blake2b(text, digest_size=16).digest()

    def _scratch(self, device):
        """Two rows of keys and one to work in; a device's own."""
        if device not in self._rows:
            draw = torch.Generator().manual_seed(secrets.randbits(63))
            size = (3, _WORDS.get(device.type, _MANY_WORDS))
            rows = torch.randint(-(2**63), 2**63 - 1, size, generator=draw) | 1
            self._rows[device] = rows.to(device)
        return self._rows[device]
