"""What the kernels of tensor and global scope read: a table of tensors, and tiles of them.

All tensors of a list are one sequence of tiles: a tile is ``GROUPS`` groups of 8 columns that
follow each other in flat order, across rows where rows are short, so one tile size serves every
shape. A program takes a stretch of tiles, the same one in every pass; that is what makes the order
of ties known without a count for each tile.
"""

import triton
import triton.language as tl

from antidote_fast.backends.triton_kernels import keys

MIXED = tl.constexpr(4)  # DTYPE of a list that holds several: each tensor's own is in the table

# The table of int64 on the device: a header, a row a tensor, and a row that only ends the tiles.
TENSORS = tl.constexpr(0)
TILES = tl.constexpr(1)
TAKEN = tl.constexpr(2)  # how many of the last each selection takes: itself, then the protected
TOTAL = tl.constexpr(4)  # of how many
FLAGS = tl.constexpr(6)
HEADER = tl.constexpr(8)

FIRST = tl.constexpr(0)  # weights of the tensors before, in each of the two selections
NORM = tl.constexpr(2)  # addresses of both norms, 0 where absent
W = tl.constexpr(4)
W_STRIDE = tl.constexpr(5)  # of rows; in groups of 8 columns where VEC, as is the base's
BASE = tl.constexpr(6)
BASE_STRIDE = tl.constexpr(7)
BITS = tl.constexpr(8)
THRESHOLDS = tl.constexpr(9)
ROWS = tl.constexpr(10)
COLUMNS = tl.constexpr(11)
CODE = tl.constexpr(12)  # of the dtype
FIRST_TILE = tl.constexpr(13)
FIELDS = tl.constexpr(16)

# Flags.
WRITE = tl.constexpr(1)
SMALLEST = tl.constexpr(2)  # what the last m leave is removed
WANT_BITS = tl.constexpr(4)
WANT_EDGE = tl.constexpr(8)  # the largest key removed


@triton.jit
def only_if(present, condition):
    """``present & condition`` of a tile and a scalar; the interpreter gets that wrong as a mask."""
    return present & ((tl.full(present.shape, 0, tl.int32) + condition.to(tl.int32)) != 0)


@triton.jit
def pointer(address, KIND: tl.constexpr, VEC: tl.constexpr):
    """The address as a pointer; aligned to 16 bytes where VEC."""
    result = address.to(tl.pointer_type(KIND))
    if VEC:
        result = tl.multiple_of(result, 16)
    return result


@triton.jit
def offset_of(row, stride, column, VEC: tl.constexpr):
    """Where elements are, from the address of their tensor."""
    offset = row.to(tl.int64) * stride
    if VEC:  # a product, so that the compiler sees the alignment; a hint is lost in inlining
        offset = offset * 8
    return offset + column


@triton.jit
def load_raw(address, row, stride, column, present, code, DTYPE: tl.constexpr, VEC: tl.constexpr):
    """Bits of elements: int16 or int32 by DTYPE; int32 where MIXED."""
    offset = offset_of(row, stride, column, VEC)
    if DTYPE == MIXED:
        if code == keys.FP32:
            raw = tl.load(pointer(address, tl.int32, VEC) + offset, mask=present, other=0)
        else:
            half = tl.load(pointer(address, tl.int16, VEC) + offset, mask=present, other=0)
            raw = half.to(tl.int32)
    elif DTYPE <= keys.FP16:
        raw = tl.load(pointer(address, tl.int16, VEC) + offset, mask=present, other=0)
    else:
        raw = tl.load(pointer(address, tl.int32, VEC) + offset, mask=present, other=0)
    return raw


@triton.jit
def store_raw(address, row, stride, column, raw, touched, code, DTYPE, VEC: tl.constexpr):
    """The way back of :func:`load_raw`."""
    offset = offset_of(row, stride, column, VEC)
    if DTYPE == MIXED:
        if code == keys.FP32:
            tl.store(pointer(address, tl.int32, VEC) + offset, raw, mask=touched)
        else:
            half = raw.to(tl.int16)
            tl.store(pointer(address, tl.int16, VEC) + offset, half, mask=touched)
    elif DTYPE <= keys.FP16:
        tl.store(pointer(address, tl.int16, VEC) + offset, raw, mask=touched)
    else:
        tl.store(pointer(address, tl.int32, VEC) + offset, raw, mask=touched)


