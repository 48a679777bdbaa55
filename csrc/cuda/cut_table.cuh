// Tensor and global scope: the list of matrices as kernels read it. All of it is one sequence of
// tiles; a tile is kCutThreads groups of 8 columns that follow each other in flat order, across
// rows where rows are short, so that one size serves every shape. Tiles do not cross matrices.
#pragma once

#include "keys.cuh"

namespace antidote::cuda {

constexpr int kAny = 4;  // DTYPE of kernels that take all types, strides and options
constexpr int kCutThreads = 256;
constexpr int kCutWarps = kCutThreads / 32;
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

// Null where absent. Selection 0 is what is removed, 1 what is protected.
struct CutEntry {
  void* weight;
  const void* base;
  const float* norms[2];
  uint8_t* bits;
  float* thresholds;
  int64_t weight_stride, base_stride;  // elements
  int64_t rows, columns;
  int64_t first[2];     // weights of the matrices before, of those in each selection
  int64_t first_group;  // groups of the matrices before
  int64_t first_tile;
  int dtype;
  int vectors;  // whether all of it loads as 16-byte vectors that never cross a row
  float one;    // from memory, so that no compiler drops the product that makes every NaN one key
  int unused;
};

// `entries` ends with one more, whose first_tile is `tiles`.
struct CutList {
  const CutEntry* entries;
  int64_t count, tiles;
  bool delta;
};

// The last entry whose field is <= value.
template <typename Field>
__device__ __forceinline__ int64_t last_not_above(const CutList& list, int64_t value, Field field) {
  int64_t low = 0, high = list.count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (field(list.entries[middle]) <= value ? low : high) = middle;
  }
  return low;
}

// The first tile of stretch number i of `stretches`; the last's end where i is `stretches`.
__device__ __forceinline__ int64_t stretch_begin(int64_t tiles, int64_t stretches, int64_t i) {
  const int64_t share = tiles / stretches, rest = tiles % stretches;
  return i * share + (i < rest ? i : rest);
}

// Where a thread's group lies in its matrix, from one tile to the next.
struct Walk {
  int64_t number;  // of the group
  int64_t row;
  uint32_t group, groups;  // its number in the row; of how many
  uint32_t step_rows, step_groups;

  __device__ __forceinline__ Walk(const CutEntry& entry, int64_t tile) {
    groups = static_cast<uint32_t>((entry.columns + 7) / 8);
    number = tile * kCutThreads + threadIdx.x;
    row = static_cast<int64_t>(static_cast<uint64_t>(number) / groups);
    group = static_cast<uint32_t>(number - row * groups);
    step_rows = kCutThreads / groups;
    step_groups = kCutThreads % groups;
  }
  __device__ __forceinline__ void step() {
    number += kCutThreads;
    row += step_rows;
    group += step_groups;
    if (group >= groups) {
      group -= groups;
      ++row;
    }
  }
  // How many columns the group has; 0 behind the last row.
  __device__ __forceinline__ int width(const CutEntry& entry) const {
    if (row >= entry.rows) return 0;
    const int64_t left = entry.columns - static_cast<int64_t>(group) * 8;
    return left < 8 ? static_cast<int>(left) : 8;
  }
  // Of the group's first weight, in an order of all of the list.
  __device__ __forceinline__ int64_t place(const CutEntry& entry) const {
    return (entry.first_group + number) * 8;
  }
};

// The raw bits of a group: 16-bit weights fill four words, others eight.
struct Packed {
  uint32_t word[8];

  template <int DTYPE>
  __device__ __forceinline__ uint32_t raw(int i) const {
    if (DTYPE >= kFp32) return word[i];
    return i % 2 ? word[i / 2] >> 16 : word[i / 2] & 0xFFFFu;
  }
};

__device__ __forceinline__ void take(uint32_t* word, const uint4& v) {
  word[0] = v.x;
  word[1] = v.y;
  word[2] = v.z;
  word[3] = v.w;
}

