// Where a selection over many weights cuts: what happens between the readings.
#pragma once

#include "cut_task.cuh"

namespace antidote::cuda {

// One weight of each of `sample` equal stretches, or all where they are fewer. Where in its
// stretch is hashed, not random: the same on every run, and never a column.
__device__ __forceinline__ int32_t sampled_key(const CutList& list, const CutSearch& search,
                                               int which, int64_t number) {
  const int64_t begin = number * search.total / search.sample;
  const int64_t end = (number + 1) * search.total / search.sample;
  uint32_t mixed = static_cast<uint32_t>(number) * 2654435761u;
  mixed = (mixed ^ (mixed >> 15)) * 2246822519u;
  mixed = ((mixed ^ (mixed >> 13)) * 3266489917u) >> 1;
  int64_t place = begin + static_cast<int64_t>(mixed) % (end - begin);

  const int64_t i =
      last_not_above(list, place, [which](const CutEntry& e) { return e.first[which]; });
  const CutEntry& entry = list.entries[i];
  place -= entry.first[which];
  const int64_t row = place / entry.columns, column = place - row * entry.columns;
  const int64_t from = row * entry.weight_stride + column;
  const int64_t base_from = row * entry.base_stride + column;
  const bool half = entry.dtype < kFp32;
  const uint32_t raw = half ? static_cast<const uint16_t*>(entry.weight)[from]
                            : static_cast<const uint32_t*>(entry.weight)[from];
  if (entry.dtype == kSigned) return key_of_signed(raw);
  const float n = entry.norms[which][column * entry.norm_steps[which]];
  const auto value = [&entry](uint32_t bits) {
    return entry.dtype == kBf16   ? value_of<kBf16>(bits)
           : entry.dtype == kFp16 ? value_of<kFp16>(bits)
                                  : value_of<kFp32>(bits);
  };
  float w = value(raw);
  if (list.delta) {
    w = __fsub_rn(w, value(half ? static_cast<const uint16_t*>(entry.base)[base_from]
                                : static_cast<const uint32_t*>(entry.base)[base_from]));
  }
  return key_of(w, n);
}

struct BracketBuffers {
  uint32_t bins[2][kDigits];
  ScanBuffers scan;
};

// A block a selection brackets the key of its rank by sampled ones; the others clear the counters
// of the kernels to come.
__global__ void __launch_bounds__(kBracketThreads)
    cut_bracket_kernel(const __grid_constant__ CutTask task, unsigned long long* counters,
                       int64_t size) {
  ANTIDOTE_SHARED(BracketBuffers, s);
  if (static_cast<int>(blockIdx.x) >= task.selections) {
    const int64_t first = blockIdx.x - task.selections, blocks = gridDim.x - task.selections;
    for (int64_t i = first * blockDim.x + threadIdx.x; i < size; i += blocks * blockDim.x) {
      counters[i] = 0;
    }
    return;
  }
  const int which = blockIdx.x;
  const CutSearch& search = task.searches[which];
  const bool bounded[2] = {search.high_rank >= 1, search.low_rank <= search.sample};
  unsigned long long rank[2], held[2] = {0, 0};
  rank[0] = bounded[0] ? search.high_rank : 1;
  rank[1] = bounded[1] ? search.low_rank : search.sample;
  uint32_t prefix[2] = {0, 0};
  if (search.rank > 0) {
    for (int level = 0; level < kLevels; ++level) {
      for (int i = threadIdx.x; i < 2 * kDigits; i += blockDim.x)
        s.bins[i / kDigits][i % kDigits] = 0;
      __syncthreads();
      for (int64_t i = threadIdx.x; i < search.sample; i += blockDim.x) {
        if (level == 0) search.samples[i] = sampled_key(task.list, search, which, i);
        const uint32_t bits = ordered(search.samples[i]);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (same_before(level, bits, prefix[e])) atomicAdd(&s.bins[e][digit_at(level, bits)], 1u);
        }
      }
      __syncthreads();
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t digit =
            find_holder<true>(s.bins[e], kDigits, rank[e], &s.scan, &rank[e], &held[e]);
        prefix[e] |= static_cast<uint32_t>(digit) << digit_shift(level);
      }
      __syncthreads();
    }
  }
  if (threadIdx.x != 0) return;
  const auto heavy = static_cast<unsigned long long>(search.heavy);
  int64_t low = task.list.entries[0].dtype == kSigned ? kMinKey + int64_t{1} : 0, top = kMaxKey;
  CutState state = {};
  state.low_atom = state.high_atom = kMinKey;
  if (bounded[0]) {
    top = key_of_ordered(prefix[0]);
    if (held[0] >= heavy) state.high_atom = static_cast<int32_t>(top--);
  }
  if (bounded[1]) {
    low = key_of_ordered(prefix[1]);
    if (held[1] >= heavy) {
      if (low != state.high_atom) state.low_atom = static_cast<int32_t>(low);
      ++low;
    }
  }
  // A low end of kMaxKey + 1 comes with a top of kMaxKey - 1, and means none as well.
  state.low = static_cast<int32_t>(low > kMaxKey ? kMaxKey : low);
  state.top = static_cast<int32_t>(top);
  state.key = kMaxKey;  // what holds where nothing is taken
  state.place = INT64_MAX;
  *search.state = state;
}

