"""The C++ kernels of ``csrc/cpu``: AVX-512, AVX2 or plain, chosen at run time.

The extension takes addresses, sizes and strides; this module turns tensors into them.
"""

import os

import torch

from antidote_fast.errors import UsageError
from antidote_fast.selection import num_pruned

try:
    from antidote_fast import _cpu
except ImportError as error:
    _cpu, _missing = None, str(error)

NAME = "cpu"
ENVIRONMENT = "ANTIDOTE_CPU_ISA"
ISAS = () if _cpu is None else tuple(_cpu.isas())  # what this machine runs, the fastest first
DEVICE_TYPES = ("cpu",)
DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
SCOPE_CODES = {"row": 0, "tensor": 1, "global": 2}


def unavailable():
    """Why this backend cannot run here, or None."""
    if _cpu is None:
        return f"the extension is not built ({_missing}); reinstall where there is a C++ compiler"
    return None


def isa():
    """The instruction set in use: the fastest, or the lower one that ``ANTIDOTE_CPU_ISA`` names."""
    return ISAS[_isa()]


def _isa():
    wanted = os.environ.get(ENVIRONMENT)
    if not wanted:
        return 0
    if wanted not in ISAS:
        raise UsageError(f"{ENVIRONMENT}={wanted!r}: must be one of {', '.join(ISAS)} on this CPU")
    return ISAS.index(wanted)


def accumulate_sq_norm_(sq_sum, x, token_mask):
    """As ``reference.accumulate_sq_norm_``."""
    _cpu.accumulate_sq_norm(
        _isa(),
        sq_sum.data_ptr(),
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        x.shape[-1],
        x.shape[:-1],
        x.stride()[:-1],
        _address(token_mask),
        torch.get_num_threads(),
    )


def score(weight, act_norm, base_weight):
    """As ``reference.score``."""
    out = torch.empty(weight.shape, dtype=torch.float32)
    row = _row(weight, act_norm, base_weight)
    _cpu.score(_isa(), row, base_weight is not None, out.data_ptr(), torch.get_num_threads())
    return out


def select_mask(scores, selection, bits):
    """As ``reference.select_mask``."""
    (k,) = _counts([scores], selection)
    _select([_row(scores, bits=bits, k=k)], selection, is_signed=True, write=False)


def prune(weights, act_norms, selection, preserve_norms, base_weights, *, write, bits, thresholds):
    """As ``reference.prune``."""
    counts = _counts(weights, selection)
    protected = [0] * len(weights)
    if selection.n_m is None:
        pairs = zip(weights, preserve_norms, strict=True)
        compared = [w for w, norm in pairs if norm is not None]
        protected = _counts(weights, selection.preserve, compared)
    rows = [
        _row(
            w,
            act_norms[i],
            base_weights[i],
            preserve_norms[i],
            None if bits is None else bits[i],
            None if thresholds is None else thresholds[i],
            counts[i],
            protected[i],
        )
        for i, w in enumerate(weights)
    ]
    _select(rows, selection, is_signed=False, write=write)


def apply_mask_(weight, bits, base_weight):
    """As ``reference.apply_mask_``."""
    row = _row(weight, None, base_weight, bits=bits)
    _cpu.apply_mask(_isa(), row, torch.get_num_threads())


def _select(rows, selection, *, is_signed, write):
    removed, group = selection.n_m or (0, 0)
    _cpu.select(
        _isa(),
        rows,
        SCOPE_CODES[selection.scope],
        selection.largest,
        selection.score_delta and not is_signed,
        is_signed,
        write,
        removed,
        group,
        torch.get_num_threads(),
    )


def _counts(weights, selection, compared=None):
    """How many are selected: along a row, in the tensor, or of all that is compared."""
    if selection.scope == "row":
        return [num_pruned(w.shape[1], selection) for w in weights]
    if selection.scope == "tensor":
        return [num_pruned(w.numel(), selection) for w in weights]
    total = sum(w.numel() for w in (weights if compared is None else compared))
    return [num_pruned(total, selection)] * len(weights)


def _row(
    weight,
    act_norm=None,
    base_weight=None,
    preserve_norm=None,
    bits=None,
    thresholds=None,
    k=0,
    preserve_k=0,
):
    return (
        weight.data_ptr(),
        weight.stride(0),
        _address(base_weight),
        0 if base_weight is None else base_weight.stride(0),
        _address(act_norm),
        _address(preserve_norm),
        _address(bits),
        _address(thresholds),
        *weight.shape,
        DTYPE_CODES[weight.dtype],
        k,
        preserve_k,
    )


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()
