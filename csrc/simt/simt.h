// CUDA's words for a machine without a GPU: with ANTIDOTE_SIMT defined, csrc/cuda compiles as plain
// C++ on top of threads.h. It exists to run the kernels under sanitizers and in any order of
// threads; it is no backend. What CUDA leaves undefined fails or gives poison here where it can.
#pragma once

// Before __noinline__ becomes a macro: the standard library spells an attribute that way.
#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "threads.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))

#define ANTIDOTE_SIMT_VECTORS(T, name, align2, align4)              \
  struct alignas(align2) name##2 { T x, y; };                       \
  struct alignas(align4) name##4 { T x, y, z, w; };                 \
  static inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  static inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

// Alignments are CUDA's, so that the undefined-behaviour sanitizer sees a misaligned access.
ANTIDOTE_SIMT_VECTORS(unsigned char, uchar, 2, 4)
ANTIDOTE_SIMT_VECTORS(short, short, 4, 8)
ANTIDOTE_SIMT_VECTORS(unsigned short, ushort, 4, 8)
ANTIDOTE_SIMT_VECTORS(int, int, 8, 16)
ANTIDOTE_SIMT_VECTORS(unsigned int, uint, 8, 16)
ANTIDOTE_SIMT_VECTORS(float, float, 8, 16)
ANTIDOTE_SIMT_VECTORS(long long, longlong, 16, 16)
ANTIDOTE_SIMT_VECTORS(unsigned long long, ulonglong, 16, 16)
ANTIDOTE_SIMT_VECTORS(double, double, 16, 16)
#undef ANTIDOTE_SIMT_VECTORS

struct uint3 {
  unsigned int x, y, z;
};
struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

inline thread_local uint3 threadIdx{0, 0, 0}, blockIdx{0, 0, 0};
inline thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---- the runtime

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801,
};
typedef struct CUstream_st* cudaStream_t;

static inline const char* cudaGetErrorString(cudaError_t error) {
  const char* message = antidote::simt::message_of(error);
  if (message != nullptr) return message;
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    case cudaErrorNotSupported:
      return "operation not supported";
  }
  return "unrecognized error code";
}

static inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
static inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
static inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = {}) {
  memset(to, value, bytes);
  return cudaSuccess;
}

namespace antidote::simt {

static inline cudaError_t launch(int64_t blocks, int threads, size_t shared, bool cooperative,
                                 const std::function<void()>& body) {
  return static_cast<cudaError_t>(run_launch(blocks, threads, shared, cooperative, body));
}

// A register of 4 or 8 bytes as it travels between lanes.
template <typename T>
static inline uint64_t bits_of(T value) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}
template <typename T>
static inline T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace antidote::simt

// The parameter that tells where a call stands.
#define ANTIDOTE_SIMT_HERE ::antidote::simt::Site site = ::antidote::simt::Site::here()

// ---- shared memory and barriers

#define ANTIDOTE_SHARED(type, name)    \
  static char antidote_site_of_##name; \
  type& name = *static_cast<type*>(    \
      ::antidote::simt::shared_memory(&antidote_site_of_##name, sizeof(type), alignof(type)))

namespace antidote::cuda {

static inline unsigned char* dynamic_shared() {
  return static_cast<unsigned char*>(simt::dynamic_memory());
}
static inline void grid_sync(ANTIDOTE_SIMT_HERE) {
  simt::barrier(simt::Op::kGrid, "grid_sync", false, site);
}

}  // namespace antidote::cuda

static inline void __syncthreads(ANTIDOTE_SIMT_HERE) {
  antidote::simt::barrier(antidote::simt::Op::kBarrier, "__syncthreads", false, site);
}
static inline int __syncthreads_count(int predicate, ANTIDOTE_SIMT_HERE) {
  return static_cast<int>(antidote::simt::barrier(antidote::simt::Op::kBarrier,
                                                  "__syncthreads_count", predicate != 0, site));
}
static inline int __syncthreads_or(int predicate, ANTIDOTE_SIMT_HERE) {
  return antidote::simt::barrier(antidote::simt::Op::kBarrier, "__syncthreads_or", predicate != 0,
                                 site) != 0;
}
static inline int __syncthreads_and(int predicate, ANTIDOTE_SIMT_HERE) {
  return antidote::simt::barrier(antidote::simt::Op::kBarrier, "__syncthreads_and", predicate == 0,
                                 site) == 0;
}

static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __nanosleep(unsigned) { antidote::simt::pause(); }
[[noreturn]] static inline void __trap() { antidote::simt::fail("__trap()"); }

// ---- warps

static inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, ANTIDOTE_SIMT_HERE) {
  antidote::simt::warp(antidote::simt::Op::kSyncWarp, "__syncwarp", mask, 0, 0, site);
}

namespace antidote::simt {

// The lanes that a shuffle may read from, `width` of them from `first` on.
struct Segment {
  int lane, first, last;
};
static inline Segment segment(int width) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) fail("a shuffle of width %d", width);
  int lane = static_cast<int>(threadIdx.x & 31u);
  int first = lane & ~(width - 1);
  return {lane, first, first + width - 1};
}

