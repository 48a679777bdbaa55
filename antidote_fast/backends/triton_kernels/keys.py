"""What a score is as an integer, as ``csrc/selection.h`` says it; shared by every kernel.

Weights are loaded as raw int16 or int32. A key is an int32 that orders as its score does: sign
dropped, every NaN the canonical one, above infinity. ``PAD`` is below every key.
"""

import triton
import triton.language as tl

BF16 = tl.constexpr(0)
FP16 = tl.constexpr(1)
FP32 = tl.constexpr(2)
SIGNED = tl.constexpr(3)  # fp32 scores of any sign, in signed order: select_mask

PAD = tl.constexpr(-0x80000000)
MAX_KEY = tl.constexpr(0x7FFFFFFF)
CANONICAL_NAN = tl.constexpr(0x7FC00000)
INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def to_float(raw, DTYPE: tl.constexpr):
    """The fp32 value of raw bits, exactly; denormals and NaN included."""
    if DTYPE == BF16:
        value = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == FP16:
        value = raw.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = raw.to(tl.float32, bitcast=True)
    return value


@triton.jit
def keys_of(raw, base, norm, DTYPE: tl.constexpr, DELTA: tl.constexpr):
    """Keys of ``| |w| * n |``, or with DELTA of ``|w - base| * n``.

    Args:
        raw, base: bits of the weight and, with DELTA, of its base.
        norm: fp32; 1.0 where there is none, which multiplies exactly. Not used where SIGNED.
    """
    if DTYPE == SIGNED:
        key = tl.where(raw < 0, raw ^ MAX_KEY, raw)
        key = tl.where(raw == PAD, 0, key)  # -0 equals +0
        key = tl.where((raw & MAX_KEY) > INFINITY, CANONICAL_NAN, key)
    else:
        value = to_float(raw, DTYPE)
        if DELTA:
            value = value - to_float(base, DTYPE)
        bits = (tl.abs(value) * norm).to(tl.int32, bitcast=True) & MAX_KEY
        key = tl.where(bits > INFINITY, CANONICAL_NAN, bits)
    return key


@triton.jit
def score_of_key(key):
    """The fp32 score of a key that is not SIGNED."""
    return key.to(tl.float32, bitcast=True)
