// Rows with AVX-512 F, BW, DQ and VL (Skylake-SP and later, Zen 4 and later).
//
// Nothing from the standard library is instantiated here: a template compiled for AVX-512 could be
// the copy that the linker keeps for the whole extension.

#include "rows.h"

#ifdef ANTIDOTE_X86
#include <immintrin.h>

#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 on its own intrinsics' headers
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,popcnt")
#endif

namespace antidote::cpu {
namespace {

struct Floats {
  __m512 a, b;  // bf16: even and odd columns; else the first and the last 16
};

template <DType dtype>
inline Floats load(const void* data, int64_t column) {
  if constexpr (dtype == DType::kFp32) {
    const float* p = static_cast<const float*>(data) + column;
    return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)};
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(data) + column;
    __m512i v = _mm512_loadu_si512(p);
    if constexpr (dtype == DType::kFp16) {
      return {_mm512_cvtph_ps(_mm512_castsi512_si256(v)),
              _mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1))};
    }
    return {
        _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)),
        _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))))};
  }
}

struct Bits {
  __m512i a, b;
};

// The bits of w * n, or of (w - base) * n, sign and NaN as they come.
template <DType dtype, bool delta>
inline Bits products(const void* weight, const void* base, const float* norm, int64_t column) {
  Floats w = load<dtype>(weight, column);
  if constexpr (delta) {
    Floats from = load<dtype>(base, column);
    w.a = _mm512_sub_ps(w.a, from.a);
    w.b = _mm512_sub_ps(w.b, from.b);
  }
  return {_mm512_castps_si512(_mm512_mul_ps(w.a, _mm512_loadu_ps(norm + column))),
          _mm512_castps_si512(_mm512_mul_ps(w.b, _mm512_loadu_ps(norm + column + 16)))};
}

inline __m512i high_halves(Bits bits) {  // in-order halves: 32 x 16 bits
  const __m512i odd =
      _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                       25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(bits.a, odd, bits.b);
}

template <DType dtype, bool delta>
inline void block16(const void* weight, const void* base, const float* norm, int64_t column,
                    int16_t* keys) {
  Bits bits = products<dtype, delta>(weight, base, norm, column);
  __m512i key;
  if constexpr (dtype == DType::kBf16) {
    // Every second bit pattern from b, the others from a moved down: (mask & b) | (a >> 16).
    key = _mm512_ternarylogic_epi32(_mm512_set1_epi32(static_cast<int>(0xFFFF0000u)), bits.b,
                                    _mm512_srli_epi32(bits.a, 16), 0xEA);
  } else {
    key = high_halves(bits);
  }
  key = _mm512_and_si512(key, _mm512_set1_epi16(0x7FFF));
  key = _mm512_min_epu16(key, _mm512_set1_epi16(kCanonicalNan >> 16));
  _mm512_storeu_si512(keys, key);
}

inline __m512i score_keys(__m512i bits) {
  bits = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
  __mmask16 nan = _mm512_cmpgt_epi32_mask(bits, _mm512_set1_epi32(0x7F800000));
  return _mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(kCanonicalNan));
}

template <DType dtype, bool delta>
inline void block32(const void* weight, const void* base, const float* norm, int64_t column,
                    int32_t* keys) {
  Bits bits = products<dtype, delta>(weight, base, norm, column);
  __m512i a = score_keys(bits.a), b = score_keys(bits.b);
  if constexpr (dtype == DType::kBf16) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high =
        _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
    __m512i first = _mm512_permutex2var_epi32(a, low, b);
    b = _mm512_permutex2var_epi32(a, high, b);
    a = first;
  }
  _mm512_storeu_si512(keys, a);
  _mm512_storeu_si512(keys + 16, b);
}

inline __m512i signed_keys(__m512i bits) {
  __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
  __mmask16 nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7F800000));
  __mmask16 negative = _mm512_movepi32_mask(bits);
  __m512i keys = _mm512_mask_xor_epi32(bits, negative, bits, _mm512_set1_epi32(0x7FFFFFFF));
  keys = _mm512_mask_mov_epi32(keys, _mm512_testn_epi32_mask(magnitude, magnitude),
                               _mm512_setzero_si512());
  return _mm512_mask_mov_epi32(keys, nan, _mm512_set1_epi32(kCanonicalNan));
}