struct FindBuffers {
  uint32_t bins[kDigits];
  ScanBuffers scan;
};

// Calls body(key, stretch) for the keys kept by the first reading; body is called by whole warps,
// with `some` false where there is no key.
template <typename Body>
__device__ __forceinline__ void read_kept(const CutTask& task, const CutSearch& search,
                                          Body&& body) {
  const uint32_t taken = static_cast<uint32_t>(task.stretches) * kCutWarps + search.state->chunks;
  const uint32_t chunks = taken < search.chunks ? taken : search.chunks;
  for (uint32_t c = blockIdx.x; c < chunks; c += gridDim.x) {
    const uint32_t fill = search.chunk_fill[c], owner = search.chunk_owner[c];
    const int32_t* keys = search.keys + static_cast<int64_t>(c) * kChunk;
    for (uint32_t i = threadIdx.x; i - threadIdx.x % 32 < fill; i += blockDim.x) {
      body(i < fill ? keys[i] : 0, owner, i < fill);
    }
  }
}

// Calls body(entry, walk, keys, valid) for the weights of tiles [first, last).
template <typename Body>
__device__ __forceinline__ void read_all(const CutTask& task, int which, int64_t first,
                                         int64_t last, Body&& body) {
  read_tiles<kAny>(task.list, first, last,
                   [&](const CutEntry& entry, const Walk& at, const Packed& raw) {
                     int32_t key[8];
                     keys_of_group<kAny>(key, entry, at, raw, which, task.list.delta);
                     const bool compared = which == 0 || entry.in_selection[1] != 0;
                     body(entry, at, key, compared ? at.valid<kAny>(entry) : 0u);
                   });
}

__device__ __forceinline__ uint32_t equal_bits(const int32_t (&key)[8], int32_t to,
                                               uint32_t valid) {
  uint32_t equal = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (key[i] == to) equal |= 1u << i;
  }
  return equal & valid;
}

// Adds a warp's counts to *counter.
__device__ __forceinline__ void add_warp(uint32_t* counter, uint32_t count) {
  count = __reduce_add_sync(kWholeWarp, count);
  if (threadIdx.x % 32 == 0 && count != 0) atomicAdd(counter, count);
}

// The ties of a part of all tiles.
__device__ __forceinline__ void count_ties(const CutTask& task, int which, int32_t key,
                                           int64_t first, int64_t last, uint32_t* counter) {
  uint32_t count = 0;
  read_all(task, which, first, last,
           [&](const CutEntry&, const Walk&, const int32_t (&keys)[8], uint32_t valid) {
             count += __popc(equal_bits(keys, key, valid));
           });
  add_warp(counter, count);
}

// The key of that rank among those kept, or of all weights; `rest` is its rank among its ties,
// `held` how many they are. All blocks call it, and get the same.
__device__ __forceinline__ int32_t find_key(const CutTask& task, int which, bool kept,
                                            unsigned long long rank, FindBuffers& s,
                                            unsigned long long* rest, unsigned long long* held) {
  const CutSearch& search = task.searches[which];
  const uint32_t low = ordered(search.state->low), top = ordered(search.state->top);
  uint32_t prefix = 0;
  for (int level = 0; level < kLevels; ++level) {
    if (kept && level < kLevels - 1 && same_before(level + 1, low, top)) {
      prefix = low & ~((1u << digit_shift(level)) - 1);
      continue;
    }
    for (int i = threadIdx.x; i < kDigits; i += blockDim.x) s.bins[i] = 0;
    __syncthreads();
    if (kept) {
      read_kept(task, search, [&](int32_t key, uint32_t, bool some) {
        const uint32_t bits = ordered(key);
        if (some && same_before(level, bits, prefix)) {
          atomicAdd(&s.bins[digit_at(level, bits)], 1u);
        }
      });
    } else {
      for (int64_t b = blockIdx.x; b < task.stretches; b += gridDim.x) {
        read_all(task, which, stretch_begin(task.list.tiles, task.stretches, b),
                 stretch_begin(task.list.tiles, task.stretches, b + 1),
                 [&](const CutEntry&, const Walk&, const int32_t (&key)[8], uint32_t valid) {
#pragma unroll
                   for (int i = 0; i < 8; ++i) {
                     const uint32_t bits = ordered(key[i]);
                     if (((valid >> i) & 1) != 0 && same_before(level, bits, prefix)) {
                       atomicAdd(&s.bins[digit_at(level, bits)], 1u);
                     }
                   }
                 });
      }
    }
    __syncthreads();
    unsigned long long* digits = search.digits + level * kDigits;
    for (int i = threadIdx.x; i < kDigits; i += blockDim.x) {
      if (s.bins[i] != 0) atomicAdd(&digits[i], static_cast<unsigned long long>(s.bins[i]));
    }
    grid_sync();
    const int64_t digit = find_holder<true>(digits, kDigits, rank, &s.scan, &rank, held);
    prefix |= static_cast<uint32_t>(digit) << digit_shift(level);
    __syncthreads();
  }
  *rest = rank;
  return key_of_ordered(prefix);
}

