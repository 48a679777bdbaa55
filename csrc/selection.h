// The contract that host and device share: what a score is as an integer, and in which order
// weights are compared. Raw values only; no framework, no allocation.
//
// Order: ascending (key, index). "Largest" removes the last k of it. "Smallest" removes the first
// k, which is the complement of the last n - k, so one selection serves both.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ANTIDOTE_HD __host__ __device__
#else
#define ANTIDOTE_HD
#endif

namespace antidote {

constexpr int32_t kCanonicalNan = 0x7FC00000;  // ranks above infinity
constexpr int32_t kMaxKey = 0x7FFFFFFF;        // above every key
constexpr int32_t kMinKey = INT32_MIN;         // below every key; fills the pads of key buffers

enum class DType : int { kBf16 = 0, kFp16 = 1, kFp32 = 2 };
enum class Scope : int { kRow = 0, kTensor = 1, kGlobal = 2 };

ANTIDOTE_HD static inline int64_t item_size(DType dtype) { return dtype == DType::kFp32 ? 4 : 2; }

// The key of a score | |w| * n |, given the bits of w * n (or of the score itself): the sign is
// dropped, every NaN becomes the canonical one. Keys compare as signed integers.
ANTIDOTE_HD static inline int32_t key_of_score(uint32_t bits) {
  int32_t key = static_cast<int32_t>(bits & 0x7FFFFFFFu);
  return key > 0x7F800000 ? kCanonicalNan : key;
}

// The key of any fp32 value in signed order: -0 equals +0, every NaN ranks last.
ANTIDOTE_HD static inline int32_t key_of_signed(uint32_t bits) {
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return kCanonicalNan;
  int32_t key = static_cast<int32_t>(bits);
  if (key == kMinKey) return 0;
  return key < 0 ? key ^ 0x7FFFFFFF : key;
}

ANTIDOTE_HD static inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

ANTIDOTE_HD static inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// fp16 -> fp32, exact, denormals and NaN payloads included.
ANTIDOTE_HD static inline float float_of_half(uint16_t half) {
  uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  uint32_t exponent = (half >> 10) & 31u;
  uint32_t mantissa = half & 0x3FFu;
  if (exponent == 31) return float_of_bits(sign | 0x7F800000u | (mantissa << 13));
  if (exponent != 0) return float_of_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
  float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

ANTIDOTE_HD static inline float load_float(const void* data, int64_t index, DType dtype) {
  if (dtype == DType::kFp32) return static_cast<const float*>(data)[index];
  uint16_t bits = static_cast<const uint16_t*>(data)[index];
  if (dtype == DType::kFp16) return float_of_half(bits);
  return float_of_bits(static_cast<uint32_t>(bits) << 16);
}

}  // namespace antidote