template <typename T>
static inline T shuffle(const char* name, uint32_t mask, T value, int source, Site site) {
  return from_bits<T>(warp(Op::kShuffle, name, mask, bits_of(value), source, site));
}

}  // namespace antidote::simt

template <typename T>
static inline T __shfl_sync(unsigned mask, T value, int source, int width = 32,
                            ANTIDOTE_SIMT_HERE) {
  auto s = antidote::simt::segment(width);
  source = s.first + (source & (width - 1));
  return antidote::simt::shuffle("__shfl_sync", mask, value, source, site);
}
template <typename T>
static inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                               ANTIDOTE_SIMT_HERE) {
  auto s = antidote::simt::segment(width);
  int64_t source = static_cast<int64_t>(s.lane) - delta;
  return antidote::simt::shuffle("__shfl_up_sync", mask, value,
                                 source < s.first ? s.lane : static_cast<int>(source), site);
}
template <typename T>
static inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                 ANTIDOTE_SIMT_HERE) {
  auto s = antidote::simt::segment(width);
  int64_t source = static_cast<int64_t>(s.lane) + delta;
  return antidote::simt::shuffle("__shfl_down_sync", mask, value,
                                 source > s.last ? s.lane : static_cast<int>(source), site);
}
template <typename T>
static inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                                ANTIDOTE_SIMT_HERE) {
  auto s = antidote::simt::segment(width);
  int source = s.lane ^ (lane_mask & 31);
  return antidote::simt::shuffle("__shfl_xor_sync", mask, value, source > s.last ? s.lane : source,
                                 site);
}

static inline unsigned __ballot_sync(unsigned mask, int predicate, ANTIDOTE_SIMT_HERE) {
  return static_cast<unsigned>(antidote::simt::warp(antidote::simt::Op::kBallot, "__ballot_sync",
                                                    mask, predicate != 0, 0, site));
}
static inline int __any_sync(unsigned mask, int predicate, ANTIDOTE_SIMT_HERE) {
  return antidote::simt::warp(antidote::simt::Op::kBallot, "__any_sync", mask, predicate != 0, 0,
                              site) != 0;
}
static inline int __all_sync(unsigned mask, int predicate, ANTIDOTE_SIMT_HERE) {
  return antidote::simt::warp(antidote::simt::Op::kBallot, "__all_sync", mask, predicate == 0, 0,
                              site) == 0;
}
template <typename T>
static inline unsigned __match_any_sync(unsigned mask, T value, ANTIDOTE_SIMT_HERE) {
  return static_cast<unsigned>(antidote::simt::warp(antidote::simt::Op::kMatch, "__match_any_sync",
                                                    mask, antidote::simt::bits_of(value), 0, site));
}

