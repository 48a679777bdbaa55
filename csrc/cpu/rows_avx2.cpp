// Rows with AVX2, F16C and FMA (Haswell and later, Zen and later).
//
// Nothing from the standard library is instantiated here: a template compiled for AVX2 could be
// the copy that the linker keeps for the whole extension.

#include "rows.h"

#ifdef ANTIDOTE_X86
#include <immintrin.h>

#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c,fma,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c,fma,popcnt")
#endif

namespace antidote::cpu {
namespace {

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store256(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

struct Bits {
  __m256i a, b;  // bf16: even and odd columns of 16; else the first and the last 8
};

template <DType dtype>
inline Bits load(const void* data, int64_t column) {
  if constexpr (dtype == DType::kFp32) {
    const float* p = static_cast<const float*>(data) + column;
    return {load256(p), load256(p + 8)};
  } else {
    __m256i v = load256(static_cast<const uint16_t*>(data) + column);
    if constexpr (dtype == DType::kFp16) {
      return {_mm256_castps_si256(_mm256_cvtph_ps(_mm256_castsi256_si128(v))),
              _mm256_castps_si256(_mm256_cvtph_ps(_mm256_extracti128_si256(v, 1)))};
    }
    return {_mm256_slli_epi32(v, 16),
            _mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u)))};
  }
}

// The bits of w * n, or of (w - base) * n, without the sign.
template <DType dtype, bool delta>
inline Bits products(const void* weight, const void* base, const float* norm, int64_t column) {
  Bits w = load<dtype>(weight, column);
  __m256 a = _mm256_castsi256_ps(w.a), b = _mm256_castsi256_ps(w.b);
  if constexpr (delta) {
    Bits from = load<dtype>(base, column);
    a = _mm256_sub_ps(a, _mm256_castsi256_ps(from.a));
    b = _mm256_sub_ps(b, _mm256_castsi256_ps(from.b));
  }
  const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
  a = _mm256_mul_ps(a, _mm256_loadu_ps(norm + column));
  b = _mm256_mul_ps(b, _mm256_loadu_ps(norm + column + 8));
  return {_mm256_and_si256(_mm256_castps_si256(a), magnitude),
          _mm256_and_si256(_mm256_castps_si256(b), magnitude)};
}

inline __m256i in_order(__m256i packed) { return _mm256_permute4x64_epi64(packed, 0xD8); }

template <DType dtype, bool delta>
inline void block16(const void* weight, const void* base, const float* norm, int64_t column,
                    int16_t* keys) {
  for (int half = 0; half < 2; ++half, column += 16, keys += 16) {
    Bits bits = products<dtype, delta>(weight, base, norm, column);
    __m256i a = _mm256_srli_epi32(bits.a, 16), key;
    if constexpr (dtype == DType::kBf16) {
      key = _mm256_blend_epi16(a, bits.b, 0xAA);
    } else {
      key = in_order(_mm256_packus_epi32(a, _mm256_srli_epi32(bits.b, 16)));
    }
    store256(keys, _mm256_min_epu16(key, _mm256_set1_epi16(kCanonicalNan >> 16)));
  }
}

inline __m256i canonical(__m256i magnitude) {
  __m256i nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7F800000));
  return _mm256_blendv_epi8(magnitude, _mm256_set1_epi32(kCanonicalNan), nan);
}

template <DType dtype, bool delta>
inline void block32(const void* weight, const void* base, const float* norm, int64_t column,
                    int32_t* keys) {
  for (int half = 0; half < 2; ++half, column += 16, keys += 16) {
    Bits bits = products<dtype, delta>(weight, base, norm, column);
    __m256i a = canonical(bits.a), b = canonical(bits.b);
    if constexpr (dtype == DType::kBf16) {
      __m256i low = _mm256_unpacklo_epi32(a, b), high = _mm256_unpackhi_epi32(a, b);
      a = _mm256_permute2x128_si256(low, high, 0x20);
      b = _mm256_permute2x128_si256(low, high, 0x31);
    }
    store256(keys, a);
    store256(keys + 8, b);
  }
}

inline __m256i signed_keys(const int32_t* p) {
  __m256i bits = load256(p);
  __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
  __m256i flip = _mm256_srli_epi32(_mm256_srai_epi32(bits, 31), 1);
  __m256i keys = _mm256_xor_si256(bits, flip);
  keys = _mm256_andnot_si256(_mm256_cmpeq_epi32(magnitude, _mm256_setzero_si256()), keys);
  __m256i nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7F800000));
  return _mm256_blendv_epi8(keys, _mm256_set1_epi32(kCanonicalNan), nan);
}

inline void signed_block16(const void* weight, int64_t column, int16_t* keys) {
  const int32_t* p = static_cast<const int32_t*>(weight) + column;
  for (int half = 0; half < 2; ++half, p += 16, keys += 16) {
    __m256i a = _mm256_srai_epi32(signed_keys(p), 16);
    __m256i b = _mm256_srai_epi32(signed_keys(p + 8), 16);
    store256(keys, in_order(_mm256_packs_epi32(a, b)));
  }
}

