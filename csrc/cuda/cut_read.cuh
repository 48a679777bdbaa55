// The two readings of all weights that tensor and global scope take: one counts, one removes.
#pragma once

#include "cut_task.cuh"

namespace antidote::cuda {

constexpr int kHeldSlots = 16;  // keys that a thread holds back, so that warps seldom write some
static_assert(kChunk >= 32 * kHeldSlots, "a chunk takes all that a warp holds");

struct CountBuffers {
  int32_t held[2][kHeldSlots * kCutThreads];  // [selections, kHeldSlots, kCutThreads]
  uint32_t sums[4][kCutWarps];
};

// The buffers of kernels with one selection.
struct CountBuffersOfOne {
  int32_t held[1][kHeldSlots * kCutThreads];
  uint32_t sums[4][kCutWarps];
};

// An address in shared memory that a loop moves: 32 bits of a register. A pointer would take 64,
// and each store through an index the base of shared memory anew.
#if defined(ANTIDOTE_SIMT)
using Slot = int32_t*;
__device__ __forceinline__ Slot slot_of(int32_t* shared) { return shared; }
__device__ __forceinline__ int32_t* pointer_of(Slot slot) { return slot; }
__device__ __forceinline__ Slot behind(Slot slot, int count) { return slot + count; }
__device__ __forceinline__ int distance(Slot to, Slot from) { return static_cast<int>(to - from); }
#else
using Slot = uint32_t;
__device__ __forceinline__ Slot slot_of(int32_t* shared) {
  return static_cast<Slot>(__cvta_generic_to_shared(shared));
}
__device__ __forceinline__ int32_t* pointer_of(Slot slot) {
  return static_cast<int32_t*>(__cvta_shared_to_generic(slot));
}
__device__ __forceinline__ Slot behind(Slot slot, int count) { return slot + 4 * count; }
__device__ __forceinline__ int distance(Slot to, Slot from) { return (to - from) / 4; }
#endif

// What a thread counts in one selection, and where its warp puts the keys that it keeps.
struct Tally {
  uint32_t above = 0, inside = 0, low_equal = 0, high_equal = 0;
  Slot held, slot;     // the thread's column of a buffer, and where its next key goes
  uint32_t next, end;  // places in the warp's chunk

  __device__ __forceinline__ explicit Tally(int32_t* buffer)
      : held(slot_of(buffer + threadIdx.x)), slot(held) {
    next = (blockIdx.x * kCutWarps + threadIdx.x / 32) * kChunk;
    end = next + kChunk;
  }
};

// What a block is told of a selection; in registers.
struct Bracket {
  int32_t low, top, low_atom, high_atom;
  uint32_t width;
  bool atoms;

  __device__ __forceinline__ explicit Bracket(const CutState& state)
      : low(state.low),
        top(state.top),
        low_atom(state.low_atom),
        high_atom(state.high_atom),
        width(top < low ? 0 : static_cast<uint32_t>(top) - static_cast<uint32_t>(low) + 1),
        atoms(low_atom != kMinKey || high_atom != kMinKey) {}
};

__device__ __forceinline__ void close_chunk(const CutSearch& search, const Tally& tally) {
  if (threadIdx.x % 32 != 0 || tally.end == 0) return;
  const uint32_t chunk = tally.end / kChunk - 1;
  search.chunk_fill[chunk] = tally.next - chunk * kChunk;
  search.chunk_owner[chunk] = blockIdx.x;
}

// Moves what a warp's threads hold into its chunk, or into the next one; the whole warp calls it.
__device__ __forceinline__ void flush(const CutTask& task, const CutSearch& search, Tally& tally) {
  const int lane = threadIdx.x % 32;
  const uint32_t count = static_cast<uint32_t>(distance(tally.slot, tally.held)) / kCutThreads;
  tally.slot = tally.held;
  tally.inside += count;
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
    if (lane == 0) {
      const auto first = static_cast<uint32_t>(task.stretches) * kCutWarps;
      chunk = first + atomicAdd(&search.state->chunks, 1u);
    }
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
  for (uint32_t i = 0; i < count; ++i) to[i] = *pointer_of(behind(tally.held, i * kCutThreads));
  __syncwarp();
  tally.next += total;
}

template <int DTYPE>
__device__ __forceinline__ void count_group(const int32_t (&key)[8], uint32_t valid,
                                            const Bracket& bracket, const CutTask& task,
                                            const CutSearch& search, Tally& tally) {
  const uint32_t width = valid == 0 ? 0 : bracket.width;
  uint32_t above = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const bool some = DTYPE != kAny || ((valid >> i) & 1) != 0;
    if (DTYPE != kAny) {  // neither is below -1: a subtraction and an addition
      above += static_cast<uint32_t>(bracket.top - key[i]) >> 31;
    } else {
      above += some && key[i] > bracket.top;
    }
    const uint32_t from = static_cast<uint32_t>(key[i]) - static_cast<uint32_t>(bracket.low);
    if (from < width && some) {
      *pointer_of(tally.slot) = key[i];
      tally.slot = behind(tally.slot, kCutThreads);
    }
  }
  if (valid != 0) tally.above += above;
  if (bracket.atoms) {
    uint32_t lows = 0, highs = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool some = DTYPE != kAny || ((valid >> i) & 1) != 0;
      if (key[i] == bracket.low_atom && some) ++lows;
      if (key[i] == bracket.high_atom && some) ++highs;
    }
    if (valid != 0) {
      tally.low_equal += lows;
      tally.high_equal += highs;
    }
  }
  // A group more must find room.
  if (__any_sync(kWholeWarp, distance(tally.slot, tally.held) >= (kHeldSlots - 7) * kCutThreads)) {
    flush(task, search, tally);
  }
}

