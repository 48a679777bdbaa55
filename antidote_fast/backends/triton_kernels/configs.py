"""Every block size of the row kernels in one table: nothing is tuned at first use.

Chosen from what the compiler reports (registers, spills; ``tests/test_triton_compile.py``), not yet
from times on a GPU. A thread holds 16 keys where weights are of 16 bits and nothing else takes
part: 64 registers, so that four rows of 4096 columns are in flight on each processor of an H100.
With 32 keys it would need over 128 and spill. Where more takes part (``pressure``) it holds 8.
"""

from typing import NamedTuple

LONGEST_ROW = 16384  # columns, halved by each step of pressure; longer rows are read in parts
LONGEST_GROUP = 8192  # of n_m
LONGEST_SHORT_ROW = 512  # up to here a program takes several rows
THREADS_A_WARP = 32  # of NVIDIA; where warps are wider, programs have more threads for the work
MATRICES_A_LAUNCH = 1024  # rows of a table, all looked at by each program
MERGED_WEIGHTS = 1 << 24  # lists with fewer weights than this take one launch, whatever their rows
ALONE = 1 << 24  # of longer lists, a matrix this large has its own: a table costs registers


class RowConfig(NamedTuple):
    """Rows and groups of 8 columns a program, and what it runs on."""

    rows: int
    groups: int
    num_warps: int
    max_registers: int
    programs_a_processor: int


# Columns up to: warps of a program that takes one row, its registers a thread, programs at once.
_ROWS = {
    1024: (2, 80, 12),
    2048: (4, 64, 8),
    4096: (8, 64, 4),
    8192: (16, 64, 2),
    16384: (32, 64, 1),
}
LONG_ROWS = RowConfig(1, 512, 8, 128, 2)
LONG_ROWS_UNDER_PRESSURE = RowConfig(1, 256, 8, 128, 2)
LONGEST_MIXED_ROW = 4096  # in a launch of short rows and others; longer ones are read in parts
GROUP_VALUES = 1024  # keys of a program that searches groups of n_m
SMALL_GROUP_BLOCKS = 256  # blocks of a program that ranks within groups
ELEMENTWISE_VALUES = 2048  # weights of a program that scores or applies a mask
ELEMENTWISE_WARPS = 4


def power_of_two(n):
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def pressure(dtype_code, *, vec, delta, preserved):
    """How many registers a key needs beside its own: 0 for plain 16-bit weights, 1 or 2."""
    extra = dtype_code >= 2, delta or preserved
    return sum(extra) if vec else 2


def row_config(columns, *, itemsize, vec, pressure, num_warps=None):
    """The RowConfig for rows of this length; None where they must be read in parts.

    ``itemsize``: bytes a weight. ``pressure``: as :func:`pressure`. ``num_warps``: of a launch that
    short rows share with long ones.
    """
    block = 8 * power_of_two(-(-columns // 8))
    if block > LONGEST_ROW >> pressure:
        return None
    if block <= LONGEST_SHORT_ROW:
        warps = num_warps or (8 if block < 256 else 4)
        # Without vectors a group's columns lie in 8 threads: one key each, or rows' states pile up.
        keys = 16 // itemsize if vec else 1
        rows = max(1, warps * THREADS_A_WARP * keys // block)
        return RowConfig(rows, block // 8, warps, 128, 2)
    warps, registers, programs = next(v for limit, v in _ROWS.items() if block <= limit)
    if pressure:  # 8 keys a thread
        warps, registers = 2 * warps, 64 * pressure
        programs = max(1, 32 // warps // pressure)
    return RowConfig(1, block // 8, warps, registers, programs)


def mixed_config(lengths, *, pressure):
    """The RowConfig of a table of rows of several kinds: one kernel holds the code of all."""
    if pressure or any(128 < n <= LONGEST_SHORT_ROW for n in lengths):
        return LONG_ROWS._replace(max_registers=255, programs_a_processor=1)
    return LONG_ROWS


def table_config(config):
    """A RowConfig of one kind of row with the few registers more that a table's kernel needs.

    None where a program of that size has none to give: such matrices take a launch each.
    """
    if config.num_warps > 16:
        return None
    if config.max_registers > 64:
        return config
    return config._replace(
        max_registers=128, programs_a_processor=max(1, config.programs_a_processor // 2)
    )
