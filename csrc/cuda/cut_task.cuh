// What the kernels of one selection over many weights pass to each other, and how they count.
#pragma once

#include "cut_table.cuh"

namespace antidote::cuda {

// Keys are found by digits of their order-preserving unsigned form, the first digit first.
constexpr int kLevels = 3, kDigitBits = 11, kDigits = 1 << kDigitBits;
constexpr int kBracketThreads = 1024;

// Of the keys that the first reading keeps, in chunks that belong to one warp each.
constexpr uint32_t kChunk = 512;

#if defined(ANTIDOTE_SIMT)
constexpr int64_t kSample = 512;  // so that small matrices meet every path
#else
constexpr int64_t kSample = 8192;
#endif

// What is known of a selection on the device.
struct CutState {
  // The rank-th largest key is expected in [low, top], or to be one of the two beside, where those
  // are counted on their own because they may be many.
  int32_t low, top;
  int32_t low_atom, high_atom;  // kMinKey, which no key is, where they are not
  uint32_t overflow;            // whether some of the keys inside found no chunk
  uint32_t chunks;              // taken behind each warp's first
  int32_t key;                  // what the search ends with: keys above `key` are taken, and those
  int64_t place;                // equal to it from this place on
  unsigned long long above;     // keys counted above `top`, inside, and of each atom
  unsigned long long inside, low_equal, high_equal;
};

// One of the two selections; what is null is not needed by the route taken.
struct CutSearch {
  int64_t rank;  // of the key sought, from the largest; 0: nothing is taken
  int64_t total;
  int64_t sample, high_rank, low_rank;  // the sample's size, and where in it the bracket ends
  int64_t heavy;                        // so many equal keys of the sample count as many
  int64_t after;                        // 1: the weight of that rank itself is not taken
  CutState* state;
  unsigned long long* digits;  // [kLevels, kDigits]
  uint32_t* equal;             // [2, stretches], the low atom first
  uint32_t* ties;              // [stretches]
  uint32_t* parts;             // [blocks of the search]
  int32_t* samples;
  uint32_t* chunk_fill;   // keys in each chunk
  uint32_t* chunk_owner;  // the stretch that they are of
  int32_t* keys;          // [chunks, kChunk]
  uint32_t chunks;
};

struct CutTask {
  CutList list;
  int64_t stretches;  // one a block of the first reading
  int selections;
  bool write;
  bool smallest;  // what is not taken is removed
  CutSearch searches[2];
};

__device__ __forceinline__ uint32_t ordered(int32_t key) {
  return static_cast<uint32_t>(key) ^ 0x80000000u;
}

__device__ __forceinline__ int32_t key_of_ordered(uint32_t bits) {
  return static_cast<int32_t>(bits ^ 0x80000000u);
}

__device__ __forceinline__ int digit_shift(int level) {
  return level == 0 ? 32 - kDigitBits : level == 1 ? 32 - 2 * kDigitBits : 0;
}

__device__ __forceinline__ int digit_width(int level) {
  return level < 2 ? kDigitBits : 32 - 2 * kDigitBits;
}

__device__ __forceinline__ uint32_t digit_at(int level, uint32_t bits) {
  return (bits >> digit_shift(level)) & (kDigits - 1) & ((1u << digit_width(level)) - 1);
}

// Whether the digits before this one are those of `prefix`.
__device__ __forceinline__ bool same_before(int level, uint32_t bits, uint32_t prefix) {
  const uint64_t differ = bits ^ prefix;
  return differ >> (digit_shift(level) + digit_width(level)) == 0;
}

struct ScanBuffers {
  unsigned long long warps[32];
  unsigned long long total;
  unsigned long long rest;
  unsigned long long held;
  int64_t found;
};

// The sum over the threads up to this one; all threads call it. `s->total` gets that of all.
__device__ __forceinline__ unsigned long long scan_block(unsigned long long value, ScanBuffers* s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const unsigned long long before = __shfl_up_sync(kWholeWarp, value, step);
    if (lane >= step) value += before;
  }
  __syncthreads();  // the buffers may still be read
  if (lane == 31) s->warps[warp] = value;
  __syncthreads();
  if (warp == 0) {
    unsigned long long sum = lane < warps ? s->warps[lane] : 0;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const unsigned long long before = __shfl_up_sync(kWholeWarp, sum, step);
      if (lane >= step) sum += before;
    }
    s->warps[lane] = sum;
    if (lane == 31) s->total = sum;
  }
  __syncthreads();
  return warp == 0 ? value : value + s->warps[warp - 1];
}

// Which of `size` counts holds the rank-th (from 1) in their order, or from the last one down.
// Returns it in all threads; `rest` is the rank in it, `held` its count. -1: there are fewer.
template <bool DOWN, typename Count>
__device__ __forceinline__ int64_t find_holder(const Count* counts, int64_t size,
                                               unsigned long long rank, ScanBuffers* s,
                                               unsigned long long* rest, unsigned long long* held) {
  __syncthreads();
  if (threadIdx.x == 0) s->found = -1;
  unsigned long long before = 0;
  for (int64_t begin = 0; begin < size && before < rank; begin += blockDim.x) {
    const int64_t i = begin + threadIdx.x;
    const int64_t place = DOWN ? size - 1 - i : i;
    const unsigned long long count = i < size ? counts[place] : 0;
    const unsigned long long until = before + scan_block(count, s);
    if (until >= rank && until - count < rank) {
      s->found = place;
      s->rest = rank - (until - count);
      s->held = count;
    }
    before += s->total;
  }
  __syncthreads();
  *rest = s->rest;
  *held = s->held;
  return s->found;
}

}  // namespace antidote::cuda
