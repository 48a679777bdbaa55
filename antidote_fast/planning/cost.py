"""What a model costs, from its headers alone: FLOPs by formula, memory from a rehearsal on meta.

A rehearsal runs the model's own code on tensors without storage and adds up what is alive.
"""

import contextlib
import math
import weakref

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from antidote_fast.files.checkpoint import Checkpoint
from antidote_fast.models.footprint import device_memory, weight_bytes
from antidote_fast.models.forwards import lean_forward
from antidote_fast.models.loading import load_model, without_weights

_LORA = (".lora_A.", ".lora_B.")


class ModelCost:
    """What one model takes, built on meta: its files are checked, none of its weights read.

    Args:
        model: a transformers model on meta, with an adapter where there is one.
        dtype: the dtype it computes in.
    """

    def __init__(self, model, dtype):
        self.model, self.dtype = model, dtype
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = inner.config.get_text_config()
        self.config = config
        parameters = dict(model.named_parameters())  # tied ones once
        self.num_weights = sum(p.numel() for p in parameters.values())
        self.weight_bytes = sum(p.nbytes for p in parameters.values())
        head = inner.get_output_embeddings()
        self.head = head.weight.numel() if head is not None else 0
        self._order = []  # (name of a weight, its elements), as the model runs them
        self.largest = (1, 1)
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if module is head or weight is None or not _multiplies(module):
                continue
            self._order.append((f"{name}.weight", weight.numel()))
            self.largest = max(self.largest, tuple(weight.shape), key=math.prod)
        self.lora = sum(n for name, n in self._order if any(part in name for part in _LORA))
        #: weights that multiply each token, without the output layer
        self.linear = sum(n for _, n in self._order) + _expert_weights(model, config)
        layers = getattr(config, "num_hidden_layers", 0)
        self.heads = getattr(config, "num_attention_heads", 0)
        size = getattr(config, "head_dim", None) or config.hidden_size // max(self.heads, 1)
        self.attention = layers * self.heads * size
        self.cache_bytes = (
            2
            * layers
            * size
            * dtype.itemsize
            * (getattr(config, "num_key_value_heads", None) or self.heads)
        )

    def forward_flops(self, tokens, squares, head_tokens) -> int:
        """FLOPs of forward passes; a multiplication and an addition are two.

        Args:
            tokens: in all, pads included.
            squares: the sum over sequences of their length squared, pads included.
            head_tokens: tokens of which logits are made.
        """
        return 2 * self.linear * tokens + 4 * self.attention * squares + 2 * self.head * head_tokens

    def flops_until(self, weights, tokens, squares) -> int:
        """FLOPs of forward passes that end when the last of ``weights`` has its input."""
        wanted = {id(weight) for weight in weights}
        names = {name for name, p in self.model.named_parameters() if id(p) in wanted}
        places = [i for i, (name, _) in enumerate(self._order) if name in names]
        place = places[-1] if len(places) == len(names) else len(self._order)
        share = sum(n for _, n in self._order[:place]) / max(1, sum(n for _, n in self._order))
        layers = max(1, getattr(self.config, "num_hidden_layers", 1))
        attention = self.attention * math.floor(share * layers) // layers
        return int(2 * self.linear * share * tokens + 4 * attention * squares)

    def training_flops(self, tokens, squares, head_tokens, *, frozen) -> int:
        """FLOPs of forward and backward passes; a frozen weight needs no gradient of its own."""
        trained = self.lora if frozen else self.linear
        forward = self.forward_flops(tokens, squares, head_tokens)
        weights = 2 * trained * tokens + (0 if frozen else 2 * self.head * head_tokens)
        return 2 * forward + weights + 4 * self.attention * squares

    def activation_bytes(self, batch, length, *, attention="sdpa") -> int | None:
        """The most that a forward pass without gradients holds, weights apart; None if unknown."""
        with torch.no_grad(), lean_forward(self.model) as options:
            return _rehearsed(
                self.model, batch, length, attention, lambda inputs: self.model(**inputs, **options)
            )

    def training_bytes(self, batch, length, response_tokens, *, attention="sdpa") -> int | None:
        """The most that a step holds, weights and Adam apart: activations and gradients."""
        head = self.model.get_output_embeddings()

        def pick(module, args):  # as sft: logits of the response alone
            return (args[0].flatten(0, 1)[:response_tokens], *args[1:])

        def step(inputs):
            logits = self.model(**inputs, use_cache=False).logits
            labels = torch.zeros(len(logits), dtype=torch.int64, device="meta")
            F.cross_entropy(logits.float(), labels, reduction="sum").backward()

        handle = head.register_forward_pre_hook(pick) if head is not None else None
        self.model.train()
        try:
            return _rehearsed(self.model, batch, length, attention, step)
        finally:
            self.model.zero_grad(set_to_none=True)
            self.model.eval()
            if handle is not None:
                handle.remove()


def cost_of(config, base: Checkpoint, adapt=None) -> ModelCost:
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
    if streamed or weight_bytes(base) > (device_memory(torch.device("cpu")) or 0):
        model = without_weights(base, config.dtype, config.trust_remote_code)
    else:
        model = load_model(
            base.folder,
            dtype=config.dtype,
            device="meta",
            trust_remote_code=config.trust_remote_code,
        )
    dtype = model.dtype
    if adapt is not None:
        model = adapt(model)
        model.to("meta")
    return ModelCost(model, dtype)


def _multiplies(module):
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (torch.nn.Linear, Conv1D))


def _expert_weights(model, config):
    """Weights of fused experts that one token meets."""
    used = getattr(config, "num_experts_per_tok", None)
    total = 0
    for parameter in model.parameters():
        if parameter.dim() == 3 and used:
            total += parameter.numel() * used // parameter.shape[0]
    return total


def _rehearsed(model, batch, length, attention, run):
    """The peak of what ``run(inputs)`` holds, weights apart; None where it cannot run on meta."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = inner.config._attn_implementation
    known = [p.untyped_storage() for p in (*model.parameters(), *model.buffers())]
    try:
        inner.set_attn_implementation(attention)
        # A mask of four dimensions is taken as it is; models that know none make their own.
        for with_mask in (True, False):
            with contextlib.suppress(RuntimeError, NotImplementedError, ValueError, TypeError):
                with _Alive(known) as alive:
                    run(_inputs(inner, batch, length, with_mask))
                return alive.peak
    finally:
        inner.set_attn_implementation(before)
    return None


def _inputs(model, batch, length, with_mask):
    inputs = {"input_ids": torch.zeros((batch, length), dtype=torch.int64, device="meta")}
    if with_mask:
        shape = batch, 1, length, length
        inputs["attention_mask"] = torch.zeros(shape, dtype=model.dtype, device="meta")
    return inputs


class _Alive(TorchDispatchMode):
    """Adds up the bytes of tensors that are alive."""

    def __init__(self, known):
        super().__init__()
        self.now = self.peak = 0
        self._seen = {storage._cdata for storage in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage):
        place = storage._cdata
        if place in self._seen:
            return
        self._seen.add(place)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, place, storage.nbytes())

    def _gone(self, place, size):
        self._seen.discard(place)
        self.now -= size