// The place of the index-th (from 1) of the ties of a key, which `counts` has by stretches.
__device__ __forceinline__ void find_place(const CutTask& task, int which, int32_t key,
                                           const uint32_t* counts, unsigned long long index,
                                           FindBuffers& s) {
  const CutSearch& search = task.searches[which];
  unsigned long long held;
  int64_t i = find_holder<false>(counts, task.stretches, index, &s.scan, &index, &held);
  const int64_t first = stretch_begin(task.list.tiles, task.stretches, i);
  const int64_t tiles = stretch_begin(task.list.tiles, task.stretches, i + 1) - first;
  const auto part = [&](int64_t number) { return first + stretch_begin(tiles, gridDim.x, number); };
  count_ties(task, which, key, part(blockIdx.x), part(blockIdx.x + 1), search.parts + blockIdx.x);
  grid_sync();
  i = find_holder<false>(search.parts, gridDim.x, index, &s.scan, &index, &held);
  if (i != blockIdx.x) return;
  unsigned long long before = 0;
  read_all(task, which, part(i), part(i + 1),
           [&](const CutEntry& entry, const Walk& at, const int32_t (&keys)[8], uint32_t valid) {
             uint32_t equal = equal_bits(keys, key, valid);
             const unsigned count = __popc(equal);
             const unsigned long long until = before + scan_block(count, &s.scan);
             if (until >= index && until - count < index) {
               for (unsigned long long skip = until - count + 1; skip < index; ++skip) {
                 equal &= equal - 1;
               }
               search.state->place = at.place(entry) + __ffs(equal) - 1 + search.after;
             }
             before += s.scan.total;
           });
}

__device__ __forceinline__ void find_cut(const CutTask& task, int which, FindBuffers& s) {
  const CutSearch& search = task.searches[which];
  CutState& state = *search.state;
  const auto sought = static_cast<unsigned long long>(search.rank);
  const unsigned long long above = state.above, inside = state.inside;
  unsigned long long rest = 0, ties = 0;
  int32_t key = 0;
  const uint32_t* counts = search.ties;
  if (sought > above - state.high_equal && sought <= above) {
    key = state.high_atom;
    rest = sought - (above - state.high_equal);
    ties = state.high_equal;
    counts = search.equal + task.stretches;
  } else if (sought > above + inside && sought <= above + inside + state.low_equal) {
    key = state.low_atom;
    rest = sought - above - inside;
    ties = state.low_equal;
    counts = search.equal;
  } else {
    const bool kept = sought > above && sought <= above + inside && state.overflow == 0;
    key = find_key(task, which, kept, kept ? sought - above : sought, s, &rest, &ties);
    // Where all ties are on one side of the cut, nobody need know where they are.
    if (rest != (search.after ? 1 : ties)) {
      if (kept) {
        read_kept(task, search, [&](int32_t other, uint32_t owner, bool some) {
          add_warp(search.ties + owner, some && other == key);
        });
      } else {
        for (int64_t b = blockIdx.x; b < task.stretches; b += gridDim.x) {
          count_ties(task, which, key, stretch_begin(task.list.tiles, task.stretches, b),
                     stretch_begin(task.list.tiles, task.stretches, b + 1), search.ties + b);
        }
      }
      grid_sync();
    }
  }
  const bool split = rest != (search.after ? 1 : ties);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    state.key = key;
    if (!split) state.place = search.after ? INT64_MAX : 0;
  }
  if (split) find_place(task, which, key, counts, ties - rest + 1, s);
}

// Finds the exact key of the rank, and where its ties begin to be taken. Cooperative.
__global__ void __launch_bounds__(kCutThreads, 2)
    cut_find_kernel(const __grid_constant__ CutTask task) {
  ANTIDOTE_SHARED(FindBuffers, s);
  for (int which = 0; which < task.selections; ++which) {
    if (task.searches[which].rank > 0) find_cut(task, which, s);
  }
}

}  // namespace antidote::cuda