template <int DTYPE>
__device__ __forceinline__ Packed load_group(const void* data, int64_t stride,
                                             const CutEntry& entry, const Walk& at) {
  Packed p = {};
  const int width = at.width(entry);
  if (width == 0) return p;
  const int64_t place = at.row * stride + static_cast<int64_t>(at.group) * 8;
  const auto* halves = static_cast<const uint16_t*>(data) + place;
  const auto* words = static_cast<const uint32_t*>(data) + place;
  if (DTYPE != kAny) {
    take(p.word, *reinterpret_cast<const uint4*>(halves));
  } else if (entry.vectors) {
    if (entry.dtype < kFp32) {
      take(p.word, *reinterpret_cast<const uint4*>(halves));
    } else {
      take(p.word, reinterpret_cast<const uint4*>(words)[0]);
      take(p.word + 4, reinterpret_cast<const uint4*>(words)[1]);
    }
  } else if (entry.dtype < kFp32) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < width) p.word[i / 2] |= static_cast<uint32_t>(halves[i]) << (16 * (i % 2));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < width) p.word[i] = words[i];
    }
  }
  return p;
}

template <int DTYPE>
__device__ __forceinline__ void load_norms(float (&n)[8], const float* norm, const CutEntry& entry,
                                           const Walk& at) {
#pragma unroll
  for (int i = 0; i < 8; ++i) n[i] = entry.one;
  const int width = at.width(entry);
  if (norm == nullptr || width == 0) return;
  norm += static_cast<int64_t>(at.group) * 8;
  if (DTYPE != kAny || entry.vectors) {
    const float4 a = __ldg(reinterpret_cast<const float4*>(norm));
    const float4 b = __ldg(reinterpret_cast<const float4*>(norm) + 1);
    n[0] = a.x, n[1] = a.y, n[2] = a.z, n[3] = a.w;
    n[4] = b.x, n[5] = b.y, n[6] = b.z, n[7] = b.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < width) n[i] = norm[i];
  }
}

template <int DTYPE>
__device__ __forceinline__ void score_group(int32_t (&key)[8], const Packed& raw,
                                            const Packed& base, const float (&n)[8], bool delta) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float value = value_of<DTYPE>(raw.template raw<DTYPE>(i));
    if (delta) value = __fsub_rn(value, value_of<DTYPE>(base.template raw<DTYPE>(i)));
    key[i] = key_of(value, n[i]);
  }
}

// The keys of a group by the norm of a selection; those behind the row's end are anything.
template <int DTYPE>
__device__ __forceinline__ void keys_of_group(int32_t (&key)[8], const CutEntry& entry,
                                              const Walk& at, const Packed& raw, int selection,
                                              bool delta) {
  float n[8];
  if (DTYPE != kAny) {
    load_norms<DTYPE>(n, entry.norms[selection], entry, at);
    score_group<DTYPE == kAny ? kBf16 : DTYPE>(key, raw, raw, n, false);
    return;
  }
  if (entry.dtype == kSigned) {
#pragma unroll
    for (int i = 0; i < 8; ++i) key[i] = key_of_signed_raw(raw.word[i]);
    return;
  }
  load_norms<DTYPE>(n, entry.norms[selection], entry, at);
  Packed base = {};
  if (delta) base = load_group<DTYPE>(entry.base, entry.base_stride, entry, at);
  if (entry.dtype == kBf16) {
    score_group<kBf16>(key, raw, base, n, delta);
  } else if (entry.dtype == kFp16) {
    score_group<kFp16>(key, raw, base, n, delta);
  } else {
    score_group<kFp32>(key, raw, base, n, delta);
  }
}

// Calls body(entry, walk, raw) in all threads for each tile of [tile, last), in order; the next
// tile's loads are on their way by then.
template <int DTYPE, typename Body>
__device__ __forceinline__ void read_tiles(const CutList& list, int64_t tile, int64_t last,
                                           Body&& body) {
  if (tile >= last) return;
  int64_t i = last_not_above(list, tile, [](const CutEntry& e) { return e.first_tile; });
  for (; tile < last; ++i) {
    const CutEntry entry = list.entries[i];  // a copy: what is written might be the table
    const int64_t next_tile = list.entries[i + 1].first_tile;
    const int64_t end = next_tile < last ? next_tile : last;
    Walk walk(entry, tile - entry.first_tile);
    Packed next = load_group<DTYPE>(entry.weight, entry.weight_stride, entry, walk);
    for (; tile < end; ++tile) {
      const Walk at = walk;
      const Packed raw = next;
      walk.step();
      if (tile + 1 < end) {
        next = load_group<DTYPE>(entry.weight, entry.weight_stride, entry, walk);
      }
      body(entry, at, raw);
    }
  }
}

// Bits of the columns that are there.
__device__ __forceinline__ uint32_t bits_below(int width) { return (1u << width) - 1; }

}  // namespace antidote::cuda
