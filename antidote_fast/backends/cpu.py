"""The C++ kernels of ``csrc/cpu``: AVX-512, AVX2 or plain, chosen at run time.

The extension takes addresses, sizes and strides; this module turns tensors into them.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from antidote_fast.backends import native
from antidote_fast.backends.operand import Operand
from antidote_fast.errors import UsageError
from antidote_fast.selection import Selection

try:
    from antidote_fast import _cpu
except ImportError as error:
    _cpu, _missing = None, str(error)

NAME = "cpu"
ENVIRONMENT = "ANTIDOTE_CPU_ISA"
ISAS = () if _cpu is None else tuple(_cpu.isas())  # what this machine runs, the fastest first
DEVICE_TYPES = ("cpu",)


def unavailable() -> str | None:
    """Why this backend cannot run here, or None."""
    if _cpu is None:
        return f"the extension is not built ({_missing}); reinstall where there is a C++ compiler"
    return None


def isa() -> str:
    """The instruction set in use: the fastest, or the lower one that ``ANTIDOTE_CPU_ISA`` names."""
    return ISAS[_isa()]


def _isa():
    wanted = os.environ.get(ENVIRONMENT)
    if not wanted:
        return 0
    if wanted not in ISAS:
        raise UsageError(f"{ENVIRONMENT}={wanted!r}: must be one of {', '.join(ISAS)} on this CPU")
    return ISAS.index(wanted)


def accumulate_sq_norm_(sq_sum: Tensor, x: Tensor, token_mask: Tensor | None) -> None:
    """As ``reference.accumulate_sq_norm_``."""
    _cpu.accumulate_sq_norm(
        _isa(),
        sq_sum.data_ptr(),
        x.data_ptr(),
        native.DTYPE_CODES[x.dtype],
        x.shape[-1],
        x.shape[:-1],
        x.stride()[:-1],
        native.address(token_mask),
        torch.get_num_threads(),
    )


def score(weight: Tensor, act_norm: Tensor | None, base_weight: Tensor | None) -> Tensor:
    """As ``reference.score``."""
    out = torch.empty(weight.shape, dtype=torch.float32)
    row = native.row(Operand(weight, act_norm, base_weight=base_weight))
    _cpu.score(_isa(), row, base_weight is not None, out.data_ptr(), torch.get_num_threads())
    return out


def select_mask(scores: Tensor, selection: Selection, bits: Tensor) -> None:
    """As ``reference.select_mask``."""
    _select([Operand(scores, bits=bits)], selection, is_signed=True, write=False)


def prune(operands: Sequence[Operand], selection: Selection, *, write: bool) -> None:
    """As ``reference.prune``."""
    _select(operands, selection, is_signed=False, write=write)


def apply_mask_(weight: Tensor, bits: Tensor, base_weight: Tensor | None) -> None:
    """As ``reference.apply_mask_``."""
    row = native.row(Operand(weight, base_weight=base_weight, bits=bits))
    _cpu.apply_mask(_isa(), row, torch.get_num_threads())


def _select(operands, selection, *, is_signed, write):
    plan = native.plan_of(selection, is_signed=is_signed, write=write)
    _cpu.select(_isa(), native.rows_of(operands, selection), *plan, torch.get_num_threads())
