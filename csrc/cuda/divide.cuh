// Division by a number that the host knows: a multiplication in place of some 80 instructions.
#pragma once

#include "launch.h"

namespace antidote::cuda {

// n / size for every n with n * size < 2^64: with magic = ceil(2^64 / size) the product
// n * magic / 2^64 exceeds n / size by less than n * size / 2^64 / size < 1 / size.
struct Divider {
  uint64_t size, magic;  // magic 0 stands for size 1

  static Divider by(int64_t size) {
    uint64_t n = static_cast<uint64_t>(size);
    return {n, n <= 1 ? 0 : UINT64_MAX / n + 1};
  }

  // Whether every number up to n is divided exactly.
  static bool serves(int64_t n, int64_t size) {
    return size <= 1 || static_cast<uint64_t>(n) <= UINT64_MAX / static_cast<uint64_t>(size);
  }

#if defined(__CUDACC__) || defined(ANTIDOTE_SIMT)
  __device__ __forceinline__ int64_t quotient(int64_t n) const {
    return magic == 0 ? n : static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(n), magic));
  }
  __device__ __forceinline__ int64_t remainder(int64_t n, int64_t quotient) const {
    return n - quotient * static_cast<int64_t>(size);
  }
#endif
};

}  // namespace antidote::cuda