inline void signed_block32(const void* weight, int64_t column, int32_t* keys) {
  const int32_t* p = static_cast<const int32_t*>(weight) + column;
  for (int part = 0; part < 4; ++part) store256(keys + part * 8, signed_keys(p + part * 8));
}

inline __m256i all16(int16_t value) { return _mm256_set1_epi16(value); }
inline __m256i all32(int32_t value) { return _mm256_set1_epi32(value); }

inline uint32_t above16(const int16_t* keys, __m256i threshold) {
  __m256i a = _mm256_cmpgt_epi16(load256(keys), threshold);
  __m256i b = _mm256_cmpgt_epi16(load256(keys + 16), threshold);
  return static_cast<uint32_t>(_mm256_movemask_epi8(in_order(_mm256_packs_epi16(a, b))));
}

inline uint32_t above32(const int32_t* keys, __m256i threshold) {
  uint32_t word = 0;
  for (int part = 0; part < 4; ++part) {
    __m256i above = _mm256_cmpgt_epi32(load256(keys + part * 8), threshold);
    word |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(above))) << (part * 8);
  }
  return word;
}

// Only vectors with a mark are stored, so that a clean cache line stays clean. AVX2 has no masked
// store of 16-bit items: whole blocks are rewritten, the last columns go one by one.
void remove(const uint32_t* marks, int64_t columns, DType dtype, void* weight, const void* base) {
  int64_t size = item_size(dtype);
  char* to = static_cast<char*>(weight);
  const char* from = static_cast<const char*>(base);
  const __m256i bit16 =
      _mm256_set_epi16(INT16_MIN, 1 << 14, 1 << 13, 1 << 12, 1 << 11, 1 << 10, 1 << 9, 1 << 8,
                       1 << 7, 1 << 6, 1 << 5, 1 << 4, 1 << 3, 1 << 2, 1 << 1, 1);
  const __m256i bit32 = _mm256_set_epi32(1 << 7, 1 << 6, 1 << 5, 1 << 4, 1 << 3, 1 << 2, 1 << 1, 1);
  int64_t per_vector = 32 / size;
  for (int64_t c = 0; c < columns; c += per_vector) {
    uint32_t mark = marks[c / kBlock] >> (c % kBlock);
    if (per_vector < kBlock) mark &= (1u << per_vector) - 1;
    if (mark == 0) continue;
    if (c + per_vector > columns) {
      for (; mark != 0; mark &= mark - 1) {
        int64_t at = (c + __builtin_ctz(mark)) * size;
        if (from) {
          memcpy(to + at, from + at, size);
        } else {
          memset(to + at, 0, size);
        }
      }
      break;
    }
    __m256i chosen = size == 2
                         ? _mm256_and_si256(_mm256_set1_epi16(static_cast<int16_t>(mark)), bit16)
                         : _mm256_and_si256(_mm256_set1_epi32(static_cast<int32_t>(mark)), bit32);
    chosen = size == 2 ? _mm256_cmpeq_epi16(chosen, bit16) : _mm256_cmpeq_epi32(chosen, bit32);
    __m256i value = from ? load256(from + c * size) : _mm256_setzero_si256();
    store256(to + c * size, _mm256_blendv_epi8(load256(to + c * size), value, chosen));
  }
}

template <DType dtype>
void typed_add_squares(const void* const* rows, int64_t num_rows, int64_t columns, double* sums) {
  using Item = typename std::conditional<dtype == DType::kFp32, float, uint16_t>::type;
  int64_t whole = columns / 8 * 8;
  for (int64_t c = 0; c < whole; c += 8) {
    __m256d low = _mm256_loadu_pd(sums + c), high = _mm256_loadu_pd(sums + c + 4);
    for (int64_t r = 0; r < num_rows; ++r) {
      const Item* p = static_cast<const Item*>(rows[r]) + c;
      __m256 x;
      if constexpr (dtype == DType::kFp32) {
        x = _mm256_loadu_ps(p);
      } else {
        __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        if constexpr (dtype == DType::kFp16) {
          x = _mm256_cvtph_ps(half);
        } else {
          x = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
        }
      }
      __m256d a = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
      __m256d b = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
      low = _mm256_fmadd_pd(a, a, low);  // a square of 24 bits is exact in 53: fused or not
      high = _mm256_fmadd_pd(b, b, high);
    }
    _mm256_storeu_pd(sums + c, low);
    _mm256_storeu_pd(sums + c + 4, high);
  }
  add_tail_squares(rows, num_rows, whole, columns, dtype, sums);
}

#include "rows_x86.inc"

}  // namespace

const Rows kRowsAvx2 = {"avx2", 8,           keys16, keys32,     mark16,
                        mark32, last_of_few, remove, add_squares};

}  // namespace antidote::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