@triton.jit
def load_keys(raw, base, address, column, present, code, DTYPE: tl.constexpr, DELTA, VEC):
    """Keys by the norm at ``address`` (1.0 where it is 0); keys.PAD where nothing is present."""
    if DTYPE == keys.SIGNED:
        key = keys.keys_of(raw, base, 1.0, DTYPE, DELTA)
    else:
        norms = pointer(address, tl.float32, VEC)
        some = only_if(present, address != 0)
        norm = tl.load(norms + column, mask=some, other=1.0)
        if DTYPE == MIXED:
            if code == keys.FP32:
                key = keys.keys_of(raw, base, norm, keys.FP32, DELTA)
            else:
                short, short_base = raw.to(tl.int16), base.to(tl.int16)
                if code == keys.BF16:
                    key = keys.keys_of(short, short_base, norm, keys.BF16, DELTA)
                else:
                    key = keys.keys_of(short, short_base, norm, keys.FP16, DELTA)
        else:
            key = keys.keys_of(raw, base, norm, DTYPE, DELTA)
    return tl.where(present, key, keys.PAD)


@triton.jit
def entry_of(table, tensor):
    """Where a tensor's row of the table begins; of one tensor or a tile of them."""
    return table + HEADER + tensor.to(tl.int64) * FIELDS


@triton.jit
def operands_of(entry):
    """(columns, code, weight, its stride, base, its stride, norm, preserve norm) of a tensor."""
    columns, code = tl.load(entry + COLUMNS), tl.load(entry + CODE)
    weight, weight_stride = tl.load(entry + W), tl.load(entry + W_STRIDE)
    base, base_stride = tl.load(entry + BASE), tl.load(entry + BASE_STRIDE)
    norm, preserve = tl.load(entry + NORM), tl.load(entry + NORM + 1)
    return columns, code, weight, weight_stride, base, base_stride, norm, preserve


@triton.jit
def last_not_above(table, tensors, field, value):
    """The last tensor whose ``field`` is <= value; of one value or a tile of them."""
    low = value.to(tl.int32) * 0
    high = low + tensors.to(tl.int32)
    steps = tensors
    while steps > 0:
        middle = (low + high) // 2
        begin = tl.load(table + HEADER + middle.to(tl.int64) * FIELDS + field)
        low = tl.where(begin <= value, middle, low)
        high = tl.where(begin <= value, high, middle)
        steps = steps // 2
    return low


@triton.jit
def stretch(table):
    """The tiles of this program, [first, last)."""
    tiles = tl.load(table + TILES).to(tl.int32)
    program = tl.program_id(0)
    share, rest = tiles // tl.num_programs(0), tiles % tl.num_programs(0)
    first = program * share + tl.minimum(program, rest)
    return first, first + share + (program < rest).to(tl.int32)


@triton.jit
def tensor_at(table, tensor, tile, last, GROUPS: tl.constexpr):
    """Of the tensor in which ``tile`` lies: where the tile begins, and where its tiles end.

    Returns (groups a row, groups left from the tile on, its row, its group in the row, end).
    """
    entry = entry_of(table, tensor)
    groups = ((tl.load(entry + COLUMNS) + 7) // 8).to(tl.int32)
    number = tile - tl.load(entry + FIRST_TILE).to(tl.int32)
    left = tl.load(entry + ROWS) * groups - number.to(tl.int64) * GROUPS
    left = tl.minimum(left, keys.MAX_KEY).to(tl.int32)  # more than a stretch holds of one tensor
    end = tl.minimum(last, tl.load(entry + FIELDS + FIRST_TILE).to(tl.int32))
    # In 32 bits, for up to 2^24 tiles: a division of 64 bits is a call, and takes a stack.
    rest = (number * (GROUPS % groups)).to(tl.uint32, bitcast=True)
    over = rest // groups.to(tl.uint32, bitcast=True)
    group = (rest - over * groups.to(tl.uint32, bitcast=True)).to(tl.int32, bitcast=True)
    row = number.to(tl.int64) * (GROUPS // groups) + over.to(tl.int64)
    return groups, left, row, group, end


@triton.jit
def next_place(row, group, groups, GROUPS: tl.constexpr):
    """Where the next tile begins: no division that a loop would repeat."""
    group += GROUPS % groups
    over = group >= groups
    return row + GROUPS // groups + over.to(tl.int32), tl.where(over, group - groups, group)


@triton.jit
def tile_at(row, group, groups, left, columns, GROUPS: tl.constexpr, VEC: tl.constexpr):
    """Rows [GROUPS, 1], columns and which are of the tensor [GROUPS, 8], of a tile."""
    ahead = group + tl.arange(0, GROUPS)
    rows = (ahead.to(tl.float32) * (1.0 / groups.to(tl.float32))).to(tl.int32)
    rows -= (rows * groups > ahead).to(tl.int32)  # the product is not exact
    rows += (rows * groups + groups <= ahead).to(tl.int32)
    first = ((ahead - rows * groups) * 8)[:, None]
    column = first + tl.arange(0, 8)[None, :]
    present = (tl.arange(0, GROUPS) < left)[:, None]
    present = tl.broadcast_to(present, (GROUPS, 8)) if VEC else present & (column < columns)
    return (row + rows)[:, None], column, present
