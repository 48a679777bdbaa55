// The two readings of all weights that tensor and global scope take: one counts, one removes.
#pragma once

#include "cut_task.cuh"

namespace antidote::cuda {

// What a thread counts in one selection, and where its warp puts the keys that it keeps.
struct Tally {
  uint32_t above = 0, inside = 0, low_equal = 0, high_equal = 0;
  uint32_t next, end;  // places in the warp's chunk
};

// What a selection's block is told; in registers.
struct Bracket {
  int32_t low, top, low_atom, high_atom;
  uint32_t width;
  bool atoms;

  __device__ __forceinline__ explicit Bracket(const CutState& state)
      : low(state.low),
        top(state.top),
        low_atom(state.low_atom),
        high_atom(state.high_atom),
        width(state.width),
        atoms(low_atom != kMinKey || high_atom != kMinKey) {}
};

__device__ __forceinline__ void close_chunk(const Search& search, const Tally& tally) {
  if (threadIdx.x % 32 != 0 || tally.end == 0) return;
  const uint32_t chunk = tally.end / kChunk - 1;
  search.chunk_fill[chunk] = tally.next - chunk * kChunk;
  search.chunk_owner[chunk] = blockIdx.x;
}

// Keeps the keys that `near` marks; the whole warp calls it.
__device__ __forceinline__ void keep(const int32_t (&key)[8], uint32_t near, const Search& search,
                                     uint32_t first_chunks, Tally& tally) {
  const int lane = threadIdx.x % 32;
  const uint32_t count = __popc(near);
  uint32_t until = count;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t before = __shfl_up_sync(kWholeWarp, until, step);
    if (lane >= step) until += before;
  }
  const uint32_t total = __shfl_sync(kWholeWarp, until, 31);
  if (tally.next + total > tally.end) {
    close_chunk(search, tally);
    uint32_t chunk = 0;
    if (lane == 0) chunk = first_chunks + atomicAdd(&search.state->chunks, 1u);
    chunk = __shfl_sync(kWholeWarp, chunk, 0);
    tally.next = tally.end = 0;
    if (chunk >= search.chunks) {
      if (lane == 0) search.state->overflow = 1;
      return;
    }
    tally.next = chunk * kChunk;
    tally.end = tally.next + kChunk;
  }
  int32_t* to = search.keys + (tally.next + until - count);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if ((near >> i) & 1) *to++ = key[i];
  }
  tally.next += total;
}

__device__ __forceinline__ void count_group(const int32_t (&key)[8], uint32_t valid,
                                            const Bracket& bracket, const Search& search,
                                            uint32_t first_chunks, Tally& tally) {
  uint32_t over = 0, near = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (key[i] > bracket.top) over |= 1u << i;
    if (static_cast<uint32_t>(key[i]) - static_cast<uint32_t>(bracket.low) < bracket.width) {
      near |= 1u << i;
    }
  }
  near &= valid;
  tally.above += __popc(over & valid);
  if (bracket.atoms) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t one = (valid >> i) & 1;
      if (key[i] == bracket.low_atom) tally.low_equal += one;
      if (key[i] == bracket.high_atom) tally.high_equal += one;
    }
  }
  if (__any_sync(kWholeWarp, near != 0)) {
    tally.inside += __popc(near);
    keep(key, near, search, first_chunks, tally);
  }
}

struct TallyBuffers {
  uint32_t sums[4][kCutWarps];
};

// Adds what a block counted to memory.
__device__ __forceinline__ void finish(const CutTask& task, const Search& search,
                                       const Tally& tally, TallyBuffers& s) {
  close_chunk(search, tally);
  const uint32_t counts[4] = {tally.above, tally.inside, tally.low_equal, tally.high_equal};
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t sum = __reduce_add_sync(kWholeWarp, counts[i]);
    if (threadIdx.x % 32 == 0) s.sums[i][threadIdx.x / 32] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= 4) return;
  unsigned long long sum = 0;
  for (int w = 0; w < kCutWarps; ++w) sum += s.sums[threadIdx.x][w];
  CutState& state = *search.state;
  unsigned long long* totals[4] = {&state.above, &state.inside, &state.low_equal,
                                   &state.high_equal};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (static_cast<int>(threadIdx.x) == i && sum != 0) atomicAdd(totals[i], sum);
  }
  if (threadIdx.x >= 2) {
    search.equal[(threadIdx.x - 2) * task.stretches + blockIdx.x] = static_cast<uint32_t>(sum);
  }
}

// The first reading: counts the keys above the bracket and keeps those inside. A block a stretch.
template <int DTYPE>
__global__ void __launch_bounds__(kCutThreads, DTYPE == kAny ? 2 : 4)
    cut_count_kernel(const __grid_constant__ CutTask task) {
  ANTIDOTE_SHARED(TallyBuffers, s);
  const bool two = DTYPE == kAny && task.selections > 1;
  const uint32_t first_chunks = static_cast<uint32_t>(task.stretches) * kCutWarps;
  const uint32_t warp = blockIdx.x * kCutWarps + threadIdx.x / 32;
  Tally tally, tally2;
  tally.next = tally2.next = warp * kChunk;
  tally.end = tally2.end = tally.next + kChunk;
  const Bracket bracket(*task.searches[0].state), bracket2(*task.searches[two].state);
  read_tiles<DTYPE>(task.list, stretch_begin(task.list.tiles, task.stretches, blockIdx.x),
                    stretch_begin(task.list.tiles, task.stretches, blockIdx.x + 1),
                    [&](const CutEntry& entry, const Walk& at, const Packed& raw) {
                      const uint32_t valid = bits_below(at.width(entry));
                      int32_t key[8];
                      keys_of_group<DTYPE>(key, entry, at, raw, 0, task.list.delta);
                      count_group(key, valid, bracket, task.searches[0], first_chunks, tally);
                      if (two && entry.norms[1] != nullptr) {
                        keys_of_group<DTYPE>(key, entry, at, raw, 1, task.list.delta);
                        count_group(key, valid, bracket2, task.searches[1], first_chunks, tally2);
                      }
                    });
  finish(task, task.searches[0], tally, s);
  if (two) finish(task, task.searches[1], tally2, s);
}

