"""A causal language model of which one decoder block is in memory at a time.

The model's own code runs: once up to its first block, to see what each block is called with, then
block by block. Its weights are read from the checkpoint's files when they are needed.
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils import _pytree as pytree

from antidote_fast.errors import DataError
from antidote_fast.files.tensor_file import read_tensor
from antidote_fast.models.adapters import load_adapter
from antidote_fast.models.forwards import lean_forward
from antidote_fast.models.loading import check_not_quantized, without_weights

_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Slot:
    """A parameter or buffer without memory: who owns it, and what of the checkpoint fills it."""

    owner: nn.Module
    leaf: str
    saved: str
    empty: torch.Tensor
    is_parameter: bool


class BlockModel:
    """A model without weights, and the files to fill it from.

    Args:
        base: :class:`antidote_fast.files.checkpoint.Checkpoint` of the model.
        adapter: of a LoRA adapter on top of it; it is in memory whole.
        dtype: as :func:`antidote_fast.models.loading.load_model`.
        device: where a block runs.
        trust_remote_code: allow code that the checkpoint ships to run.

    Attributes:
        model: the transformers (or PEFT) model; weights of the base are on the meta device.
        names: of the decoder blocks, as in ``named_modules``.

    Raises:
        DataError: a model that cannot be run block by block, naming why.
    """

    def __init__(self, base, adapter=None, *, dtype="auto", device="cpu", trust_remote_code=False):
        check_not_quantized(base)
        self.base, self.device = base, torch.device(device)
        self.model = without_weights(base, dtype, trust_remote_code)
        if adapter is not None:
            if adapter.config.get("modules_to_save"):
                raise DataError(
                    f"{adapter.folder}: replaces whole modules (modules_to_save), which cannot be "
                    "streamed; prune it without stream"
                )
            with _stand_ins(self.model):
                self.model = load_adapter(self.model, adapter)
        self.model.eval().requires_grad_(False)
        prefix, self._blocks = _find_blocks(self.model, base)
        self.names = [f"{prefix}.{i}" for i in range(len(self._blocks))]
        self._slots = [
            self._slots_of(name, block)
            for name, block in zip(self.names, self._blocks, strict=True)
        ]
        self._as_tuple = False

    def __len__(self):
        return len(self._blocks)

    def saved_names(self, index) -> list[str]:
        """Names of a block's tensors in the checkpoint."""
        return [slot.saved for slot in self._slots[index]]

    def num_bytes(self, index) -> int:
        """Size of a block in memory: as saved, and in the dtype it runs in where that differs."""
        total = 0
        for slot in self._slots[index]:
            entry = self.base.tensors[slot.saved]
            size = entry.num_bytes
            runs = slot.empty.numel() * slot.empty.element_size()
            total += size if slot.empty.dtype == entry.dtype else size + runs
        return total

    @property
    def outside_bytes(self) -> int:
        """Size in memory of what lies before the first block: the embeddings, mostly."""
        return sum(s.empty.numel() * s.empty.element_size() for s in self._outside_slots())

    def read(self, index) -> dict[str, torch.Tensor]:
        """A block's tensors as saved, on the CPU, by their name in the checkpoint."""
        return self._read(self._slots[index])

    def loaded(self, indices, prefetch=True):
        """For each index its tensors as saved; inside the loop's body that block can be run.

        Args:
            indices: of blocks, in order.
            prefetch: read the next block while this one is in use.

        Yields:
            (index, {saved name: tensor}); the tensors are the caller's to change once the block
            has run, as on the CPU the block runs on that very memory.
        """
        indices = list(indices)
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self.read, indices[0]) if indices else None
            for place, index in enumerate(indices):
                tensors = coming.result()
                more = place + 1 < len(indices)
                coming = reader.submit(self.read, indices[place + 1]) if more and prefetch else None
                with self._filled(self._slots[index], tensors, self._blocks[index]):
                    yield index, tensors
                tensors = None
                if more and not prefetch:
                    coming = reader.submit(self.read, indices[place + 1])

    @torch.no_grad()
    def calls(self, batches):
        """What each block is called with, batch by batch: embeddings are in memory meanwhile.

        Args:
            batches: dicts of tensors for the model's forward.

        Yields:
            (hidden states that enter the first block, what :meth:`run` takes as ``calls``) of each
            batch.
        """
        slots = self._outside_slots()
        outside = [m for n, m in self.model.named_modules() if not self._in_block(n)]
        with (
            self._filled(slots, self._read(slots), *outside, recurse=False),
            lean_forward(self.model) as options,
        ):
            for batch in batches:
                inputs = {
                    key: value.to(self.device) if isinstance(value, torch.Tensor) else value
                    for key, value in batch.items()
                    if key != "labels"
                }
                yield self._recorded(inputs | options)

    @torch.no_grad()
    def run(self, index, hidden, call) -> torch.Tensor:
        """The hidden states that leave block ``index``, which must be loaded.

        Args:
            index: of the block.
            hidden: (B, T, hidden_size), the states that enter it.
            call: of :meth:`calls`, that batch's entry ``index``.
        """
        leaves, spec, place = call
        leaves = [x.to(self.device) if isinstance(x, torch.Tensor) else x for x in leaves]
        leaves[place] = hidden.to(self.device)
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        out = self._blocks[index](*args, **kwargs)
        out = out[0] if isinstance(out, (tuple, list)) else out
        if out.shape != hidden.shape:
            raise DataError(
                f"{self.names[index]}: gives {tuple(out.shape)} for {tuple(hidden.shape)}; this "
                "model cannot be run block by block: prune it without stream"
            )
        return out

    def _recorded(self, inputs):
        """The model up to its last block, each block replaced by one that notes its arguments."""
        for attempt in range(2):
            calls = []
            try:
                with self._recorders(calls):
                    self.model(**inputs)
            except _Done:
                return calls[0][0], [entry[1:] for entry in calls]
            except _OtherForm:
                if attempt:
                    break
                self._as_tuple = not self._as_tuple
        raise DataError(
            f"{self.base.folder}: hands other values than hidden states from block to block, or "
            "leaves blocks out; prune it without stream"
        )

    @contextlib.contextmanager
    def _recorders(self, calls):
        last = len(self._blocks) - 1

        def recorder(index):
            def forward(*args, **kwargs):
                leaves, spec = pytree.tree_flatten((args, kwargs))
                hidden = args[0] if args else kwargs.get("hidden_states")
                if index != len(calls) or not isinstance(hidden, torch.Tensor):
                    raise _OtherForm
                if calls and hidden.shape != calls[0][0].shape:
                    raise _OtherForm
                place = next(i for i, leaf in enumerate(leaves) if leaf is hidden)
                calls.append((hidden if index == 0 else None, leaves, spec, place))
                leaves[place] = None
                if index == last:
                    raise _Done
                return (hidden,) if self._as_tuple else hidden

            return forward

        try:
            for index, block in enumerate(self._blocks):
                block.forward = recorder(index)
            yield
        finally:
            for block in self._blocks:
                block.__dict__.pop("forward", None)

    @contextlib.contextmanager
    def _filled(self, slots, tensors, *modules, recurse=True):
        """Inside the block the slots hold weights, and the modules lie on the device."""
        try:
            for slot in slots:
                value = tensors[slot.saved].to(self.device, slot.empty.dtype)
                if slot.is_parameter:
                    slot.owner._parameters[slot.leaf] = nn.Parameter(value, requires_grad=False)
                else:
                    slot.owner._buffers[slot.leaf] = value
            if self.device.type != "cpu":
                for module in modules:
                    _move(module, self.device, recurse)
            yield
        finally:
            for slot in slots:
                kept = slot.owner._parameters if slot.is_parameter else slot.owner._buffers
                kept[slot.leaf] = slot.empty

    def _read(self, slots):
        return {slot.saved: read_tensor(self.base.tensors[slot.saved]) for slot in slots}

    def _in_block(self, name):
        prefix = self.names[0].rpartition(".")[0] + "."
        return name.startswith(prefix)

    def _outside_slots(self):
        """What lies before the blocks; the output layer and its like never run."""
        output = self.model.get_output_embeddings()
        embedding = self.model.get_input_embeddings()
        slots = []
        for name, module in self.model.named_modules():
            if self._in_block(name) or (module is output and module is not embedding):
                continue
            slots += self._slots_of(name, module, recurse=False)
        return slots

    def _slots_of(self, prefix, module, recurse=True):
        slots = []
        kept = set(self.model.state_dict(keep_vars=True)) if not hasattr(self, "_kept") else None
        if kept is not None:
            self._kept = kept
        kinds = ((module.named_parameters, True), (module.named_buffers, False))
        for named, is_parameter in kinds:
            for name, value in named(recurse=recurse):
                full = f"{prefix}.{name}" if prefix else name
                if not value.is_meta and (is_parameter or full not in self._kept):
                    continue  # of the adapter; made by the model's own code
                saved = self.base.find(_base_name(full))
                if saved is None and not is_parameter and not value.is_meta:
                    continue
                if saved is None:
                    raise DataError(
                        f"{self.base.folder}: has no tensor of the name {_base_name(full)!r}, as "
                        "the model makes it from others; prune it without stream"
                    )
                entry = self.base.tensors[saved]
                if entry.shape != tuple(value.shape):
                    raise DataError(
                        f"{self.base.folder}: {saved!r} is {entry.shape}, the model needs "
                        f"{tuple(value.shape)}"
                    )
                path, _, leaf = name.rpartition(".")
                owner = module.get_submodule(path)
                slots.append(_Slot(owner, leaf, saved, value, is_parameter))
        return slots


