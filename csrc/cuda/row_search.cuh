// The m-th largest of a row, exactly, by a team: a block, or one warp of it.
//
// Keys are compared with the column behind them, so that no two are equal and ties need no care:
// composite = key << column_bits | column. A quarter of the row is counted in 512 coarse bins and
// gives two bounds between which the m-th largest lies, almost surely. Then each key is compared
// with both; the few between them are counted in 512 finer bins, one of which holds what is looked
// for, mostly alone. Counts prove the bounds right; where they were not, or where many keys are
// alike, pivot_by_counting narrows an interval of composites nine bits at a time.
//
// Counts and lists are filled in any order and read as sets: the outcome never depends on it.
#pragma once

#include "keys.cuh"

namespace antidote::cuda {

constexpr int kBins = 512;
constexpr int kFew = 32;          // members of a bin that are ranked one against the other
constexpr int kCoarseShift = 19;  // a coarse bin is a sixteenth of an octave
constexpr int kSlots = 32;        // weights a thread holds, in groups of 8 columns
constexpr int kGroups = kSlots / 8;

// A team's shared memory. Counters are zero whenever no search runs.
struct Search {
  uint32_t coarse[kBins];
  uint32_t fine[kBins];
  uint64_t list[kFew];
  uint64_t pivot;
  uint32_t max_key, above, listed;
  uint32_t low, top;  // the bounds, both inclusive
  int32_t shift, bin;
  uint32_t need, count;
  int32_t edge;
};

template <bool WARP>
struct Team {
  int rank = WARP ? threadIdx.x & 31 : threadIdx.x;
  int size = WARP ? 32 : blockDim.x;

  __device__ __forceinline__ void sync() const {
    if (WARP) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
  // One warp looks through the bins; it runs whole.
  __device__ __forceinline__ bool looks() const { return WARP || threadIdx.x < 32; }

  __device__ __forceinline__ void clear(uint32_t* bins) const {
    for (int i = rank; i < kBins / 4; i += size) {
      reinterpret_cast<uint4*>(bins)[i] = make_uint4(0, 0, 0, 0);
    }
  }

  __device__ void prepare(Search& s) const {
    clear(s.coarse);
    clear(s.fine);
    if (rank == 0) s.max_key = s.above = s.listed = 0;
    sync();
  }
};

// 512 counts as one warp holds them, 16 a lane, from the last bin (lane 0) down; `begin` is the
// place of the first bin, a multiple of 4, and places wrap around.
struct Counts {
  uint32_t of[16];
  uint32_t before;  // in later bins than the lane's
  uint32_t own;

  __device__ __forceinline__ Counts(const uint32_t* bins, int begin) {
    const int lane = threadIdx.x & 31;
    own = 0;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int place = (begin + (31 - lane) * 16 + 4 * q) & (kBins - 1);
      const uint4 four = *reinterpret_cast<const uint4*>(bins + place);
      of[4 * q] = four.x, of[4 * q + 1] = four.y, of[4 * q + 2] = four.z, of[4 * q + 3] = four.w;
      own += four.x + four.y + four.z + four.w;
    }
    before = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(0xFFFFFFFFu, before, step);
      if (lane >= step) before += other;
    }
    before -= own;
  }

  // The bin that holds the rank-th from the end, or -1; its rank there, and how many the bin holds.
  __device__ __forceinline__ int find(uint32_t rank, uint32_t& left, uint32_t& count) const {
    const bool here = before < rank && rank <= before + own;
    uint32_t behind = before, found = 0;
    left = count = 0;
#pragma unroll
    for (int i = 15; i >= 0; --i) {
      if (behind < rank) found = i, left = rank - behind, count = of[i];
      behind += of[i];
    }
    const uint32_t lanes = __ballot_sync(0xFFFFFFFFu, here);
    const int lane = lanes == 0 ? 0 : __ffs(lanes) - 1;
    found = __shfl_sync(0xFFFFFFFFu, found, lane);
    left = __shfl_sync(0xFFFFFFFFu, left, lane);
    count = __shfl_sync(0xFFFFFFFFu, count, lane);
    return lanes == 0 ? -1 : (31 - lane) * 16 + static_cast<int>(found);
  }
};

