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
    delta = matrices[0].delta(selection)
    constants = {
        "DTYPE": codes.pop() if len(codes) == 1 else tables.MIXED.value,
        "DELTA": delta,
    }
    half = all(matrix.operand.weight.element_size() == 2 for matrix in matrices)
    light = vectors and half and not (preserved or delta)
    max_registers = MAX_REGISTERS if light else 2 * MAX_REGISTERS
    selections = 1 + preserved
    programs = min(launch.num_programs(device, PROGRAMS_PER_PROCESSOR), tiles)
    scratch = _Scratch(selections, programs, device)
    state, histograms = scratch.state, scratch.histograms

    def count(counting):
        launch.run(
            kernels.cut_count_kernel,
            (programs,),
            table,
            state,
            histograms,
            scratch.own_counts,
            device=device,
            num_warps=NUM_WARPS,
            max_registers=max_registers,
            PASS=counting.value,
            GROUPS=groups,
            PRESERVED=preserved,
            VEC=vectors,
            **constants,
        )

    launch.run(
        search.cut_sample_kernel,
        (triton.cdiv(min(SAMPLE, total), SAMPLE_BLOCK), selections),
        table,
        scratch.sample,
        device=device,
        num_warps=NUM_WARPS,
        SAMPLE=SAMPLE,
        BLOCK_SIZE=SAMPLE_BLOCK,
        GROUPED=vectors,
        **constants,
    )
    bracket = (search.cut_bracket_kernel, (selections,), table, state, scratch.sample, MARGIN)
    launch.run(*bracket, device=device, num_warps=16, SAMPLE=SAMPLE)
    if taken > 0 or preserved:
        count(kernels.NEAR)
        count(kernels.FAR)
        find_bin = (search.cut_bin_kernel, (selections,), table, state, histograms)
        launch.run(*find_bin, device=device, num_warps=16)
        count(kernels.INSIDE)
        sum_rows = min(triton.next_power_of_2(programs), SUM_ROWS)
        launch.run(
            search.cut_sum_kernel,
            (search.SUB_BINS.value * sum_rows // SUM_BLOCK, selections),
            scratch.own_counts,
            scratch.sub_bins,
            programs,
            device=device,
            num_warps=4,
            R=sum_rows,
            BLOCK_SIZE=SUM_BLOCK // sum_rows,
        )
        launch.run(
            search.cut_key_kernel,
            (selections,),
            table,
            state,
            scratch.sub_bins,
            scratch.own_counts,
            programs,
            device=device,
            num_warps=NUM_WARPS,
            PROGRAMS=triton.next_power_of_2(programs),
        )
    launch.run(
        kernels.cut_apply_kernel,
        (programs,),
        table,
        state,
        device=device,
        num_warps=NUM_WARPS,
        max_registers=max_registers,
        GROUPS=groups,
        PRESERVED=preserved,
        VEC=vectors,
        **constants,
    )
    if wants_edges:
        edges = (kernels.cut_edge_kernel, (len(matrices),), table, state)
        launch.run(*edges, device=device, num_warps=4, BLOCK_SIZE=EDGE_BLOCK)


class _Scratch:
    """Counters, all zero, of one call: one allocation, of some 8 MB a selection on a large GPU."""

    def __init__(self, selections, programs, device):
        sizes = [
            selections * search.STATE.value,
            selections * search.BINS.value,
            selections * search.SUB_BINS.value,
            selections * programs * search.SUB_BINS.value // 2,  # int32
            selections * SAMPLE // 2,
        ]
        parts = torch.zeros(sum(sizes), dtype=torch.int64, device=device).split(sizes)
        self.state, self.histograms, self.sub_bins, own_counts, sample = parts
        self.own_counts, self.sample = own_counts.view(torch.int32), sample.view(torch.int32)