class _Done(Exception):
    """Every block's arguments are noted."""


class _OtherForm(Exception):
    """The model wants its blocks to return a tuple (or a tensor), not what they returned."""


def _base_name(name):
    """The name in the base's checkpoint of a parameter of the live, perhaps adapted, model."""
    name = name.removeprefix(_PEFT_PREFIX) if name.startswith(_PEFT_PREFIX) else name
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


@contextlib.contextmanager
def _stand_ins(model):
    """Inside the block weights look real and take no memory: PEFT puts its own beside them."""
    owners = [(module, dict(module._parameters)) for module in model.modules()]
    try:
        for module, parameters in owners:
            for leaf, value in parameters.items():
                if value is not None and value.is_meta:
                    zero = torch.zeros((), dtype=value.dtype).expand(value.shape)
                    module._parameters[leaf] = nn.Parameter(zero, requires_grad=False)
        yield
    finally:
        for module, parameters in owners:
            module._parameters.update(parameters)


def _find_blocks(model, base):
    """(name, ModuleList) of the list of modules that holds most of the weights."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise DataError(f"{base.folder}: has an encoder and a decoder; prune it without stream")
    lists = [
        (sum(p.numel() for p in module.parameters()), -len(name), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        raise DataError(f"{base.folder}: has no list of decoder blocks; prune it without stream")
    *_, name, module = max(lists, key=lambda entry: entry[:2])
    return name, module


def _move(module, device, recurse):
    """To the device what is there of a module; weights without memory stay without."""
    for part in module.modules() if recurse else [module]:
        for kept in (part._parameters, part._buffers):
            for leaf, value in kept.items():
                if value is not None and not value.is_meta and value.device != device:
                    moved = value.to(device)
                    is_parameter = isinstance(value, nn.Parameter)
                    kept[leaf] = nn.Parameter(moved, requires_grad=False) if is_parameter else moved
