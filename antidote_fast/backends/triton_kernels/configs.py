"""Every block size of the row kernels in one table: nothing is tuned at first use.

Chosen from what the compiler reports (registers, spills; ``tests/test_triton_compile.py``), not yet
from times on a GPU. A thread holds 16 keys: at 64 registers, which plain pruning of 16-bit weights
needs, four 4096-column rows are in flight on each processor of an H100 or A100; 32 keys a thread
need over 128 registers from 16384 columns on, and spill.
"""

from typing import NamedTuple

LONGEST_ROW = 16384  # columns; longer rows are read in parts
LONGEST_HEAVY_ROW = 8192  # where a thread needs more than 64 registers
LONGEST_SHORT_ROW = 512  # up to here a program takes several rows
THREADS_A_WARP = 32  # of NVIDIA; where warps are wider, programs have more threads for the work
MATRICES_A_LAUNCH = 1024  # rows of a table, all looked at by each program
MERGED_WEIGHTS = 1 << 24  # lists with fewer weights than this take one launch, whatever their rows


class RowConfig(NamedTuple):
    """Rows and groups of 8 columns a program, and what it runs on."""

    rows: int
    groups: int
    num_warps: int
    max_registers: int
    programs_a_processor: int


#     columns up to: warps of a program that takes one row
_WARPS = {1024: 2, 2048: 4, 4096: 8, 8192: 16, 16384: 32}
LONG_ROWS = RowConfig(1, 512, 8, 128, 2)
GROUP_VALUES = 1024  # keys of a program that searches groups of n_m
SMALL_GROUP_BLOCKS = 256  # blocks of a program that ranks within groups
ELEMENTWISE_VALUES = 2048  # weights of a program that scores or applies a mask
ELEMENTWISE_WARPS = 4


def power_of_two(n):
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def is_heavy(dtype_code, *, vec, delta, preserved):
    """Whether a thread with 16 keys needs more than 64 registers."""
    return dtype_code >= 2 or delta or preserved or not vec


def row_config(columns, *, vec, heavy, num_warps=None):
    """The RowConfig for rows of this length, or None where they must be read in parts.

    ``num_warps``: of the launch that short rows share with long ones.
    """
    block = 8 * power_of_two(-(-columns // 8))
    if block > (LONGEST_HEAVY_ROW if heavy else LONGEST_ROW):
        return None
    if block <= LONGEST_SHORT_ROW:
        warps = num_warps or 4
        # Without vectors a group's columns lie in 8 threads: one key each, or rows' states pile up.
        keys = 8 if vec else 1
        rows = max(1, warps * THREADS_A_WARP * keys // block)
        return RowConfig(rows, block // 8, warps, 128, 4)
    warps = next(w for columns, w in _WARPS.items() if block <= columns)
    if heavy:
        return RowConfig(1, block // 8, warps, 128, max(1, 16 // warps))
    return RowConfig(1, block // 8, warps, 64, 32 // warps)
