"""The Triton kernels of ``triton_kernels``: any GPU that Triton supports, no compiler at install.

Tensors on the CPU are taken only where Triton's interpreter runs the kernels
(``TRITON_INTERPRET=1`` before the first import).
"""

import importlib.util
import os
import shutil
from collections.abc import Sequence

import torch
from torch import Tensor

from antidote_fast.backends import reference
from antidote_fast.selection import Selection, num_pruned

NAME = "triton"
_missing = None
if importlib.util.find_spec("triton") is None:
    _missing = "triton is not installed (pip install triton)"
else:
    try:
        from antidote_fast.backends.triton_kernels import (
            configs,
            cut,
            elementwise,
            groups,
            launch,
            norms,
            table,
        )
        from antidote_fast.backends.triton_kernels.operand import Operand
    except Exception as error:  # a triton that does not fit this Python or torch fails in many ways
        _missing = f"triton cannot be imported ({' '.join(str(error).split())[:200]})"

INTERPRETED = _missing is None and launch.is_interpreted(table.prune_rows_kernel)
DEVICE_TYPES = ("cpu",) if INTERPRETED else ("cuda", "xpu")


def unavailable() -> str | None:
    """Why this backend cannot run here, or None."""
    if _missing is not None:
        return _missing
    if INTERPRETED:
        return None
    for name in DEVICE_TYPES:
        module = getattr(torch, name, None)
        if module is not None and module.is_available():
            if name == "cuda" and torch.version.cuda and module.get_device_capability() < (8, 0):
                major, minor = module.get_device_capability()
                return f"the GPU has compute capability {major}.{minor}; 8.0 or later is needed"
            if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
                return (
                    "Triton builds its launcher at first use and finds no C compiler (gcc, clang)"
                )
            return None
    return "torch sees no GPU here (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly)"


def accumulate_sq_norm_(sq_sum: Tensor, x: Tensor, token_mask: Tensor | None) -> None:
    """As ``reference.accumulate_sq_norm_``."""
    norms.accumulate_sq_norm_(sq_sum, x, token_mask)


def score(weight: Tensor, act_norm: Tensor | None, base_weight: Tensor | None) -> Tensor:
    """As ``reference.score``."""
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    if not weight.numel():
        return out
    operand = Operand(weight, act_norm, base_weight)
    vec = operand.vec and out.data_ptr() % 16 == 0
    grid, sizes = _elementwise(weight)
    launch.run(
        elementwise.score_kernel,
        grid,
        operand.raw,
        operand.base,
        operand.norm,
        out,
        *operand.sizes(vec),
        operand.flags(),
        device=weight.device,
        num_warps=configs.ELEMENTWISE_WARPS,
        **sizes,
        DTYPE=operand.dtype_code,
        DELTA=base_weight is not None,
        VEC=vec,
    )
    return out


def apply_mask_(weight: Tensor, bits: Tensor, base_weight: Tensor | None) -> None:
    """As ``reference.apply_mask_``."""
    operand = Operand(weight, None, base_weight)
    grid, sizes = _elementwise(weight)
    launch.run(
        elementwise.apply_mask_kernel,
        grid,
        operand.raw,
        operand.base,
        bits,
        *operand.sizes(operand.vec),
        operand.flags(),
        device=weight.device,
        num_warps=configs.ELEMENTWISE_WARPS,
        **sizes,
        VEC=operand.vec,
    )


def select_mask(scores: Tensor, selection: Selection, bits: Tensor) -> None:
    """As ``reference.select_mask``."""
    operands = [Operand(scores, bits=bits, is_signed=True)]
    _prune(operands, selection, write=False)


def prune(
    weights: Sequence[Tensor],
    act_norms: Sequence[Tensor | None],
    selection: Selection,
    preserve_norms: Sequence[Tensor | None],
    base_weights: Sequence[Tensor | None],
    *,
    write: bool,
    bits: Sequence[Tensor] | None,
    thresholds: Sequence[Tensor] | None,
) -> None:
    """As ``reference.prune``."""
    operands = [
        Operand(
            weight,
            act_norms[i],
            base_weights[i],
            preserve_norms[i],
            None if bits is None else bits[i],
            None if thresholds is None else thresholds[i],
        )
        for i, weight in enumerate(weights)
    ]
    _prune(operands, selection, write=write)


def _prune(operands, selection, *, write):
    operands = [operand for operand in operands if operand.weight.numel()]
    if selection.n_m is not None:
        for operand in operands:
            _prune_groups(operand, selection, write=write)
    elif selection.scope == "row":
        _prune_rows(operands, selection, write=write)
    elif selection.scope == "tensor":
        for operand in operands:
            _prune_cut([operand], selection, write=write)
    else:
        _prune_cut(operands, selection, write=write)


def _last(n, selection):
    """How many of n come last in the order, so that removing them or the others is what is asked.

    The first k are all but the last n - k.
    """
    k = num_pruned(n, selection)
    return k if selection.largest else n - k


