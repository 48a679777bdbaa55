"""The C++ kernels of ``csrc/cpu``: AVX-512, AVX2 or plain, chosen at run time.

The extension takes addresses, sizes and strides; this module turns tensors into them.
"""

import torch

from antidote_fast.selection import num_pruned

try:
    from antidote_fast import _cpu
except ImportError as error:
    _cpu, _reason = None, str(error)

NAME = "cpu"
DEVICE_TYPES = ("cpu",)
DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
SCOPE_CODES = {"row": 0, "tensor": 1, "global": 2}


def unavailable():
    """Why this backend cannot run here, or None."""
    if _cpu is None:
        return f"the extension antidote_fast._cpu is not there ({_reason}); install with a C++ compiler"
    return None


def isa():
    """The instruction set in use: avx512, avx2 or plain (``ANTIDOTE_CPU_ISA`` forces a lower one)."""
    return _cpu.isa()


def accumulate_sq_norm_(sq_sum, x, token_mask):
    """As ``reference.accumulate_sq_norm_``."""
    _cpu.accumulate_sq_norm(
        sq_sum.data_ptr(),
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        x.shape,
        x.stride(),
        _address(token_mask),
        torch.get_num_threads(),
    )


def score(weight, act_norm, base_weight):
    """As ``reference.score``."""
    out = torch.empty(weight.shape, dtype=torch.float32)
    if out.numel():
        row = _row(weight, act_norm, base_weight)
        _cpu.score(out.data_ptr(), row, DTYPE_CODES[weight.dtype], torch.get_num_threads())
    return out


def select_mask(scores, selection, bits):
    """As ``reference.select_mask``."""
    row = _row(scores, None, None, bits=bits)
    _cpu.select([row], _plan(selection, [scores], signed=True), torch.get_num_threads())


def prune(weights, act_norms, selection, preserve_norms, base_weights, *, write, bits, thresholds):
    """As ``reference.prune``."""
    by_dtype = {}
    rows = [
        _row(
            w,
            act_norms[i],
            base_weights[i],
            preserve_norm=preserve_norms[i],
            bits=None if bits is None else bits[i],
            thresholds=None if thresholds is None else thresholds[i],
        )
        for i, w in enumerate(weights)
    ]
    _cpu.select(rows, _plan(selection, weights, preserve_norms, write), torch.get_num_threads())


def apply_mask_(weight, bits, base_weight):
    """As ``reference.apply_mask_``."""
    row = _row(weight, None, base_weight, bits=bits)
    _cpu.apply_mask(row, DTYPE_CODES[weight.dtype], torch.get_num_threads())
