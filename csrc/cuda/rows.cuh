// Row scope: what a block does with its share of the rows of one matrix, or of a list.
#pragma once

#include "row_resident.cuh"
#include "row_short.cuh"
#include "row_streamed.cuh"

namespace antidote::cuda {

constexpr uint32_t kLongestByWarp = 32 * kSlots;
constexpr uint32_t kLongestByBlock = 1024 * kSlots;

// Bytes that hold a row of a team of this many threads.
template <int DTYPE>
__host__ __device__ constexpr size_t held_bytes(int threads, uint32_t columns) {
  return (columns + 8 * threads - 1) / (8 * threads) * threads * sizeof(Group<DTYPE>);
}

// A block a row, all of them in turn; with two stages the next row is on its way meanwhile.
template <int DTYPE>
__device__ __forceinline__ void prune_by_block(const RowEntry& e, Search& s, uint4* held,
                                               int stages) {
  const Team<false> team;
  team.prepare(s);
  const size_t stage = held_bytes<DTYPE>(team.size, e.columns) / sizeof(uint4);
  int64_t row = blockIdx.x;
  if (row < e.rows) start_row<DTYPE>(e, row, held, team.rank, team.size);
  __pipeline_commit();
  bool second = false;
  for (; row < e.rows; row += gridDim.x) {
    uint4* here = held + (second ? stage : 0);
    const int64_t next = row + gridDim.x;
    if (stages == 2) {
      second = !second;
      if (next < e.rows) {
        start_row<DTYPE>(e, next, held + (second ? stage : 0), team.rank, team.size);
      }
      __pipeline_commit();
      __pipeline_wait_prior(1);
    } else {
      __pipeline_wait_prior(0);
    }
    prune_resident<DTYPE>(team, s, e, row, here);
    if (stages == 1) {  // each thread reads only what it loaded
      if (next < e.rows) start_row<DTYPE>(e, next, held, team.rank, team.size);
      __pipeline_commit();
    }
  }
}

// A warp a row; `searches` and `held` have a place for each warp.
template <int DTYPE>
__device__ __forceinline__ void prune_by_warp(const RowEntry& e, Search* searches, uint4* held) {
  const Team<true> team;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  Search& s = searches[warp];
  held += warp * (held_bytes<DTYPE>(32, e.columns) / sizeof(uint4));
  team.prepare(s);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * warps + warp; row < e.rows;
       row += static_cast<int64_t>(gridDim.x) * warps) {
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
  Search& s = *reinterpret_cast<Search*>(shared);
  block.prepare(s);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const RowEntry& e = entry_of(list, number, tile);
    const int64_t row = (tile - e.first_tile) * rows_of_tile(e.flags, blockDim.x);
    if (e.flags & kByThread) {
      prune_by_thread<DTYPE>(e, row + threadIdx.x);
    } else if (e.flags & kByWarp) {
      const int which = threadIdx.x / 32, warps = blockDim.x / 32;
      if (row + which < e.rows) {
        Search& own = reinterpret_cast<Search*>(shared)[1 + which];
        uint4* held = reinterpret_cast<uint4*>(shared + (1 + warps) * sizeof(Search)) +
                      which * (held_bytes<DTYPE>(32, e.columns) / sizeof(uint4));
        warp.prepare(own);
        start_row<DTYPE>(e, row + which, held, warp.rank, 32);
        __pipeline_commit();
        __pipeline_wait_prior(0);
        prune_resident<DTYPE>(warp, own, e, row + which, held);
      }
      __syncthreads();  // another tile may hold its rows in the same memory
    } else {
      uint4* held = reinterpret_cast<uint4*>(shared + sizeof(Search));
      __syncthreads();
      start_row<DTYPE>(e, row, held, block.rank, block.size);
      __pipeline_commit();
      __pipeline_wait_prior(0);
      prune_resident<DTYPE>(block, s, e, row, held);
      __syncthreads();
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