def _prune_rows(operands, selection, *, write):
    by_dtype = {}
    for operand in operands:
        by_dtype.setdefault(operand.dtype_code, []).append(operand)
    for members in by_dtype.values():
        if len(members) == 1:
            _prune_one(members[0], selection, write=write)
        else:
            _prune_tables(members, selection, write=write)


def _prune_one(operand, selection, *, write):
    """One matrix, from the arguments of one launch."""
    preserved = operand.preserve_norm is not None
    delta = selection.score_delta and operand.dtype_code != launch.SIGNED
    config = _row_config([operand], delta, preserved)
    m_preserve = num_pruned(operand.num_columns, selection.preserve) if preserved else 0
    in_parts = config is None
    if in_parts:
        config = configs.LONG_ROWS
        if _pressure([operand], delta, preserved):
            config = configs.LONG_ROWS_UNDER_PRESSURE
    programs = launch.num_programs(operand.device, config.programs_a_processor)
    launch.run(
        table.prune_rows_kernel,
        (min(programs, -(-operand.num_rows // config.rows)),),
        operand.raw,
        operand.base,
        operand.norm,
        operand.preserve,
        operand.bits,
        operand.thresholds,
        *operand.sizes(operand.vec),
        _last(operand.num_columns, selection),
        m_preserve,
        operand.flags(selection, write=write),
        device=operand.device,
        num_warps=config.num_warps,
        max_registers=config.max_registers,
        R=config.rows,
        G=config.groups,
        PARTS=in_parts,
        DTYPE=operand.dtype_code,
        DELTA=delta,
        PRESERVED=preserved,
        VEC=operand.vec,
    )


def _row_config(operands, delta, preserved, num_warps=None):
    """The RowConfig that serves all of these, or None where their rows are read in parts."""
    return configs.row_config(
        max(o.num_columns for o in operands),
        itemsize=operands[0].weight.element_size(),
        vec=_all_aligned(operands),
        pressure=_pressure(operands, delta, preserved),
        num_warps=num_warps,
    )


def _pressure(operands, delta, preserved):
    return configs.pressure(
        operands[0].dtype_code, vec=_all_aligned(operands), delta=delta, preserved=preserved
    )


def _prune_tables(operands, selection, *, write):
    """Many matrices of one dtype: one launch, or where they are big several that suit them better.

    Large matrices then have a launch each, the others one for each length of rows.
    """
    parts = {}
    is_big = sum(operand.weight.numel() for operand in operands) > configs.MERGED_WEIGHTS
    for operand in operands:
        if is_big and operand.weight.numel() >= configs.ALONE:
            _prune_one(operand, selection, write=write)
        else:
            length = configs.power_of_two(operand.num_columns) if is_big else None
            parts.setdefault(length, []).append(operand)
    for part in parts.values():
        for start in range(0, len(part), configs.MATRICES_A_LAUNCH):
            chunk = part[start : start + configs.MATRICES_A_LAUNCH]
            _prune_table(chunk, selection, write=write)


def _prune_table(operands, selection, *, write):
    """One launch over matrices of one dtype, of which each is of one of three kinds."""
    delta = selection.score_delta
    preserved = any(operand.preserve_norm is not None for operand in operands)
    lengths = [operand.num_columns for operand in operands]
    shared = _row_config(operands, delta, preserved)
    longest = None if shared is None else 8 * shared.groups
    if shared is None or min(lengths) <= configs.LONGEST_SHORT_ROW < max(lengths):
        shared = configs.mixed_config(
            lengths,
            pressure=_pressure(operands, delta, preserved),
        )
        longest = configs.LONGEST_MIXED_ROW
    else:
        shared = configs.table_config(shared)
        if shared is None:
            for operand in operands:
                _prune_one(operand, selection, write=write)
            return
    short = [o for o in operands if o.num_columns <= configs.LONGEST_SHORT_ROW]
    long = [o for o in operands if configs.LONGEST_SHORT_ROW < o.num_columns <= longest]
    parts = [o for o in operands if o.num_columns > longest]
    groups = {
        "G_SHORT": 0,
        "G_LONG": configs.power_of_two(-(-max(o.num_columns for o in long) // 8)) if long else 0,
        "G_PARTS": shared.groups if parts else 0,
    }
    rows_short = 0
    if short:
        config = _row_config(short, delta, preserved, shared.num_warps)
        rows_short, groups["G_SHORT"] = config.rows, config.groups
    entries, tiles = [], 0
    kinds = {table.SHORT.value: short, table.LONG.value: long, table.IN_PARTS.value: parts}
    for kind, members in kinds.items():
        vec = _all_aligned(members)
        for operand in members:
            entries.append(_entry(operand, selection, write, vec, tiles, kind))
            tiles += -(-operand.num_rows // (rows_short if kind == table.SHORT.value else 1))
    device = operands[0].device
    programs = launch.num_programs(device, shared.programs_a_processor)
    launch.run(
        table.prune_table_kernel,
        (min(programs, tiles),),
        torch.tensor(entries, dtype=torch.int64).to(device, non_blocking=True),
        len(operands),
        tiles,
        device=device,
        num_warps=shared.num_warps,
        max_registers=shared.max_registers,
        R_SHORT=rows_short,
        **groups,
        VEC_SHORT=_all_aligned(short),
        VEC_LONG=_all_aligned(long),
        VEC_PARTS=_all_aligned(parts),
        DTYPE=operands[0].dtype_code,
        DELTA=delta,
        PRESERVED=preserved,
        MATRICES=configs.power_of_two(len(operands)),
    )


def _all_aligned(operands):
    return all(operand.vec for operand in operands)


def _entry(operand, selection, write, vec, first_tile, kind):
    """A matrix as ``table.table_entry`` and the kernel read it."""
    m_preserve = 0
    if operand.preserve_norm is not None:
        m_preserve = num_pruned(operand.num_columns, selection.preserve)
    tensors = (
        operand.weight,
        operand.base_weight,
        operand.act_norm,
        operand.preserve_norm,
        operand.bits_out,
        operand.thresholds_out,
    )
    return [
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        *operand.sizes(vec),
        _last(operand.num_columns, selection),
        m_preserve,
        operand.flags(selection, write=write),
        first_tile,
        kind,
    ]


def _prune_groups(operand, selection, *, write):
    removed, size = selection.n_m
    columns = operand.num_columns
    tail = columns % size
    whole_last = removed if selection.largest else size - removed
    tail_last = tail * removed // size
    if not selection.largest:
        tail_last = tail - tail_last
    common = {
        "device": operand.device,
        "DTYPE": operand.dtype_code,
        "DELTA": selection.score_delta and operand.dtype_code != launch.SIGNED,
    }
    flags = operand.flags(selection, write=write)
    if size in (2, 4, 8, 16):
        width = max(size, 8)
        vec = operand.vec and columns % width == 0
        blocks = min(configs.SMALL_GROUP_BLOCKS, configs.power_of_two(-(-columns // width)))
        launch.run(
            groups.prune_small_groups_kernel,
            (operand.num_rows, -(-columns // (blocks * width))),
            operand.raw,
            operand.base,
            operand.norm,
            operand.bits,
            *operand.sizes(vec),
            whole_last,
            tail_last,
            flags,
            num_warps=configs.ELEMENTWISE_WARPS,
            B=blocks,
            M=size,
            VEC=vec,
            **common,
        )
        return
    block = 8 * configs.power_of_two(-(-min(size, columns) // 8))
    if block > configs.LONGEST_GROUP:  # larger groups than anybody prunes
        _prune_groups_with_torch(operand, selection, write=write)
        return
    marks = launch.absent(operand.device, torch.uint8)
    if operand.bits_out is not None:
        marks = torch.empty(operand.weight.shape, dtype=torch.uint8, device=operand.device)
    in_program = max(1, configs.GROUP_VALUES // block)
    number = operand.num_rows * -(-columns // size)
    launch.run(
        groups.prune_groups_kernel,
        (-(-number // in_program),),
        operand.raw,
        operand.base,
        operand.norm,
        marks,
        *operand.sizes(vec=False),
        whole_last,
        tail_last,
        flags,
        size,
        num_warps=16 if block > configs.GROUP_VALUES else 8,
        R=in_program,
        G=block // 8,
        **common,
    )
    if operand.bits_out is not None:
        operand.bits_out.copy_(reference.pack_bits(marks.bool()))


def _prune_groups_with_torch(operand, selection, *, write):
    if operand.dtype_code == launch.SIGNED:
        reference.select_mask(operand.weight, selection, operand.bits_out)
        return
    reference.prune(
        [operand.weight],
        [operand.act_norm],
        selection,
        [None],
        [operand.base_weight],
        write=write,
        bits=None if operand.bits_out is None else [operand.bits_out],
        thresholds=None,
    )


def _prune_cut(operands, selection, *, write):
    """One selection over all the operands together."""
    total = sum(operand.weight.numel() for operand in operands)
    protected = sum(o.weight.numel() for o in operands if o.preserve_norm is not None)
    first = operands[0]
    cut.prune_cut(
        [o.weight for o in operands],
        [o.act_norm for o in operands],
        num_pruned(total, selection),
        num_pruned(protected, selection.preserve) if protected else 0,
        [o.preserve_norm for o in operands],
        [o.base_weight for o in operands],
        largest=selection.largest,
        delta=selection.score_delta and first.dtype_code != launch.SIGNED,
        signed=first.dtype_code == launch.SIGNED,
        write=write,
        bits=None if first.bits_out is None else [o.bits_out for o in operands],
        thresholds=None if first.thresholds_out is None else [o.thresholds_out for o in operands],
    )


def _elementwise(weight):
    """(grid, block sizes) of a kernel that treats each weight alone."""
    groups_a_row = -(-weight.shape[1] // 8)
    in_program = min(configs.power_of_two(groups_a_row), configs.ELEMENTWISE_VALUES // 8)
    rows_a_program = configs.ELEMENTWISE_VALUES // (8 * in_program)
    grid = (-(-weight.shape[0] // rows_a_program), -(-groups_a_row // in_program))
    return grid, {"R": rows_a_program, "G": in_program}
