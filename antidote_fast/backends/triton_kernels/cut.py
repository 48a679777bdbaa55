"""Tensor and global scope: one exact selection over all weights of a list, in three readings.

1. ``cut_sample_kernel`` brackets the m-th largest key by 8192 sampled ones. A first reading counts
   the keys above the bracket, and those inside it by bins of 4096 keys: about 2% of all weights, so
   that few atomics are needed. Where the bracket missed, which no value on the host need say, a
   reading that otherwise returns at once counts the rest as well.
2. A second reading counts the single keys of the bin found, also for each program on its own.
   That gives the m-th largest key, how many of its ties are taken, and in whose stretch they begin.
3. A third reading marks and removes.

The first k are what the last n - k leave, so all of it searches from the largest key down. Counts
are integers, and added in any order they are the same; nothing is read on the host.
"""

import functools

import torch
import triton

from antidote_fast.backends.native import address
from antidote_fast.backends.triton_kernels import cut_kernels as kernels
from antidote_fast.backends.triton_kernels import cut_search as search
from antidote_fast.backends.triton_kernels import cut_table as tables
from antidote_fast.backends.triton_kernels import launch
from antidote_fast.backends.triton_kernels.matrix import num_last
from antidote_fast.selection import num_pruned

GROUPS = 256  # groups of 8 columns a tile; half of it where no vectors are loaded
NUM_WARPS = 8
MAX_REGISTERS = 64  # for the common case: without spills, 4 programs fit a processor
PROGRAMS_PER_PROCESSOR = 4
SAMPLE = 8192
SAMPLE_BLOCK = 1024
MARGIN = 4.5  # standard deviations between the expected rank and the bracket's ends
SUM_BLOCK = 4096  # of at most SUM_ROWS programs' counts
SUM_ROWS = 128
EDGE_BLOCK = 1024


def prune_cut(matrices, selection, *, write):
    """Select of all weights of a list together and fill what was asked for; nothing is checked.

    Args:
        matrices: not empty, of one device; dtypes may differ.
        selection: what is to go, whatever its scope.
        write: remove from the weights, which scores of any sign are not.
    """
    vectors = all(matrix.vec for matrix in matrices)
    groups = GROUPS if vectors else GROUPS // 2
    entries, total, protected, tiles = [], 0, 0, 0
    for matrix in matrices:
        operand = matrix.operand
        rows, columns, row_stride, base_stride = matrix.sizes(vectors)
        entries += [
            total,
            protected,
            address(operand.act_norm),
            address(operand.preserve_norm),
            address(operand.weight),
            row_stride,
            address(operand.base_weight),
            base_stride,
            address(operand.bits),
            address(operand.thresholds),
            rows,
            columns,
            matrix.dtype_code,
            tiles,
            0,
            0,
        ]
        total += rows * columns
        protected += 0 if operand.preserve_norm is None else rows * columns
        tiles += triton.cdiv(rows * triton.cdiv(columns, 8), groups)
    end = [0] * tables.FIELDS.value
    end[tables.FIRST_TILE.value] = tiles
    if not num_pruned(total, selection):
        return
    taken = num_last(total, selection)
    protected_taken = num_pruned(protected, selection.preserve) if protected else 0
    preserved = protected_taken > 0
    first = matrices[0].operand
    wants_edges = first.thresholds is not None
    flags = write * tables.WRITE.value | (not selection.largest) * tables.SMALLEST.value
    flags |= (first.bits is not None) * tables.WANT_BITS.value
    flags |= (wants_edges and not selection.largest) * tables.WANT_EDGE.value
    header = [len(matrices), tiles, taken, protected_taken, total, protected, flags, 0]
    device = matrices[0].device
    table = torch.tensor([*header, *entries, *end]).to(device, non_blocking=True)

    codes = {matrix.dtype_code for matrix in matrices}
    dtype = codes.pop() if len(codes) == 1 else tables.MIXED.value
    delta = matrices[0].delta(selection)
    half = all(matrix.operand.weight.element_size() == 2 for matrix in matrices)
    light = vectors and half and not (preserved or delta)
    selections = 1 + preserved
    programs = min(launch.num_programs(device, PROGRAMS_PER_PROCESSOR), tiles)
    state, histograms, sub_bins, own_counts, sample = _scratch(selections, programs, device)
    run = functools.partial(launch.run, device=device)

    def read(kernel, *scratch, **constants):
        """One reading of all tiles."""
        run(
            kernel,
            (programs,),
            table,
            state,
            *scratch,
            num_warps=NUM_WARPS,
            max_registers=MAX_REGISTERS if light else 2 * MAX_REGISTERS,
            **constants,
            GROUPS=groups,
            PRESERVED=preserved,
            VEC=vectors,
            DTYPE=dtype,
            DELTA=delta,
        )

    run(
        search.cut_sample_kernel,
        (triton.cdiv(min(SAMPLE, total), SAMPLE_BLOCK), selections),
        table,
        sample,
        num_warps=NUM_WARPS,
        SAMPLE=SAMPLE,
        BLOCK_SIZE=SAMPLE_BLOCK,
        GROUPED=vectors,
        DTYPE=dtype,
        DELTA=delta,
    )
    bracket = (search.cut_bracket_kernel, (selections,), table, state, sample, MARGIN)
    run(*bracket, num_warps=16, SAMPLE=SAMPLE)
    if taken > 0 or preserved:
        count = functools.partial(read, kernels.cut_count_kernel, histograms, own_counts)
        count(PASS=kernels.NEAR.value)
        count(PASS=kernels.FAR.value)
        run(search.cut_bin_kernel, (selections,), table, state, histograms, num_warps=16)
        count(PASS=kernels.INSIDE.value)
        sum_rows = min(triton.next_power_of_2(programs), SUM_ROWS)
        blocks = search.SUB_BINS.value * sum_rows // SUM_BLOCK
        sums = (search.cut_sum_kernel, (blocks, selections), own_counts, sub_bins, programs)
        run(*sums, num_warps=4, R=sum_rows, BLOCK_SIZE=SUM_BLOCK // sum_rows)
        key = (search.cut_key_kernel, (selections,), table, state, sub_bins, own_counts, programs)
        run(*key, num_warps=NUM_WARPS, PROGRAMS=triton.next_power_of_2(programs))
    read(kernels.cut_apply_kernel)
    if wants_edges:
        edges = (kernels.cut_edge_kernel, (len(matrices),), table, state)
        run(*edges, num_warps=4, BLOCK_SIZE=EDGE_BLOCK)


def _scratch(selections, programs, device):
    """Counters, all zero, of one call: one allocation, of some 8 MB a selection on a large GPU.

    Returns (state, histograms, sub_bins) in int64 and (own_counts, sample) in int32.
    """
    sizes = [
        selections * search.STATE.value,
        selections * search.BINS.value,
        selections * search.SUB_BINS.value,
        selections * programs * search.SUB_BINS.value // 2,
        selections * SAMPLE // 2,
    ]
    parts = torch.zeros(sum(sizes), dtype=torch.int64, device=device).split(sizes)
    return *parts[:3], *(part.view(torch.int32) for part in parts[3:])