inline Bits signed_block(const void* weight, int64_t column) {
  const int32_t* p = static_cast<const int32_t*>(weight) + column;
  return {signed_keys(_mm512_loadu_si512(p)), signed_keys(_mm512_loadu_si512(p + 16))};
}

inline void signed_block16(const void* weight, int64_t column, int16_t* keys) {
  _mm512_storeu_si512(keys, high_halves(signed_block(weight, column)));
}

inline void signed_block32(const void* weight, int64_t column, int32_t* keys) {
  Bits bits = signed_block(weight, column);
  _mm512_storeu_si512(keys, bits.a);
  _mm512_storeu_si512(keys + 16, bits.b);
}

inline __m512i all16(int16_t value) { return _mm512_set1_epi16(value); }
inline __m512i all32(int32_t value) { return _mm512_set1_epi32(value); }

inline uint32_t above16(const int16_t* keys, __m512i threshold) {
  return _mm512_cmpgt_epi16_mask(_mm512_loadu_si512(keys), threshold);
}

inline uint32_t above32(const int32_t* keys, __m512i threshold) {
  uint32_t first = _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(keys), threshold);
  uint32_t last = _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(keys + 16), threshold);
  return first | last << 16;
}

// Only vectors with a mark are stored, so that a clean cache line stays clean.
void remove(const uint32_t* marks, int64_t columns, DType dtype, void* weight, const void* base) {
  for (int64_t b = 0; b < num_blocks(columns); ++b) {
    uint32_t mark = marks[b];
    if (mark == 0) continue;
    if (dtype == DType::kFp32) {
      uint32_t* to = static_cast<uint32_t*>(weight) + b * kBlock;
      const uint32_t* from = static_cast<const uint32_t*>(base) + (base ? b * kBlock : 0);
      for (int half = 0; half < 2; ++half, mark >>= 16) {
        __mmask16 m = static_cast<__mmask16>(mark);
        __m512i value =
            base ? _mm512_maskz_loadu_epi32(m, from + half * 16) : _mm512_setzero_si512();
        _mm512_mask_storeu_epi32(to + half * 16, m, value);
      }
    } else {
      uint16_t* to = static_cast<uint16_t*>(weight) + b * kBlock;
      const uint16_t* from = static_cast<const uint16_t*>(base) + (base ? b * kBlock : 0);
      __m512i value = base ? _mm512_maskz_loadu_epi16(mark, from) : _mm512_setzero_si512();
      _mm512_mask_storeu_epi16(to, mark, value);
    }
  }
}

template <DType dtype>
void typed_add_squares(const void* const* rows, int64_t num_rows, int64_t columns, double* sums) {
  using Item = typename std::conditional<dtype == DType::kFp32, float, uint16_t>::type;
  int64_t whole = columns / 16 * 16;
  for (int64_t c = 0; c < whole; c += 16) {
    __m512d low = _mm512_loadu_pd(sums + c), high = _mm512_loadu_pd(sums + c + 8);
    for (int64_t r = 0; r < num_rows; ++r) {
      const Item* p = static_cast<const Item*>(rows[r]) + c;
      __m512 x;
      if constexpr (dtype == DType::kFp32) {
        x = _mm512_loadu_ps(p);
      } else {
        __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        if constexpr (dtype == DType::kFp16) {
          x = _mm512_cvtph_ps(half);
        } else {
          x = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        }
      }
      __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
      __m512d b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
      low = _mm512_fmadd_pd(a, a, low);  // a square of 24 bits is exact in 53: fused or not
      high = _mm512_fmadd_pd(b, b, high);
    }
    _mm512_storeu_pd(sums + c, low);
    _mm512_storeu_pd(sums + c + 8, high);
  }
  add_tail_squares(rows, num_rows, whole, columns, dtype, sums);
}

#include "rows_x86.inc"

}  // namespace

const Rows kRowsAvx512 = {"avx512", 16,          keys16, keys32,     mark16,
                          mark32,   last_of_few, remove, add_squares};

}  // namespace antidote::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
