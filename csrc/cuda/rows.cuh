// Row scope: what a block does with its share of the rows of one matrix, or of a list.
#pragma once

#include "row_resident.cuh"
#include "row_short.cuh"
#include "row_streamed.cuh"

namespace antidote::cuda {

constexpr uint32_t kLongestByWarp = 32 * kSlots;
constexpr uint32_t kLongestByBlock = 1024 * kSlots;

// Bytes that hold a row of a team of this many threads, in whole groups.
__host__ __device__ constexpr size_t held_bytes(int threads, uint32_t columns, size_t item_size) {
  return (columns + 8 * threads - 1) / (8 * threads) * threads * 8 * item_size;
}

// A block a row, all of them in turn; with two stages the next row is on its way meanwhile.
template <int DTYPE>
__device__ __forceinline__ void prune_by_block(const RowEntry& e, Search& s, uint4* held,
                                               int stages) {
  const Team<false> team;
  team.prepare(s);
  const uint32_t rows = static_cast<uint32_t>(e.rows);
  const uint32_t other =
      stages == 2 ? static_cast<uint32_t>(held_bytes(team.size, e.columns, sizeof(Raw<DTYPE>)) / 16)
                  : 0;
  uint32_t there = 0;  // the stage to load into; with two, the other one is looked through
  uint32_t next = blockIdx.x, row = next - (stages - 1) * gridDim.x;
  do {
    if (next < rows) start_row<DTYPE>(e, next, held + there, team.rank, team.size);
    __pipeline_commit();
    there = other - there;
    if (row < rows) {  // not so in the first turn, if rows are loaded one ahead
      if (stages == 2) {
        __pipeline_wait_prior(1);
      } else {
        __pipeline_wait_prior(0);
      }
      prune_resident<DTYPE>(team, s, e, row, held + there);
    }
    next += gridDim.x, row += gridDim.x;
  } while (row < rows);
}

// A warp a row; `searches` and `held` have a place for each warp.
template <int DTYPE>
__device__ __forceinline__ void prune_by_warp(const RowEntry& e, Search* searches, uint4* held) {
  const Team<true> team;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  Search& s = searches[warp];
  held += warp * (held_bytes(32, e.columns, sizeof(Raw<DTYPE>)) / sizeof(uint4));
  team.prepare(s);
  const uint32_t rows = static_cast<uint32_t>(e.rows);
  for (uint32_t row = blockIdx.x * warps + warp; row < rows; row += gridDim.x * warps) {
    start_row<DTYPE>(e, row, held, team.rank, 32);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    prune_resident<DTYPE>(team, s, e, row, held);
  }
}

template <int DTYPE>
__device__ __forceinline__ void prune_by_thread(const RowEntry& e, int64_t row) {
  if (row >= e.rows) return;
  if (e.columns <= kShortest) {
    prune_short<DTYPE, kShortest>(e, row);
  } else {
    prune_short<DTYPE, kShort>(e, row);
  }
}

// The matrix of a list that a tile is of.
__device__ __forceinline__ const RowEntry& entry_of(const RowEntry* list, int number,
                                                    int64_t tile) {
  int low = 0, high = number;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (list[middle].first_tile <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return list[low];
}

// Rows of a tile: as many as a block has teams.
__host__ __device__ constexpr int rows_of_tile(uint32_t flags, int threads) {
  return flags & kByThread ? threads : flags & kByWarp ? threads / 32 : 1;
}

// A list of matrices, or one: tile by tile. `shared` has the memory that list_shared says.
template <int DTYPE>
__device__ __forceinline__ void prune_tiles(const RowEntry* list, int number, int64_t tiles,
                                            unsigned char* shared) {
  const Team<false> block;
  const Team<true> warp;
  unsigned char* teams = shared + sizeof(RowEntry);
  Search& s = *reinterpret_cast<Search*>(teams);
  block.prepare(s);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    // A copy in shared memory takes no registers.
    const uint32_t* from = reinterpret_cast<const uint32_t*>(&entry_of(list, number, tile));
    __syncthreads();  // the tile before is done
    if (threadIdx.x < sizeof(RowEntry) / 4) {
      reinterpret_cast<uint32_t*>(shared)[threadIdx.x] = from[threadIdx.x];
    }
    __syncthreads();
    const RowEntry& e = *reinterpret_cast<const RowEntry*>(shared);
    const uint32_t row =
        static_cast<uint32_t>(tile - e.first_tile) * rows_of_tile(e.flags, blockDim.x);
    if (e.flags & kByThread) {
      prune_by_thread<DTYPE>(e, row + threadIdx.x);
    } else if (e.flags & kByWarp) {
      const int which = threadIdx.x / 32, warps = blockDim.x / 32;
      if (row + which < e.rows) {
        Search& own = reinterpret_cast<Search*>(teams)[1 + which];
        uint4* held = reinterpret_cast<uint4*>(teams + (1 + warps) * sizeof(Search)) +
                      which * (held_bytes(32, e.columns, sizeof(Raw<DTYPE>)) / sizeof(uint4));
        warp.prepare(own);
        start_row<DTYPE>(e, row + which, held, warp.rank, 32);
        __pipeline_commit();
        __pipeline_wait_prior(0);
        prune_resident<DTYPE>(warp, own, e, row + which, held);
      }
    } else {
      uint4* held = reinterpret_cast<uint4*>(teams + sizeof(Search));
      start_row<DTYPE>(e, row, held, block.rank, block.size);
      __pipeline_commit();
      __pipeline_wait_prior(0);
      prune_resident<DTYPE>(block, s, e, row, held);
    }
  }
}

// The same for matrices of which each row is read again and again.
template <int DTYPE>
__device__ __forceinline__ void prune_streamed_tiles(const RowEntry* list, int number,
                                                     int64_t tiles, Search& s) {
  const Team<false> team;
  team.prepare(s);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const RowEntry& e = entry_of(list, number, tile);
    prune_streamed<DTYPE>(team, s, e, tile - e.first_tile);
  }
}

}  // namespace antidote::cuda