#define ANTIDOTE_SIMT_REDUCE(name, T, op)                                               \
  static inline T name(unsigned mask, T value, ANTIDOTE_SIMT_HERE) {                    \
    return antidote::simt::from_bits<T>(antidote::simt::warp(                           \
        antidote::simt::Op::op, #name, mask, antidote::simt::bits_of(value), 0, site)); \
  }
ANTIDOTE_SIMT_REDUCE(__reduce_add_sync, unsigned, kAdd)
ANTIDOTE_SIMT_REDUCE(__reduce_add_sync, int, kAdd)
ANTIDOTE_SIMT_REDUCE(__reduce_min_sync, unsigned, kMin)
ANTIDOTE_SIMT_REDUCE(__reduce_min_sync, int, kMinSigned)
ANTIDOTE_SIMT_REDUCE(__reduce_max_sync, unsigned, kMax)
ANTIDOTE_SIMT_REDUCE(__reduce_max_sync, int, kMaxSigned)
ANTIDOTE_SIMT_REDUCE(__reduce_and_sync, unsigned, kAnd)
ANTIDOTE_SIMT_REDUCE(__reduce_or_sync, unsigned, kOr)
ANTIDOTE_SIMT_REDUCE(__reduce_xor_sync, unsigned, kXor)
#undef ANTIDOTE_SIMT_REDUCE

#undef ANTIDOTE_SIMT_HERE

// ---- atomics: plain, for one OS thread runs a launch; the types are those that CUDA has

#define ANTIDOTE_SIMT_ATOMIC(name, T, next)   \
  static inline T name(T* address, T value) { \
    antidote::simt::pause_atomic();           \
    T old = *address;                         \
    *address = static_cast<T>(next);          \
    return old;                               \
  }
#define ANTIDOTE_SIMT_ATOMICS(T)                                \
  ANTIDOTE_SIMT_ATOMIC(atomicMax, T, old < value ? value : old) \
  ANTIDOTE_SIMT_ATOMIC(atomicMin, T, value < old ? value : old) \
  ANTIDOTE_SIMT_ATOMIC(atomicOr, T, old | value)                \
  ANTIDOTE_SIMT_ATOMIC(atomicAnd, T, old& value)                \
  ANTIDOTE_SIMT_ATOMIC(atomicXor, T, old ^ value)               \
  ANTIDOTE_SIMT_ATOMIC(atomicExch, T, value)                    \
  static inline T atomicCAS(T* address, T compare, T value) {   \
    antidote::simt::pause_atomic();                             \
    T old = *address;                                           \
    if (old == compare) *address = value;                       \
    return old;                                                 \
  }
ANTIDOTE_SIMT_ATOMICS(int)
ANTIDOTE_SIMT_ATOMICS(unsigned)
ANTIDOTE_SIMT_ATOMICS(unsigned long long)
// A sum that wraps, signed too.
ANTIDOTE_SIMT_ATOMIC(atomicAdd, int, static_cast<unsigned>(old) + static_cast<unsigned>(value))
ANTIDOTE_SIMT_ATOMIC(atomicSub, int, static_cast<unsigned>(old) - static_cast<unsigned>(value))
ANTIDOTE_SIMT_ATOMIC(atomicAdd, unsigned, old + value)
ANTIDOTE_SIMT_ATOMIC(atomicSub, unsigned, old - value)
ANTIDOTE_SIMT_ATOMIC(atomicAdd, unsigned long long, old + value)
#undef ANTIDOTE_SIMT_ATOMICS
#undef ANTIDOTE_SIMT_ATOMIC

// ---- memory

#define ANTIDOTE_SIMT_LOAD(name)           \
  template <typename T>                    \
  static inline T name(const T* address) { \
    return *address;                       \
  }
#define ANTIDOTE_SIMT_STORE(name)                                        \
  template <typename T>                                                  \
  static inline void name(T* address, std::enable_if_t<true, T> value) { \
    *address = value;                                                    \
  }
ANTIDOTE_SIMT_LOAD(__ldg)
ANTIDOTE_SIMT_LOAD(__ldca)
ANTIDOTE_SIMT_LOAD(__ldcg)
ANTIDOTE_SIMT_LOAD(__ldcs)
ANTIDOTE_SIMT_LOAD(__ldcv)
ANTIDOTE_SIMT_LOAD(__ldlu)
ANTIDOTE_SIMT_STORE(__stwb)
ANTIDOTE_SIMT_STORE(__stcg)
ANTIDOTE_SIMT_STORE(__stcs)
ANTIDOTE_SIMT_STORE(__stwt)
#undef ANTIDOTE_SIMT_LOAD
#undef ANTIDOTE_SIMT_STORE

static inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes,
                                           size_t zeros = 0) {
  antidote::simt::copy_async(to, from, bytes, zeros);
}
static inline void __pipeline_commit() { antidote::simt::copy_commit(); }
static inline void __pipeline_wait_prior(size_t groups) { antidote::simt::copy_wait(groups); }

#include "intrinsics.h"
