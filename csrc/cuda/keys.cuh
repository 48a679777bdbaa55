// From raw weights to keys. A key is the bits of a score, compared as a signed integer; the order
// is that of selection.h. On a GPU every NaN that arithmetic makes is 0x7FFFFFFF, so that keys need
// no canonical form here: only what is written out does (score_of_key).
#pragma once

#include "launch.h"
#include "selection.h"

namespace antidote::cuda {

constexpr int kBf16 = 0, kFp16 = 1, kFp32 = 2, kSigned = 3;  // kSigned: fp32 scores of any sign

// fp16 -> fp32, exact but for a NaN's payload.
__device__ __forceinline__ float half_to_float(uint32_t half) {
#if defined(ANTIDOTE_SIMT)
  return float_of_half(static_cast<uint16_t>(half));
#else
  return __half2float(__ushort_as_half(static_cast<unsigned short>(half)));
#endif
}

// The value of raw bits: 16 in the low half, or 32.
template <int DTYPE>
__device__ __forceinline__ float value_of(uint32_t raw) {
  if (DTYPE == kBf16) return __uint_as_float(raw << 16);
  if (DTYPE == kFp16) return half_to_float(raw & 0xFFFFu);
  return __uint_as_float(raw);
}

// The key of | |w| * n |.
__device__ __forceinline__ int32_t key_of(float w, float n) {
  return __float_as_int(__fmul_rn(fabsf(w), fabsf(n)));
}

// The key of | w | where there is no norm. A multiplication by a 1 that the compiler sees could be
// left out, and a NaN would keep its payload.
__device__ __forceinline__ int32_t key_of_magnitude(float w) {
  const int32_t key = __float_as_int(w) & 0x7FFFFFFF;
  return key > 0x7F800000 ? kMaxKey : key;
}

// The score that a key stands for, NaN canonical.
__device__ __forceinline__ float score_of_key(int32_t key) {
  return __int_as_float(key > 0x7F800000 ? kCanonicalNan : key);
}

// The integer that holds one weight's raw bits.
template <int DTYPE>
struct RawOf {
  using type = uint16_t;
};
template <>
struct RawOf<kFp32> {
  using type = uint32_t;
};
template <>
struct RawOf<kSigned> {
  using type = uint32_t;
};

// The key of a single weight; base null: no difference, norm null: plain magnitude.
template <int DTYPE>
__device__ __forceinline__ int32_t key_at(const void* weight, const void* base, const float* norm,
                                          int64_t place, int64_t base_place, int64_t column) {
  using Raw = typename RawOf<DTYPE>::type;
  uint32_t raw = static_cast<const Raw*>(weight)[place];
  if (DTYPE == kSigned) return key_of_signed(raw);
  float value = value_of<DTYPE>(raw);
  if (base != nullptr) {
    value = __fsub_rn(value, value_of<DTYPE>(static_cast<const Raw*>(base)[base_place]));
  }
  return norm == nullptr ? key_of_magnitude(value) : key_of(value, norm[column]);
}

}  // namespace antidote::cuda