// Adds what a block counted to memory.
__device__ __forceinline__ void finish(const CutTask& task, const CutSearch& search, Tally& tally,
                                       uint32_t (&sums)[4][kCutWarps]) {
  flush(task, search, tally);
  close_chunk(search, tally);
  const uint32_t counts[4] = {tally.above, tally.inside, tally.low_equal, tally.high_equal};
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t sum = __reduce_add_sync(kWholeWarp, counts[i]);
    if (threadIdx.x % 32 == 0) sums[i][threadIdx.x / 32] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= 4) return;
  unsigned long long sum = 0;
  for (int w = 0; w < kCutWarps; ++w) sum += sums[threadIdx.x][w];
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

template <int DTYPE>
struct BuffersOf {
  using type = CountBuffersOfOne;
};
template <>
struct BuffersOf<kAny> {
  using type = CountBuffers;
};

// The first reading: counts the keys above the bracket and keeps those inside. A block a stretch.
template <int DTYPE>
__global__ void __launch_bounds__(kCutThreads, DTYPE == kAny ? 2 : 4)
    cut_count_kernel(const __grid_constant__ CutTask task) {
  using Buffers = typename BuffersOf<DTYPE>::type;
  ANTIDOTE_SHARED(Buffers, s);
  const bool two = DTYPE == kAny && task.selections > 1;
  Tally tally(s.held[0]), tally2(s.held[DTYPE == kAny]);
  const Bracket bracket(*task.searches[0].state), bracket2(*task.searches[two].state);
  read_tiles<DTYPE>(task.list, stretch_begin(task.list.tiles, task.stretches, blockIdx.x),
                    stretch_begin(task.list.tiles, task.stretches, blockIdx.x + 1),
                    [&](const CutEntry& entry, const Walk& at, const Packed& raw) {
                      const uint32_t valid = at.valid<DTYPE>(entry);
                      int32_t key[8];
                      keys_of_group<DTYPE>(key, entry, at, raw, 0, task.list.delta);
                      count_group<DTYPE>(key, valid, bracket, task, task.searches[0], tally);
                      if (two && entry.in_selection[1]) {
                        keys_of_group<DTYPE>(key, entry, at, raw, 1, task.list.delta);
                        count_group<DTYPE>(key, valid, bracket2, task, task.searches[1], tally2);
                      }
                    });
  finish(task, task.searches[0], tally, s.sums);
  if (two) finish(task, task.searches[1], tally2, s.sums);
}

// Which of a group are taken: keys above `key`, and those equal to it from `place` on.
template <int DTYPE>
__device__ __forceinline__ uint32_t taken_of(const int32_t (&key)[8], int32_t cut, int64_t place,
                                             int64_t group_place) {
  const int32_t above = group_place + 8 > place ? cut - 1 : cut;
  uint32_t taken = 0;
#pragma unroll
  for (int i = 7; i >= 0; --i) {
    if (DTYPE != kAny) {  // neither is below -1: the sign of a difference, shifted in
      taken = __funnelshift_l(static_cast<uint32_t>(above - key[i]), taken, 1);
    } else if (key[i] > above) {
      taken |= 1u << i;
    }
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
    base = load_group<DTYPE>(entry.base, at.base_offset<DTYPE>(entry), entry, at);
  }
  auto* halves = static_cast<uint16_t*>(entry.weight) + at.offset;
  auto* words = static_cast<uint32_t*>(entry.weight) + at.offset;
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
                      const uint32_t valid = at.valid<DTYPE>(entry);
                      if (valid == 0) return;
                      int32_t key[8];
                      keys_of_group<DTYPE>(key, entry, at, raw, 0, task.list.delta);
                      uint32_t removed =
                          (taken_of<DTYPE>(key, cut, place, at.place(entry)) ^ turn) & valid;
                      if (two && entry.in_selection[1]) {
                        keys_of_group<DTYPE>(key, entry, at, raw, 1, task.list.delta);
                        removed &= ~taken_of<DTYPE>(key, cut2, place2, at.place(entry));
                      }
                      if (entry.bits != nullptr)
                        entry.bits[at.number()] = static_cast<uint8_t>(removed);
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
