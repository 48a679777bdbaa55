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

from antidote_fast.backends import native, reference
from antidote_fast.backends.operand import Operand
from antidote_fast.selection import Selection

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
        from antidote_fast.backends.triton_kernels.matrix import Matrix
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
    matrix = Matrix(Operand(weight, act_norm, base_weight=base_weight))
    raw, base, norm, *_ = matrix.pointers()
    vec = matrix.vec and out.data_ptr() % 16 == 0
    _elementwise(
        elementwise.score_kernel,
        (raw, base, norm, out),
        matrix,
        vec,
        DTYPE=matrix.dtype_code,
        DELTA=base_weight is not None,
    )
    return out


def apply_mask_(weight: Tensor, bits: Tensor, base_weight: Tensor | None) -> None:
    """As ``reference.apply_mask_``."""
    matrix = Matrix(Operand(weight, base_weight=base_weight))
    raw, base, *_ = matrix.pointers()
    _elementwise(elementwise.apply_mask_kernel, (raw, base, bits), matrix, matrix.vec)


def _elementwise(kernel, pointers, matrix, vec, **constants):
    """Launch a kernel that treats each weight alone."""
    groups_a_row = -(-matrix.num_columns // 8)
    in_program = min(configs.power_of_two(groups_a_row), configs.ELEMENTWISE_VALUES // 8)
    rows_a_program = configs.ELEMENTWISE_VALUES // (8 * in_program)
    launch.run(
        kernel,
        (-(-matrix.num_rows // rows_a_program), -(-groups_a_row // in_program)),
        *pointers,
        *matrix.sizes(vec),
        matrix.flags(),
        device=matrix.device,
        num_warps=configs.ELEMENTWISE_WARPS,
        R=rows_a_program,
        G=in_program,
        VEC=vec,
        **constants,
    )


def select_mask(scores: Tensor, selection: Selection, bits: Tensor) -> None:
    """As ``reference.select_mask``."""
    _prune([Matrix(Operand(scores, bits=bits), is_signed=True)], selection, write=False)


def prune(operands: Sequence[Operand], selection: Selection, *, write: bool) -> None:
    """As ``reference.prune``."""
    _prune([Matrix(o) for o in operands if o.weight.numel()], selection, write=write)


def _prune(matrices, selection, *, write):
    if selection.n_m is not None:
        for matrix in matrices:
            _prune_groups(matrix, selection, write=write)
    elif selection.scope == "row":
        _prune_rows(matrices, selection, write=write)
    elif selection.scope == "tensor":
        for matrix in matrices:
            cut.prune_cut([matrix], selection, write=write)
    else:
        cut.prune_cut(matrices, selection, write=write)


def _prune_rows(matrices, selection, *, write):
    by_dtype = {}
    for matrix in matrices:
        by_dtype.setdefault(matrix.dtype_code, []).append(matrix)
    for members in by_dtype.values():
        if len(members) == 1:
            _prune_one(members[0], selection, write=write)
        else:
            _prune_tables(members, selection, write=write)


def _prune_one(matrix, selection, *, write):
    """One matrix, from the arguments of one launch."""
    preserved = matrix.operand.preserve_norm is not None
    delta = matrix.delta(selection)
    config = _row_config([matrix], delta, preserved)
    in_parts = config is None
    if in_parts:
        pressed = _pressure([matrix], delta, preserved)
        config = configs.LONG_ROWS_UNDER_PRESSURE if pressed else configs.LONG_ROWS
    programs = launch.num_programs(matrix.device, config.programs_a_processor)
    launch.run(
        table.prune_rows_kernel,
        (min(programs, -(-matrix.num_rows // config.rows)),),
        *matrix.pointers(),
        *matrix.row_sizes(selection, matrix.vec, write=write),
        device=matrix.device,
        num_warps=config.num_warps,
        max_registers=config.max_registers,
        R=config.rows,
        G=config.groups,
        PARTS=in_parts,
        DTYPE=matrix.dtype_code,
        DELTA=delta,
        PRESERVED=preserved,
        VEC=matrix.vec,
    )


def _row_config(matrices, delta, preserved, num_warps=None):
    """The RowConfig that serves all of these, or None where their rows are read in parts."""
    return configs.row_config(
        max(o.num_columns for o in matrices),
        itemsize=matrices[0].operand.weight.element_size(),
        vec=_all_aligned(matrices),
        pressure=_pressure(matrices, delta, preserved),
        num_warps=num_warps,
    )


def _pressure(matrices, delta, preserved):
    return configs.pressure(
        matrices[0].dtype_code, vec=_all_aligned(matrices), delta=delta, preserved=preserved
    )


def _prune_tables(matrices, selection, *, write):
    """Many matrices of one dtype: one launch, or where they are big several that suit them better.

    Large matrices then have a launch each, the others one for each length of rows.
    """
    parts = {}
    is_big = sum(matrix.operand.weight.numel() for matrix in matrices) > configs.MERGED_WEIGHTS
    for matrix in matrices:
        if is_big and matrix.operand.weight.numel() >= configs.ALONE:
            _prune_one(matrix, selection, write=write)
        else:
            length = configs.power_of_two(matrix.num_columns) if is_big else None
            parts.setdefault(length, []).append(matrix)
    for part in parts.values():
        for start in range(0, len(part), configs.MATRICES_A_LAUNCH):
            chunk = part[start : start + configs.MATRICES_A_LAUNCH]
            _prune_table(chunk, selection, write=write)


def _prune_table(matrices, selection, *, write):
    """One launch over matrices of one dtype, of which each is of one of three kinds."""
    delta = selection.score_delta
    preserved = any(matrix.operand.preserve_norm is not None for matrix in matrices)
    lengths = [matrix.num_columns for matrix in matrices]
    shared = _row_config(matrices, delta, preserved)
    longest = None if shared is None else 8 * shared.groups
    if shared is None or min(lengths) <= configs.LONGEST_SHORT_ROW < max(lengths):
        shared = configs.mixed_config(lengths, pressure=_pressure(matrices, delta, preserved))
        longest = configs.LONGEST_MIXED_ROW
    else:
        shared = configs.table_config(shared)
        if shared is None:
            for matrix in matrices:
                _prune_one(matrix, selection, write=write)
            return
    short = [o for o in matrices if o.num_columns <= configs.LONGEST_SHORT_ROW]
    long = [o for o in matrices if configs.LONGEST_SHORT_ROW < o.num_columns <= longest]
    parts = [o for o in matrices if o.num_columns > longest]
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
        for matrix in members:
            entries.append(_entry(matrix, selection, write, vec, tiles, kind))
            tiles += -(-matrix.num_rows // (rows_short if kind == table.SHORT.value else 1))
    device = matrices[0].device
    programs = launch.num_programs(device, shared.programs_a_processor)
    launch.run(
        table.prune_table_kernel,
        (min(programs, tiles),),
        torch.tensor(entries, dtype=torch.int64).to(device, non_blocking=True),
        len(matrices),
        tiles,
        device=device,
        num_warps=shared.num_warps,
        max_registers=shared.max_registers,
        R_SHORT=rows_short,
        **groups,
        VEC_SHORT=_all_aligned(short),
        VEC_LONG=_all_aligned(long),
        VEC_PARTS=_all_aligned(parts),
        DTYPE=matrices[0].dtype_code,
        DELTA=delta,
        PRESERVED=preserved,
        MATRICES=configs.power_of_two(len(matrices)),
    )


def _all_aligned(matrices):
    return all(matrix.vec for matrix in matrices)


def _entry(matrix, selection, write, vec, first_tile, kind):
    """A matrix as ``table.table_entry`` and the kernel read it."""
    o = matrix.operand
    tensors = o.weight, o.base_weight, o.act_norm, o.preserve_norm, o.bits, o.thresholds
    sizes = matrix.row_sizes(selection, vec, write=write)
    return [*map(native.address, tensors), *sizes, first_tile, kind]


def _prune_groups(matrix, selection, *, write):
    removed, size = selection.n_m
    columns = matrix.num_columns
    tail = columns % size
    whole_last, tail_last = removed, tail * removed // size
    if not selection.largest:
        whole_last, tail_last = size - whole_last, tail - tail_last
    raw, base, norm, _, bits, _ = matrix.pointers()

    def start(kernel, grid, out, vec, *more, **options):
        launch.run(
            kernel,
            grid,
            raw,
            base,
            norm,
            out,
            *matrix.sizes(vec),
            whole_last,
            tail_last,
            matrix.flags(selection, write=write),
            *more,
            device=matrix.device,
            DTYPE=matrix.dtype_code,
            DELTA=matrix.delta(selection),
            **options,
        )

    if size in (2, 4, 8, 16):
        width = max(size, 8)
        vec = matrix.vec and columns % width == 0
        blocks = min(configs.SMALL_GROUP_BLOCKS, configs.power_of_two(-(-columns // width)))
        grid = matrix.num_rows, -(-columns // (blocks * width))
        constants = {"num_warps": configs.ELEMENTWISE_WARPS, "B": blocks, "M": size, "VEC": vec}
        start(groups.prune_small_groups_kernel, grid, bits, vec, **constants)
        return
    block = 8 * configs.power_of_two(-(-min(size, columns) // 8))
    if block > configs.LONGEST_GROUP:  # larger groups than anybody prunes
        if matrix.dtype_code == launch.SIGNED:
            reference.select_mask(matrix.operand.weight, selection, bits)
        else:
            reference.prune([matrix.operand], selection, write=write)
        return
    wants_bits = matrix.operand.bits is not None
    marks = bits.new_empty(matrix.operand.weight.shape) if wants_bits else bits
    in_program = max(1, configs.GROUP_VALUES // block)
    grid = (-(-matrix.num_rows * -(-columns // size) // in_program),)
    warps = 16 if block > configs.GROUP_VALUES else 8
    constants = {"num_warps": warps, "R": in_program, "G": block // 8}
    start(groups.prune_groups_kernel, grid, marks, False, size, **constants)
    if wants_bits:
        bits.copy_(reference.pack_bits(marks.bool()))