// What the coarse counts of a sample say: the m-th largest key is in [low, top], most likely. The
// ranks are those of the bounds in the sample.
__device__ __forceinline__ void set_bounds(Search& s, uint32_t rank_top, uint32_t rank_low) {
  const int begin = (static_cast<int>(s.max_key >> (kCoarseShift + 2)) + 1) * 4 - kBins;
  const Counts counts(s.coarse, begin);
  uint32_t left, count;
  const int top = counts.find(rank_top, left, count);
  const int low = counts.find(rank_low, left, count);
  if ((threadIdx.x & 31) == 0) {
    const int low_bin = low < 0 ? 0 : max(begin + low, 0);
    const int top_bin = top < 0 ? -1 : begin + top;  // -1: most keys are zero
    const uint32_t lowest = static_cast<uint32_t>(low_bin) << kCoarseShift;
    const uint32_t highest = (static_cast<uint32_t>(top_bin) + 1) << kCoarseShift;
    const uint32_t range = top_bin < low_bin ? 0 : highest - 1 - lowest;
    const int shift = max(0, 32 - __clz(range) - 9);
    s.low = lowest;
    s.shift = shift;
    // The last of the finer bins is whole: what lies in it is not above the bounds.
    s.top = lowest + (((range >> shift) + 1) << shift) - 1;
  }
}

// Sets s.bin (-1: none), s.need and s.count for the rank-th largest of what s.fine counts.
__device__ __forceinline__ void find_bin(Search& s, uint32_t rank) {
  const Counts counts(s.fine, 0);
  uint32_t need, count;
  const int bin = counts.find(rank, need, count);
  if ((threadIdx.x & 31) == 0) s.bin = bin, s.need = need, s.count = count;
}

// The composite of the need-th largest of those in [begin, begin + (1 << bits)), by any number of
// passes over the row; bits < 64. Source: `slots` of a thread, `has(slot)`, `composite(slot)`.
template <typename T, typename Source>
__device__ __forceinline__ uint64_t pivot_by_counting(const T team, Search& s, const Source source,
                                                      uint64_t begin, int bits, uint32_t need) {
  bool few = false;
  while (!few) {
    const int shift = max(0, bits - 9);
    team.sync();
#pragma unroll 1
    for (int slot = 0; slot < source.slots; ++slot) {
      if (!source.has(slot)) continue;
      const uint64_t place = source.composite(slot) - begin;
      if (place >> bits == 0) atomicAdd(&s.fine[place >> shift], 1u);
    }
    team.sync();
    if (team.looks()) find_bin(s, need);
    team.sync();
    begin += static_cast<uint64_t>(s.bin) << shift;
    need = s.need;
    few = s.count <= kFew;
    bits = shift;
    team.clear(s.fine);
  }
#pragma unroll 1
  for (int slot = 0; slot < source.slots; ++slot) {
    if (!source.has(slot)) continue;
    const uint64_t composite = source.composite(slot);
    if ((composite - begin) >> bits == 0) s.list[atomicAdd(&s.listed, 1u)] = composite;
  }
  team.sync();
  if (static_cast<uint32_t>(team.rank) < s.listed) {
    const uint64_t own = s.list[team.rank];
    uint32_t larger = 0;
#pragma unroll 1
    for (uint32_t i = 0; i < s.listed; ++i) larger += s.list[i] > own;
    if (larger == need - 1) s.pivot = own;
  }
  team.sync();
  const uint64_t pivot = s.pivot;
  if (team.rank == 0) s.listed = 0;
  team.sync();
  return pivot;
}

// The smallest of the threads' keys, or the largest; all get it.
template <typename T>
__device__ __forceinline__ int32_t edge_of_team(const T team, Search& s, int32_t key,
                                                bool smallest) {
  if (team.rank == 0) s.edge = smallest ? kMaxKey : -1;
  team.sync();
  if (smallest) {
    atomicMin(&s.edge, key);
  } else {
    atomicMax(&s.edge, key);
  }
  team.sync();
  const int32_t edge = s.edge;
  team.sync();
  return edge;
}

__device__ __forceinline__ int bits_of(uint32_t columns) {
  return columns < 2 ? 0 : 32 - __clz(columns - 1);
}

}  // namespace antidote::cuda