// Which of a group are taken: keys above `key`, and those equal to it from `place` on.
__device__ __forceinline__ uint32_t taken_of(const int32_t (&key)[8], int32_t cut, int64_t place,
                                             int64_t group_place) {
  const int32_t above = group_place + 8 > place ? cut - 1 : cut;
  uint32_t taken = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (key[i] > above) taken |= 1u << i;
  }
  if (group_place < place && group_place + 8 > place) {  // of the ties, some are
    const int skipped = static_cast<int>(place - group_place);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (key[i] == cut && i < skipped) taken &= ~(1u << i);
    }
  }
  return taken;
}

// The words of `raw`, marked weights with the bits of `base`.
template <bool HALF>
__device__ __forceinline__ Packed merged(const Packed& raw, const Packed& base, uint32_t marks) {
  Packed result = raw;
#pragma unroll
  for (int i = 0; i < (HALF ? 4 : 8); ++i) {
    uint32_t mask;
    if (HALF) {
      mask = ((marks >> (2 * i)) & 1 ? 0xFFFFu : 0) | ((marks >> (2 * i)) & 2 ? 0xFFFF0000u : 0);
    } else {
      mask = (marks >> i) & 1 ? 0xFFFFFFFFu : 0;
    }
    result.word[i] = (raw.word[i] & ~mask) | (base.word[i] & mask);
  }
  return result;
}

__device__ __forceinline__ uint4 four(const uint32_t* word) {
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// Writes a group of which `marks` are removed, not 0.
template <int DTYPE>
__device__ __forceinline__ void remove(const CutEntry& entry, const Walk& at, const Packed& raw,
                                       uint32_t marks) {
  Packed base = {};
  if (entry.base != nullptr) {
    base = load_group<DTYPE>(entry.base, entry.base_stride, entry, at);
  }
  const int64_t place = at.row * entry.weight_stride + static_cast<int64_t>(at.group) * 8;
  auto* halves = static_cast<uint16_t*>(entry.weight) + place;
  auto* words = static_cast<uint32_t*>(entry.weight) + place;
  if (DTYPE != kAny || (entry.vectors && entry.dtype < kFp32)) {
    const Packed result = merged<true>(raw, base, marks);
    *reinterpret_cast<uint4*>(halves) = four(result.word);
  } else if (entry.vectors) {
    const Packed result = merged<false>(raw, base, marks);
    reinterpret_cast<uint4*>(words)[0] = four(result.word);
    reinterpret_cast<uint4*>(words)[1] = four(result.word + 4);
  } else if (entry.dtype < kFp32) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if ((marks >> i) & 1) halves[i] = static_cast<uint16_t>(base.template raw<kBf16>(i));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if ((marks >> i) & 1) words[i] = base.word[i];
    }
  }
}

// The last reading: marks and removes. A group in which nothing is removed is not written.
template <int DTYPE>
__global__ void __launch_bounds__(kCutThreads, DTYPE == kAny ? 2 : 4)
    cut_apply_kernel(const __grid_constant__ CutTask task) {
  const bool two = DTYPE == kAny && task.selections > 1;
  const uint32_t turn = task.smallest ? 0xFFu : 0;
  const int32_t cut = task.searches[0].state->key, cut2 = task.searches[two].state->key;
  const int64_t place = task.searches[0].state->place, place2 = task.searches[two].state->place;
  read_tiles<DTYPE>(task.list, stretch_begin(task.list.tiles, gridDim.x, blockIdx.x),
                    stretch_begin(task.list.tiles, gridDim.x, blockIdx.x + 1),
                    [&](const CutEntry& entry, const Walk& at, const Packed& raw) {
                      const uint32_t valid = bits_below(at.width(entry));
                      if (valid == 0) return;
                      int32_t key[8];
                      keys_of_group<DTYPE>(key, entry, at, raw, 0, task.list.delta);
                      uint32_t removed =
                          (taken_of(key, cut, place, at.place(entry)) ^ turn) & valid;
                      if (two && entry.norms[1] != nullptr) {
                        keys_of_group<DTYPE>(key, entry, at, raw, 1, task.list.delta);
                        removed &= ~taken_of(key, cut2, place2, at.place(entry));
                      }
                      if (entry.bits != nullptr)
                        entry.bits[at.number] = static_cast<uint8_t>(removed);
                      if (task.write && removed != 0) remove<DTYPE>(entry, at, raw, removed);
                    });
}

// Every row of a matrix takes the score at the edge of what is selected.
__global__ void __launch_bounds__(kCutThreads)
    cut_edge_kernel(const __grid_constant__ CutTask task) {
  const CutEntry& entry = task.list.entries[blockIdx.x];
  if (entry.thresholds == nullptr) return;
  const float edge = score_of_key(task.searches[0].state->key);
  for (int64_t row = threadIdx.x; row < entry.rows; row += blockDim.x) entry.thresholds[row] = edge;
}

}  // namespace antidote::cuda
