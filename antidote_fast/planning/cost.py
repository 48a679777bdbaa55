"""What a model takes, from its headers alone: its own code runs on meta, without storage.

Torch counts the FLOPs of three short passes, which give those of any batch. For the memory the
largest batch is rehearsed, and the bytes of the tensors that are alive are added up.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from antidote_fast.files.checkpoint import Checkpoint
from antidote_fast.models.footprint import device_memory, weight_bytes
from antidote_fast.models.forwards import lean_forward
from antidote_fast.models.loading import load_model, without_weights
from antidote_fast.models.undo import hook, undoing

_LENGTHS = (128, 256, 512)  # tokens of the passes that are counted
_RESPONSES = (8, 16, 64)  # tokens with logits in each, in training; not a polynomial of the lengths


class Flops(NamedTuple):
    """FLOPs of a pass, two a multiplication with an addition; pads count as tokens.

    Args:
        token: of each token.
        square: of each sequence, times the square of its length.
        logit: of each token of which logits are made.
    """

    token: int
    square: int
    logit: int

    def of(self, tokens: float, squares: float, logits: float) -> int:
        """Of so many tokens, squares of lengths, and tokens of which logits are made."""
        return int(self.token * tokens + self.square * squares + self.logit * logits)

    def of_batches(self, batches: Iterable[tuple[float, int, float]]) -> int:
        """Of batches: (sequences, tokens of each, tokens of all of which logits are made)."""
        rows = [(n * length, n * length**2, logits) for n, length, logits in batches]
        return self.of(*map(sum, zip(*rows, strict=True))) if rows else 0


class ModelCost:
    """What one model takes, built on meta: its files are checked, none of its weights read.

    Args:
        model: a transformers model on meta, with an adapter where there is one.
        dtype: the dtype it computes in.

    Attributes:
        config: of the text model.
        num_weights, weight_bytes: of all its parameters, tied ones once.
        lora: weights of LoRA factors.
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype):
        self.model, self.dtype = model, dtype
        self.inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = self.inner.config.get_text_config()
        self._experts = getattr(self.inner.config, "_experts_implementation", None)
        weights = dict(model.named_parameters())
        self.num_weights = sum(p.numel() for p in weights.values())
        self.weight_bytes = sum(p.nbytes for p in weights.values())
        self.lora = sum(p.numel() for name, p in weights.items() if ".lora_" in name)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that one token leaves in the cache."""
        heads = self.config.num_attention_heads
        size = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        heads = getattr(self.config, "num_key_value_heads", None) or heads
        return 2 * self.config.num_hidden_layers * heads * size * self.dtype.itemsize

    @functools.cached_property
    def forward(self) -> Flops:
        """Of a forward pass without gradients."""
        return self.forward_until(())

    def forward_until(self, modules: Sequence[torch.nn.Module]) -> Flops:
        """Of a forward pass that ends when the last of ``modules`` has its input."""
        with self._forward() as forward:
            return self._flops(forward, (1, 1, 1), modules) or Flops(2 * self.num_weights, 0, 0)

    @functools.cached_property
    def training(self) -> Flops:
        """Of a forward pass and one back to the weights that require a gradient."""
        with self._step() as step:
            return self._flops(step, _RESPONSES) or Flops(6 * self.num_weights, 0, 0)

    def peak_bytes(
        self, batch: int, length: int, response_tokens: int | None = None, attention: str = "sdpa"
    ) -> int | None:
        """The most that a forward pass or, with a response, a step holds; None if unknown.

        Weights and Adam apart: activations, and in a step gradients.
        """
        weights = (*self.model.parameters(), *self.model.buffers())

        def peak(inputs, number):
            with AliveBytes(p.untyped_storage() for p in weights) as alive:
                run(inputs(), number)
            return alive.peak

        with self._forward() if response_tokens is None else self._step() as run:
            return self._run(peak, batch, length, response_tokens, attention, self._experts)

    @contextlib.contextmanager
    def _forward(self):
        """Yields a forward pass of inputs, with logits of one token a sequence."""
        with torch.no_grad(), lean_forward(self.model) as options:
            yield lambda inputs, _: self.model(**inputs, **options)

    @contextlib.contextmanager
    def _step(self):
        """Yields a step of inputs, with logits of so many tokens, without the optimizer."""
        head, wanted = self.model.get_output_embeddings(), []

        def step(inputs, response_tokens):
            wanted[:] = [response_tokens]
            logits = self.model(**inputs, use_cache=False).logits
            labels = torch.zeros(len(logits), dtype=torch.int64, device="meta")
            F.cross_entropy(logits.float(), labels, reduction="sum").backward()

        self.model.train()
        try:
            with undoing() as undo:
                if head is not None:  # logits of the response alone
                    hook(undo, head, lambda _, args: (args[0].flatten(0, 1)[: wanted[0]],))
                yield step
        finally:
            self.model.zero_grad(set_to_none=True)
            self.model.eval()

    def _flops(self, run, logits, modules=()):
        """Solved from three counts; None where the model cannot run on meta."""

        def count(inputs, number):
            reached = []
            with FlopCounterMode(display=False) as counter, undoing() as undo:
                for module in modules:
                    hook(undo, module, lambda *_: reached.append(counter.get_total_flops()))
                run(inputs(), number)
            return reached[-1] if reached else counter.get_total_flops()

        rows, counts = [], []
        for length, number in zip(_LENGTHS, logits, strict=True):
            rows.append((length, length**2, number))
            # Of routed experts each token is multiplied with those it meets; none is picked out.
            counts.append(self._run(count, 1, length, number, "eager", "batched_mm"))
        if None in counts:
            return None
        solved = torch.linalg.solve(*(torch.tensor(x, dtype=torch.float64) for x in (rows, counts)))
        return Flops(*(round(x) for x in solved.tolist()))

    def _run(self, run, batch, length, logits, attention, experts):
        """What ``run`` gives of a function that makes the inputs; None where it fails on meta."""
        self.inner.set_attn_implementation(attention)
        if self._experts is not None:
            self.inner.set_experts_implementation(experts)

        def ids():
            return {"input_ids": torch.zeros((batch, length), dtype=torch.int64, device="meta")}

        def masked():  # one of four dimensions is taken as it is
            shape, dtype = (batch, 1, length, length), self.inner.dtype
            return ids() | {"attention_mask": torch.zeros(shape, dtype=dtype, device="meta")}

        for inputs in (masked, ids):  # some models know no such mask
            with contextlib.suppress(RuntimeError, NotImplementedError, ValueError, TypeError):
                return run(inputs, logits)
        return None


def cost_of(config: Any, base: Checkpoint, adapt: Callable | None = None) -> ModelCost:
    """The cost of the model that a stage loads.

    Args:
        config: a stage's dataclass.
        base: its checked base model.
        adapt: called with the model on meta, returns it with an adapter; None: without one.

    Raises:
        DataError: as :func:`antidote_fast.models.loading.load_model`.
    """
    # What is not held in memory cannot be mapped into it either, and load_model would be refused.
    streamed = getattr(config, "stream", False)
    options = {"dtype": config.dtype, "trust_remote_code": config.trust_remote_code}
    if streamed or weight_bytes(base) > (device_memory(torch.device("cpu")) or 0):
        model = without_weights(base, **options)
    else:
        model = load_model(base.folder, device="meta", **options)
    dtype = model.dtype
    model = model if adapt is None else adapt(model)
    return ModelCost(model.to("meta"), dtype)


class AliveBytes(TorchDispatchMode):
    """Adds up the bytes of tensors that are alive.

    Args:
        known: storages that do not count.

    Attributes:
        peak: the most that were alive at once.
    """

    def __init__(self, known: Iterable[torch.UntypedStorage]):
        super().__init__()
        self.now = self.peak = 0
        self._seen = {storage._cdata for storage in known}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Runs the function, and counts what it gives."""
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self._seen:
                self._change(self._seen.add, storage._cdata, storage.nbytes())
                gone = (self._seen.discard, storage._cdata, -storage.nbytes())
                weakref.finalize(storage, self._change, *gone)
        return result

    def _change(self, mark, place, size):
        mark(place)
        self.now += size
        self.peak = max(self.peak, self.now)
