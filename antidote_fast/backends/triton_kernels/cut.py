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

from antidote_fast.backends.triton_kernels import cut_kernels as kernels
from antidote_fast.backends.triton_kernels import cut_search as search
from antidote_fast.backends.triton_kernels import cut_table as tables
from antidote_fast.backends.triton_kernels import launch

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


def prune_cut(
    weights,
    act_norms,
    k,
    protected_k,
    preserve_norms,
    base_weights,
    *,
    largest,
    delta,
    signed,
    write,
    bits,
    thresholds,
):
    """Select k of all weights of a list together and fill what was asked for; nothing is checked.

    Args:
        weights: (N, K) tensors of one device; dtypes may differ, tensors may be empty.
        act_norms: (K,) fp32 or None, one a weight; a list, or None for none at all, as are
            preserve_norms and base_weights.
        k: how many are removed; the last in the order (key, flat index) if ``largest``.
        protected_k: how many of the weights with a preserve norm are kept, the last by it.
        delta: keys are of ``|weight - base|``.
        signed: the weights are fp32 scores of any sign, and stay as they are.
        write: remove from the weights.
        bits: list of zeroed uint8 masks to fill, or None.
        thresholds: list of (N,) fp32, NaN, to fill with the score at the edge; or None.
    """
    rows = _Rows(weights, act_norms, preserve_norms, base_weights, bits, thresholds)
    if k == 0 or not rows.entries:
        return
    preserved = protected_k > 0
    taken = k if largest else rows.total - k
    flags = write * tables.WRITE.value | (not largest) * tables.SMALLEST.value
    flags |= (bits is not None) * tables.WANT_BITS.value
    flags |= (thresholds is not None and not largest) * tables.WANT_EDGE.value
    header = [len(rows.entries), rows.tiles, taken, protected_k, rows.total, rows.protected, flags]
    device = weights[0].device
    table = _to_device([*header, 0, *rows.flat()], device)

    constants = {
        "DTYPE": launch.SIGNED if signed else rows.dtype(),
        "DELTA": bool(delta),
    }
    half = all(entry.weight.element_size() == 2 for entry in rows.entries)
    light = rows.vectors and half and not (preserved or delta)
    max_registers = MAX_REGISTERS if light else 2 * MAX_REGISTERS
    selections = 1 + preserved
    programs = min(launch.num_programs(device, PROGRAMS_PER_PROCESSOR), rows.tiles)
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
            GROUPS=rows.groups,
            PRESERVED=preserved,
            VEC=rows.vectors,
            **constants,
        )

    launch.run(
        search.cut_sample_kernel,
        (triton.cdiv(min(SAMPLE, rows.total), SAMPLE_BLOCK), selections),
        table,
        scratch.sample,
        device=device,
        num_warps=NUM_WARPS,
        SAMPLE=SAMPLE,
        BLOCK_SIZE=SAMPLE_BLOCK,
        GROUPED=rows.vectors,
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
        GROUPS=rows.groups,
        PRESERVED=preserved,
        VEC=rows.vectors,
        **constants,
    )
    if thresholds is not None:
        edges = (kernels.cut_edge_kernel, (len(rows.entries),), table, state)
        launch.run(*edges, device=device, num_warps=4, BLOCK_SIZE=EDGE_BLOCK)


class _Rows:
    """What the kernels' table says of each tensor that is not empty."""

    def __init__(self, weights, act_norms, preserve_norms, base_weights, bits, thresholds):
        operands = (act_norms, preserve_norms, base_weights, bits, thresholds)
        self.entries = [
            _Entry(weight, *(None if o is None else o[i] for o in operands))
            for i, weight in enumerate(weights)
            if weight.numel()
        ]
        self.vectors = all(entry.is_aligned() for entry in self.entries)
        self.groups = GROUPS if self.vectors else GROUPS // 2
        self.total = self.protected = self.tiles = 0
        for entry in self.entries:
            entry.begin = (self.total, self.protected, self.tiles)
            rows, columns = entry.weight.shape
            self.total += rows * columns
            self.protected += 0 if entry.preserve is None else rows * columns
            self.tiles += triton.cdiv(rows * triton.cdiv(columns, 8), self.groups)

    def dtype(self):
        """The code of the only dtype, or that of several."""
        codes = {launch.DTYPE_CODES[entry.weight.dtype] for entry in self.entries}
        return codes.pop() if len(codes) == 1 else tables.MIXED.value

    def flat(self):
        """The rows one after the other, and one that begins where the last ends."""
        numbers = [n for entry in self.entries for n in entry.numbers(self.vectors)]
        end = [0] * tables.FIELDS.value
        end[tables.FIRST_TILE.value] = self.tiles
        return numbers + end


class _Entry:
    def __init__(self, weight, act_norm, preserve, base, bits, threshold):
        self.weight, self.base = weight, base
        self.norm, self.preserve = act_norm, preserve
        self.bits, self.threshold = bits, threshold
        self.begin = ()

    def is_aligned(self):
        """Whether all of it loads as 16-byte vectors that never cross a row."""
        sources = [t for t in (self.weight, self.base) if t is not None]
        sources += [t.unsqueeze(0) for t in (self.norm, self.preserve) if t is not None]
        return self.weight.shape[1] % 8 == 0 and all(
            t.data_ptr() % 16 == 0 and _row_stride(t) % 8 == 0 for t in sources
        )

    def numbers(self, vectors):
        """The entry's row of the table, in the order of its fields."""
        group = 8 if vectors else 1
        first, first_protected, first_tile = self.begin
        return [
            first,
            first_protected,
            _address(self.norm),
            _address(self.preserve),
            _address(self.weight),
            _row_stride(self.weight) // group,
            _address(self.base),
            0 if self.base is None else _row_stride(self.base) // group,
            _address(self.bits),
            _address(self.threshold),
            *self.weight.shape,
            launch.DTYPE_CODES[self.weight.dtype],
            first_tile,
            0,
            0,
        ]


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


def _row_stride(tensor):
    return 0 if tensor.shape[0] == 1 else tensor.stride(0)


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _to_device(numbers, device):
    table = torch.tensor(numbers, dtype=torch.int64)
    return table if device.type == "cpu" else table.to(device, non_blocking=True)
