"""One weight of a call, with what belongs to it, in the form in which kernels take it."""

import torch

from antidote_fast.backends.native import DTYPE_CODES
from antidote_fast.backends.triton_kernels import launch, rows
from antidote_fast.selection import num_pruned


class Matrix:
    """An operand as the kernels take it.

    Attributes:
        vec: whether rows, bases and norms can be read 16 bytes at a time.
    """

    def __init__(self, operand, is_signed=False):
        self.operand, weight = operand, operand.weight
        self.device, self.num_rows, self.num_columns = weight.device, *weight.shape
        self.dtype_code = launch.SIGNED if is_signed else DTYPE_CODES[weight.dtype]
        sources = (weight, operand.base_weight, operand.act_norm, operand.preserve_norm)
        self.vec = self.num_columns % 8 == 0 and not any(
            t.data_ptr() % 16 or _row_stride(t) % 8 for t in sources if t is not None
        )

    def pointers(self):
        """(weight, base, norm, preserve norm, bits, thresholds), the first two as integers.

        What is absent has a stand-in that no kernel reads; the base's is the weight.
        """
        operand = self.operand
        raw = launch.raw(operand.weight)
        base = raw if operand.base_weight is None else launch.raw(operand.base_weight)
        others = (
            (operand.act_norm, torch.float32),
            (operand.preserve_norm, torch.float32),
            (operand.bits, torch.uint8),
            (operand.thresholds, torch.float32),
        )
        return (
            raw,
            base,
            *(
                launch.absent(self.device, dtype) if tensor is None else tensor.detach()
                for tensor, dtype in others
            ),
        )

    def sizes(self, vec):
        """Rows, columns and the row strides, these in groups of 8 columns where ``vec``."""
        weight, step = self.operand.weight, 8 if vec else 1
        base = weight if self.operand.base_weight is None else self.operand.base_weight
        strides = _row_stride(weight) // step, _row_stride(base) // step
        return self.num_rows, self.num_columns, *strides

    def delta(self, selection):
        """Whether keys are of ``|weight - base|``."""
        return selection.score_delta and self.dtype_code != launch.SIGNED

    def flags(self, selection=None, *, write=False):
        """The kernels' ``flags``."""
        operand = self.operand
        said = (
            (rows.WRITE, write),
            (rows.SMALLEST, selection is not None and not selection.largest),
            (rows.HAS_NORM, operand.act_norm is not None),
            (rows.HAS_BASE, operand.base_weight is not None),
            (rows.WANT_BITS, operand.bits is not None),
            (rows.WANT_THRESHOLDS, operand.thresholds is not None),
        )
        return sum(flag.value for flag, holds in said if holds)

    def row_sizes(self, selection, vec, *, write):
        """The last 7 arguments of ``table.prune_rows_kernel``, for a selection along rows."""
        preserved = self.operand.preserve_norm is not None
        return (
            *self.sizes(vec),
            num_last(self.num_columns, selection),
            num_pruned(self.num_columns, selection.preserve) if preserved else 0,
            self.flags(selection, write=write),
        )


def num_last(n, selection):
    """How many of n come last in the order, so that removing them or the others is what is asked.

    The first k are all but the last n - k.
    """
    k = num_pruned(n, selection)
    return k if selection.largest else n - k


def _row_stride(tensor):
    """Of a vector, or a matrix of one row, any: 0."""
    return tensor.stride(0) if tensor.dim() == 2 and len(tensor) > 1 else 0
