"""RMSNorm and SwiGLU of a Llama-like model that sum the squares of what they write.

Their forwards are replaced on the instances for the length of a calibration, where the output
feeds a target; the collector's hooks then find the sums beside the tensor and do not read it again.
A module is taken only if its class computes, bit for bit, what the kernel does, which is tried out
on a few numbers; what is not understood stays as it is.
"""

import types
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from antidote_fast import backends
from antidote_fast.errors import BackendUnavailable, UsageError
from antidote_fast.models.targets import Target
from antidote_fast.models.undo import Undo
from antidote_fast.norms.collector import NormCollector

BACKEND = "triton"
# In a decoder layer: a norm, what reads its output, and which projections there do.
_NORMS = (
    ("input_layernorm", "self_attn", ("q_proj", "k_proj", "v_proj")),
    ("post_attention_layernorm", "mlp", ("gate_proj", "up_proj")),
)
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_ACTIVATIONS = ("SiLU", "SiLUActivation")


def check_fuse(device_type: str, aggregation: str) -> ModuleType:
    """Refuse what cannot be fused at all.

    Returns:
        The backend's module.

    Raises:
        UsageError: an aggregation other than ``"rms"``.
        BackendUnavailable: Triton kernels cannot run on that type of device.
    """
    if aggregation != "rms":
        raise UsageError(f"fuse=True: aggregation={aggregation!r}: must be 'rms'")
    try:
        return backends.select(BACKEND, device_type)
    except BackendUnavailable as error:
        raise BackendUnavailable(f"fuse=True: {error}") from None


def fuse(model: nn.Module, collector: NormCollector, undo: Undo) -> int:
    """Let fused modules leave their sums with the collector, until undone.

    Outputs agree with the model's own within rounding: within 2 units in the last place of a
    16-bit dtype, nearly all being the same, and a relative 1e-5 in fp32. So do the norms. A forward
    with gradients, or of tensors that a kernel does not take, is the module's own.

    Args:
        model: a transformers model, or a PEFT model.
        collector: a :class:`antidote_fast.norms.collector.NormCollector` of its targets.
        undo: an :class:`antidote_fast.models.undo.Undo`.

    Returns:
        How many modules were fused; with a warning where it is none.

    Raises:
        As :func:`check_fuse`.
    """
    backend = check_fuse(next(model.parameters()).device.type, collector.aggregation)
    fusable = find_fusable(model, collector.targets)

    def back() -> None:
        for module, _ in fusable:
            module.__dict__.pop("forward", None)

    undo.later(back)
    for module, compute in fusable:
        module.forward = _fused_forward(module, compute, collector, backend.DEVICE_TYPES)
    if not fusable:
        warnings.warn(
            "fuse=True: no RMSNorm or SwiGLU in front of a target can be fused in this model; "
            "calibrating without",
            stacklevel=2,
        )
    return len(fusable)


def find_fusable(
    model: nn.Module, targets: Sequence[Target]
) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """[(module, its fused computation)] of what feeds ``targets``, in the model's order."""
    if hasattr(model, "_orig_mod") or any(m._compiled_call_impl for m in model.modules()):
        return []  # compiled
    fed = {id(t.input_module) for t in targets if t.first_factor is None and not t.routed}

    def feeds(reader: Any, names: Sequence[str]) -> bool:
        return any(id(getattr(reader, name, None)) in fed for name in names)

    fusable: list[tuple[nn.Module, Callable[..., Any]]] = []
    for module in model.modules():
        for name, reader, projections in _NORMS:
            norm: Any = getattr(module, name, None)
            if feeds(getattr(module, reader, None), projections) and _is_rms_norm(norm):
                fusable.append((norm, _fused_rms_norm))
        if feeds(module, ("down_proj",)) and _is_swiglu(module):
            fusable.append((module, _fused_swiglu))
    return fusable


def _is_plain(module: Any, ending: str) -> bool:
    """A module whose class says what its forward does: no hook of accelerate, no other kernel."""
    return (
        isinstance(module, nn.Module)
        and type(module).__name__.endswith(ending)
        and "forward" not in module.__dict__
    )


def _is_rms_norm(module: Any) -> bool:
    return (
        _is_plain(module, "RMSNorm")
        and list(module._parameters) == ["weight"]
        and isinstance(getattr(module, "variance_epsilon", None), float)
        and _agrees(_try_rms_norm, type(module))
    )


def _is_swiglu(module: Any) -> bool:
    activation: Any = getattr(module, "act_fn", None)
    return (
        _is_plain(module, "MLP")
        and all(isinstance(getattr(module, name, None), nn.Module) for name in _PROJECTIONS)
        and type(activation).__name__ in _ACTIVATIONS
        # They would not be called.
        and not (activation._forward_hooks or activation._forward_pre_hooks)
        and _agrees(_try_swiglu, type(module))
    )


def _agrees(attempt: Callable[..., bool], cls: type) -> bool:
    """Whether a class computes what is expected of it, in two dtypes."""
    generator = torch.Generator("cpu").manual_seed(0)
    numbers = torch.randn(3, 16, generator=generator, dtype=torch.float32, device="cpu")
    try:
        with torch.no_grad():
            return all(attempt(cls, *numbers.to(d)) for d in (torch.float32, torch.bfloat16))
    except Exception:  # it wants more of its module than was given: not the class that is meant
        return False


def _try_rms_norm(cls: Any, x: Tensor, weight: Tensor, _: Tensor) -> bool:
    module = types.SimpleNamespace(weight=weight, variance_epsilon=0.1)
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 0.1)
    expected = weight * scaled.to(x.dtype)
    return torch.equal(cls.forward(module, x), expected)


def _try_swiglu(cls: Any, x: Tensor, gate: Tensor, up: Tensor) -> bool:
    module = types.SimpleNamespace(
        gate_proj=lambda y: gate if y is x else None,
        up_proj=lambda y: up if y is x else None,
        act_fn=functional.silu,
        down_proj=lambda y: y * 3,
    )
    return torch.equal(cls.forward(module, x), functional.silu(gate) * up * 3)


def _fused_forward(
    module: Any,
    compute: Callable[..., Tensor | None],
    collector: NormCollector,
    device_types: Sequence[str],
) -> Callable[..., Any]:
    """A forward that is fused where it has one input, no gradients and a batch to count."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        one = len(args) == 1 and not kwargs and not torch.is_grad_enabled()
        if one and args[0].device.type in device_types:
            known, mask = collector.tokens_counted(args[0])
            output = compute(module, collector, args[0], mask) if known else None
            if output is not None:
                return output
        return type(module).forward(module, *args, **kwargs)

    return forward


def _fused_rms_norm(
    module: Any, collector: NormCollector, x: Tensor, mask: Tensor | None
) -> Tensor | None:
    from antidote_fast.backends.triton_kernels import fused

    weight = module.weight.detach()
    if not fused.fits_rms_norm(x, weight):
        return None
    y, sums = fused.rms_norm(x.detach(), weight, module.variance_epsilon, mask)
    collector.deposit(y, sums)
    return y


def _fused_swiglu(module: Any, collector: NormCollector, x: Tensor, mask: Tensor | None) -> Any:
    from antidote_fast.backends.triton_kernels import fused

    gate, up = module.gate_proj(x), module.up_proj(x)
    if not fused.fits_swiglu(gate, up):
        return module.down_proj(module.act_fn(gate) * up)
    y, sums = fused.swiglu(gate.detach(), up.detach(), mask)
    collector.deposit(y, sums)
    return module.down_proj(y)
