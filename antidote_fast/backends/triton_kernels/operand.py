"""What belongs to one weight of a call, in the form in which kernels take it."""

import torch

from antidote_fast.backends.triton_kernels import launch, rows


class Operand:
    """One weight with what belongs to it, as the kernels take it; ``None`` where absent."""

    def __init__(
        self,
        weight,
        act_norm=None,
        base_weight=None,
        preserve_norm=None,
        bits=None,
        thresholds=None,
        is_signed=False,
    ):
        self.weight, self.base_weight = weight, base_weight
        self.act_norm, self.preserve_norm = act_norm, preserve_norm
        self.bits_out, self.thresholds_out = bits, thresholds
        self.device, self.num_rows, self.num_columns = weight.device, *weight.shape
        self.dtype_code = launch.SIGNED if is_signed else launch.DTYPE_CODES[weight.dtype]
        self.vec = self._is_aligned()

    def _is_aligned(self):
        """Whether rows, bases and norms can be read 16 bytes at a time."""
        if self.num_columns % 8:
            return False
        for matrix in (self.weight, self.base_weight):
            if matrix is not None and (matrix.data_ptr() % 16 or matrix.stride(0) % 8):
                return False
        return all(n is None or n.data_ptr() % 16 == 0 for n in (self.act_norm, self.preserve_norm))

    @property
    def raw(self):
        """The weight's memory as integers, as kernels take it."""
        return launch.raw(self.weight)

    @property
    def base(self):
        """That of the base weight, or of the weight where there is none."""
        return self.raw if self.base_weight is None else launch.raw(self.base_weight)

    @property
    def norm(self):
        """The activation norm, (K,) fp32, or a stand-in that no kernel reads."""
        return self._or_absent(self.act_norm, torch.float32)

    @property
    def preserve(self):
        """The norm on data to preserve, as :attr:`norm`."""
        return self._or_absent(self.preserve_norm, torch.float32)

    @property
    def bits(self):
        """Where a mask's bits go, uint8, or a stand-in."""
        return self._or_absent(self.bits_out, torch.uint8)

    @property
    def thresholds(self):
        """Where each row's smallest removed score goes, fp32, or a stand-in."""
        return self._or_absent(self.thresholds_out, torch.float32)

    def _or_absent(self, tensor, dtype):
        return launch.absent(self.device, dtype) if tensor is None else tensor.detach()

    def sizes(self, vec):
        """Rows, columns and the row strides, these in groups of 8 columns where ``vec``."""
        step = 8 if vec else 1
        base = self.weight if self.base_weight is None else self.base_weight
        return (
            self.num_rows,
            self.num_columns,
            self.weight.stride(0) // step,
            base.stride(0) // step,
        )

    def flags(self, selection=None, *, write=False):
        """The kernels' ``flags``."""
        return (
            (rows.WRITE.value if write else 0)
            | (rows.SMALLEST.value if selection is not None and not selection.largest else 0)
            | (rows.HAS_NORM.value if self.act_norm is not None else 0)
            | (rows.HAS_BASE.value if self.base_weight is not None else 0)
            | (rows.WANT_BITS.value if self.bits_out is not None else 0)
            | (rows.WANT_THRESHOLDS.value if self.thresholds_out is not None else 0)
        )
