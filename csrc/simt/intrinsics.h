// CUDA's functions of bits and of numbers for simt.h, which alone includes this.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

namespace antidote::simt {

template <typename To, typename From>
static inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// A GPU has one NaN for all that fp32 arithmetic makes.
static inline float gpu_nan(float value) {
  return value == value ? value : bits_as<float>(0x7FFFFFFF);
}

}  // namespace antidote::simt

// ---- bits

static inline int __popc(unsigned value) { return __builtin_popcount(value); }
static inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
static inline int __ffs(int value) { return __builtin_ffs(value); }
static inline int __ffsll(long long value) { return __builtin_ffsll(value); }
static inline int __clz(int value) {
  return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value));
}
static inline int __clzll(long long value) {
  return value == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(value));
}
static inline unsigned __brev(unsigned value) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (value >> i & 1u) << (31 - i);
  return reversed;
}
static inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    unsigned choice = selector >> (4 * i) & 0xFu;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (choice & 7u))) & 0xFFu;
    if (choice & 8u) byte = byte & 0x80u ? 0xFFu : 0;  // the sign of the byte, eight times
    result |= byte << (8 * i);
  }
  return result;
}
static inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  return static_cast<unsigned>(both << (shift & 31u) >> 32);
}
static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  return static_cast<unsigned>(both >> (shift & 31u));
}

static inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

static inline int __float_as_int(float value) { return antidote::simt::bits_as<int>(value); }
static inline unsigned __float_as_uint(float value) {
  return antidote::simt::bits_as<unsigned>(value);
}
static inline float __int_as_float(int value) { return antidote::simt::bits_as<float>(value); }
static inline float __uint_as_float(unsigned value) {
  return antidote::simt::bits_as<float>(value);
}

// ---- arithmetic that rounds once; plain operators keep the NaN of the machine, these do not

static inline float __fadd_rn(float a, float b) { return antidote::simt::gpu_nan(a + b); }
static inline float __fsub_rn(float a, float b) { return antidote::simt::gpu_nan(a - b); }
static inline float __fmul_rn(float a, float b) { return antidote::simt::gpu_nan(a * b); }
static inline float __fdiv_rn(float a, float b) { return antidote::simt::gpu_nan(a / b); }
static inline float __fmaf_rn(float a, float b, float c) {
  return antidote::simt::gpu_nan(fmaf(a, b, c));
}
static inline float __fsqrt_rn(float a) { return antidote::simt::gpu_nan(sqrtf(a)); }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dsub_rn(double a, double b) { return a - b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
static inline double __dsqrt_rn(double a) { return sqrt(a); }
static inline float __double2float_rn(double a) {
  return antidote::simt::gpu_nan(static_cast<float>(a));
}

#define ANTIDOTE_SIMT_MIN_MAX(R, A, B)                                                    \
  static inline R min(A a, B b) {                                                         \
    return static_cast<R>(b) < static_cast<R>(a) ? static_cast<R>(b) : static_cast<R>(a); \
  }                                                                                       \
  static inline R max(A a, B b) {                                                         \
    return static_cast<R>(a) < static_cast<R>(b) ? static_cast<R>(b) : static_cast<R>(a); \
  }
#define ANTIDOTE_SIMT_MIN_MAX_OF(T)                         \
  ANTIDOTE_SIMT_MIN_MAX(T, T, T)                            \
  ANTIDOTE_SIMT_MIN_MAX(unsigned T, unsigned T, unsigned T) \
  ANTIDOTE_SIMT_MIN_MAX(unsigned T, unsigned T, T)          \
  ANTIDOTE_SIMT_MIN_MAX(unsigned T, T, unsigned T)
ANTIDOTE_SIMT_MIN_MAX_OF(int)
ANTIDOTE_SIMT_MIN_MAX_OF(long)
ANTIDOTE_SIMT_MIN_MAX_OF(long long)
#undef ANTIDOTE_SIMT_MIN_MAX_OF
#undef ANTIDOTE_SIMT_MIN_MAX
// Of a NaN and a number the latter.
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }
