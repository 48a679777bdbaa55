"""The CUDA C++ kernels of ``csrc/cuda``, for NVIDIA GPUs of compute capability 8.0 and later.

The extension takes addresses, sizes, strides and a stream; this module turns tensors into them.
Nothing here waits for the device. In the sanitizer build the same kernels are compiled for the
host (``csrc/simt``), and take CPU tensors: for tests, nothing else.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from antidote_fast.backends import native, reference
from antidote_fast.backends.operand import Operand
from antidote_fast.selection import Selection

try:
    from antidote_fast import _cuda
except ImportError as error:
    _cuda, _missing = None, str(error)

NAME = "cuda"
EMULATED = _cuda is not None and _cuda.emulated
MAX_DIMS = 9  # of activations
DEVICE_TYPES = ("cpu",) if EMULATED else ("cuda",)


def not_built() -> str | None:
    """Why there is no extension, or None."""
    if _cuda is None:
        return f"the extension is not built ({_missing}); reinstall where there is nvcc"
    return None


def unavailable() -> str | None:
    """Why this backend cannot run here, or None."""
    if _cuda is None:
        return not_built()
    if EMULATED:
        return None
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU here"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the GPU has compute capability {major}.{minor}; 8.0 or later is needed"
    problem = _problem(torch.cuda.current_device())
    return f"the extension's kernels cannot run here ({problem})" if problem else None


@functools.cache
def _problem(device):
    """What a driver too old for the build, or a GPU that it has no code for, answers; or ""."""
    return _cuda.problem(device)


def accumulate_sq_norm_(sq_sum: Tensor, x: Tensor, token_mask: Tensor | None) -> None:
    """As ``reference.accumulate_sq_norm_``."""
    where = _where(x)
    x = _few_dims(x)
    activations = _activations(x, token_mask)
    scratch = _scratch(_cuda.norms_scratch(where, *activations), x)
    _cuda.accumulate_sq_norm(where, sq_sum.data_ptr(), *activations, native.address(scratch))


def score(weight: Tensor, act_norm: Tensor | None, base_weight: Tensor | None) -> Tensor:
    """As ``reference.score``."""
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    if weight.numel():
        row = native.row(Operand(weight, act_norm, base_weight=base_weight))
        _cuda.score(_where(weight), row, base_weight is not None, out.data_ptr())
    return out


def select_mask(scores: Tensor, selection: Selection, bits: Tensor) -> None:
    """As ``reference.select_mask``."""
    _select([Operand(scores, bits=bits)], selection, is_signed=True, write=False)


def prune(operands: Sequence[Operand], selection: Selection, *, write: bool) -> None:
    """As ``reference.prune``."""
    _select(operands, selection, is_signed=False, write=write)


def prune_linear(
    operand: Operand, x: Tensor, token_mask: Tensor | None, selection: Selection
) -> bool:
    """Fill ``operand.act_norm`` from x and prune by it, in one launch; False where it cannot be."""
    if selection.scope != "row" or selection.n_m is not None:
        return False
    (row,) = native.rows_of([operand], selection)
    plan = native.plan_of(selection, is_signed=False, write=True)
    where = _where(operand.weight)
    x = _few_dims(x)
    activations = _activations(x, token_mask)
    if not _cuda.serves_linear(where, row, plan, *activations):
        return False
    norm, scratch = operand.act_norm, _scratch(_cuda.linear_scratch(where, *activations), x)
    _cuda.prune_linear(
        where, row, plan, native.address(norm), *activations, native.address(scratch)
    )
    return True


def apply_mask_(weight: Tensor, bits: Tensor, base_weight: Tensor | None) -> None:
    """As ``reference.apply_mask_``."""
    row = native.row(Operand(weight, base_weight=base_weight, bits=bits))
    _cuda.apply_mask(_where(weight), row)


def _select(operands, selection, *, is_signed, write):
    plan = native.plan_of(selection, is_signed=is_signed, write=write)
    rows = native.rows_of(operands, selection)
    present = [pair for pair in zip(operands, rows, strict=True) if pair[0].weight.numel()]
    like = operands[0].weight
    where = _where(like)
    if selection.n_m is not None:
        for operand, row in present:
            marks, bits = None, operand.bits
            if bits is not None and _cuda.needs_marks(plan):
                marks = operand.weight.new_empty(operand.weight.shape, dtype=torch.uint8)
            _cuda.prune_groups(where, row, plan, native.address(marks))
            if marks is not None:
                bits.copy_(reference.pack_bits(marks.bool()))
        return
    rows = [row for _, row in present]
    if selection.scope == "row":
        scratch = _scratch(_cuda.rows_scratch(where, rows, plan), like)
        _cuda.prune_rows(where, rows, plan, native.address(scratch))
    else:
        for part in [[row] for row in rows] if selection.scope == "tensor" else [rows]:
            scratch = _scratch(_cuda.cut_scratch(where, part, plan), like)
            _cuda.prune_cut(where, part, plan, native.address(scratch))


def _where(tensor):
    """(device, stream) of a tensor."""
    if EMULATED:
        return 0, 0
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def _scratch(size, like):
    """Device memory of one call: torch keeps it until the stream is past it."""
    return torch.empty(size, dtype=torch.uint8, device=like.device) if size else None


def _few_dims(x):
    """x of no more dimensions than a kernel has room for."""
    return x if x.dim() <= MAX_DIMS else x.reshape(-1, x.shape[-1])


def _activations(x, token_mask):
    """(x, dtype, columns, token_mask), sizes, strides."""
    head = x.data_ptr(), native.DTYPE_CODES[x.dtype], x.shape[-1], native.address(token_mask)
    return head, list(x.shape[:-1]), list(x.stride()[:-1])
