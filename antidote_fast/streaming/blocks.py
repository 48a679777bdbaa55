"""A causal language model of which one decoder block is in memory at a time.

The model's own code runs: once up to its first block, to see what each block is called with, then
block by block. Its weights are read from the checkpoint's files when they are needed.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from antidote_fast.errors import DataError
from antidote_fast.files.checkpoint import Checkpoint
from antidote_fast.files.tensor_file import read_tensor
from antidote_fast.models.adapters import load_adapter
from antidote_fast.models.forwards import lean_forward
from antidote_fast.models.loading import check_not_quantized, without_weights
from antidote_fast.norms.batches import on_device, run_forward

Call = tuple[list[Any], pytree.TreeSpec, int]
"""A block's arguments as leaves and their tree, and which leaf its hidden states are."""
_PEFT_PREFIX = "base_model.model."


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

    def __init__(
        self,
        base: Checkpoint,
        adapter: Checkpoint | None = None,
        *,
        dtype: str = "auto",
        device: str | torch.device = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
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
        self.model._apply(lambda value: value if value.is_meta else value.to(self.device))
        prefix, self._blocks = _find_blocks(self.model, base)
        self.names = [f"{prefix}.{i}" for i in range(len(self._blocks))]
        self._outside = self._all_sources()
        self._sources = [
            {key: self._outside.pop(key) for key in list(self._outside) if key.startswith(name)}
            for name in [f"{name}." for name in self.names]
        ]
        self._as_tuple = False

    def __len__(self) -> int:
        return len(self._blocks)

    def saved_names(self, index: int) -> list[str]:
        """Names of a block's tensors in the checkpoint."""
        return [saved for saved, _ in self._sources[index].values()]

    def num_bytes(self, index: int) -> int:
        """Size of a block in memory: as saved, and in the dtype it runs in where that differs."""
        entries = [
            (self.base.tensors[saved], empty) for saved, empty in self._sources[index].values()
        ]
        return sum(
            entry.num_bytes + (0 if empty.dtype == entry.dtype else empty.nbytes)
            for entry, empty in entries
        )

    @property
    def outside_bytes(self) -> int:
        """Size in memory of what lies before the first block: the embeddings, mostly."""
        return sum(empty.nbytes for _, empty in self._outside.values())

    def loaded(
        self, indices: Iterable[int], prefetch: bool = True
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """For each index (index, {name as saved: tensor}); the loop's body can run that block.

        With ``prefetch`` the next block is read while this one is in use. The tensors are the
        caller's to change once the block has run, as on the CPU it runs on that very memory.
        """
        indices = list(indices)
        with ThreadPoolExecutor(1) as reader:
            coming = None
            for index, following in itertools.zip_longest(indices, indices[1:]):
                tensors = self._read(index) if coming is None else coming.result()
                ahead = prefetch and following is not None
                coming = reader.submit(self._read, following) if ahead else None
                with self._filled(self._sources[index], tensors):
                    yield index, tensors
                tensors = None

    @torch.no_grad()
    def calls(self, batches: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Tensor, list[Call]]]:
        """What each block is called with, batch by batch: embeddings are in memory meanwhile.

        Yields:
            (hidden states that enter the first block, a ``call`` for :meth:`run` of each block).
        """
        tensors = self._tensors_of(self._outside)
        with self._filled(self._outside, tensors), lean_forward(self.model) as options:
            for number, batch in enumerate(batches):
                yield self._recorded(on_device(batch, self.device, None, number), options)

    @torch.no_grad()
    def run(self, index: int, hidden: Tensor, call: Call) -> Tensor:
        """What leaves block ``index``, which must be loaded, of ``hidden`` (B, T, hidden_size)."""
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

    def _recorded(self, batch, options):
        """The model up to its last block, each block replaced by one that notes its arguments."""
        for as_tuple in (self._as_tuple, not self._as_tuple):
            calls, self._as_tuple = [], as_tuple
            try:
                with self._recorders(calls):
                    run_forward(self.model, options, batch)
                break
            except _Stop as stop:
                if stop.args[0]:
                    return calls[0][0], [entry[1:] for entry in calls]
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
                    raise _Stop(False)
                if calls and hidden.shape != calls[0][0].shape:
                    raise _Stop(False)
                place = next(i for i, leaf in enumerate(leaves) if leaf is hidden)
                calls.append((hidden if index == 0 else None, leaves, spec, place))
                leaves[place] = None
                if index == last:
                    raise _Stop(True)
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
    def _filled(self, sources, tensors):
        """Inside the block the model has these weights, on the device."""
        try:
            values = {
                name: tensors[saved].to(self.device, empty.dtype)
                for name, (saved, empty) in sources.items()
            }
            self.model.load_state_dict(values, strict=False, assign=True)
            del values
            yield
        finally:
            empties = {name: empty for name, (_, empty) in sources.items()}
            self.model.load_state_dict(empties, strict=False, assign=True)

    def _read(self, index):
        return self._tensors_of(self._sources[index])

    def _tensors_of(self, sources):
        """The tensors as saved, on the CPU, by their names in the checkpoint."""
        return {saved: read_tensor(self.base.tensors[saved]) for saved, _ in sources.values()}

    def _all_sources(self):
        """{name in the model: (name in the checkpoint, tensor without memory)}.

        The output layer is left out, for it never runs.
        """
        output, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        unused = [n for n, m in self.model.named_modules() if m is output and m is not embedding]
        unused = tuple(f"{name}." for name in unused)
        state = self.model.state_dict(keep_vars=True)
        state |= {name: value for name, value in self.model.named_buffers() if value.is_meta}
        sources = {}
        for name, value in state.items():
            if name.startswith(unused) or not isinstance(value, torch.Tensor):
                continue
            if isinstance(value, nn.Parameter) and not value.is_meta:
                continue  # of the adapter
            base_name = name.removeprefix(_PEFT_PREFIX)
            base_name = base_name.replace(".base_layer.", ".").replace(".original_module.", ".")
            saved = self.base.find(base_name)
            if saved is None and not value.is_meta:
                continue  # a buffer, made by the model's own code
            if saved is None:
                raise DataError(
                    f"{self.base.folder}: has no tensor of the name {base_name!r}, as the model "
                    "makes it from others; prune it without stream"
                )
            entry = self.base.tensors[saved]
            if entry.shape != tuple(value.shape):
                raise DataError(
                    f"{self.base.folder}: {saved!r} is {entry.shape}, the model needs "
                    f"{tuple(value.shape)}"
                )
            sources[name] = saved, value
        return sources


class _Stop(Exception):
    """True: every block's arguments are noted. False: a block got other than hidden states, as the
    model wants its blocks to return a tuple (or a tensor), not what they returned."""


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
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        raise DataError(f"{base.folder}: has no list of decoder blocks; prune it without stream")
    return max(lists, key=lambda x: (sum(p.numel() for p in x[1].parameters()), -len(x[0])))
