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
  const float* norms[2];  // never null: `ones` where there is none, with a step of 0
  uint8_t* bits;
  float* thresholds;
  int64_t weight_stride, base_stride;  // elements
  int64_t rows, columns;
  int64_t first[2];     // weights of the matrices before, of those in each selection
  int64_t first_group;  // groups of the matrices before
  int64_t first_tile;
  int dtype;
  int vectors;        // whether all of it loads as 16-byte vectors that never cross a row
  int norm_steps[2];  // from a column's norm to the next one's
  int in_selection[2];
  alignas(16) float ones[8];  // in memory, so that no compiler drops the product that makes every
                              // NaN one key
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
  int64_t row, offset;     // offset: of its first weight, in elements
  uint32_t group, groups;  // its number in the row; of how many
  int32_t left;            // groups from it on; no stretch holds as many as fit an int32_t
  uint32_t step_rows, step_groups;
  int64_t step_offset, wrap_offset, end;

  __device__ __forceinline__ Walk(const CutEntry& entry, int64_t tile) {
    groups = static_cast<uint32_t>((entry.columns + 7) / 8);
    const int64_t number = tile * kCutThreads + threadIdx.x;
    const int64_t behind = entry.rows * groups - number;
    left = static_cast<int32_t>(behind < INT32_MAX ? behind : INT32_MAX);
    end = number + left;
    row = static_cast<int64_t>(static_cast<uint64_t>(number) / groups);
    group = static_cast<uint32_t>(number - row * groups);
    step_rows = kCutThreads / groups;
    step_groups = kCutThreads % groups;
    offset = row * entry.weight_stride + static_cast<int64_t>(group) * 8;
    step_offset = step_rows * entry.weight_stride + static_cast<int64_t>(step_groups) * 8;
    wrap_offset = entry.weight_stride - static_cast<int64_t>(groups) * 8;
  }
  __device__ __forceinline__ void step() {
    left -= kCutThreads;
    row += step_rows;
    group += step_groups;
    offset += step_offset;
    if (group >= groups) {
      group -= groups;
      offset += wrap_offset;
      ++row;
    }
  }
  // Of the group in its matrix.
  __device__ __forceinline__ int64_t number() const { return end - left; }
  __device__ __forceinline__ bool inside() const { return left > 0; }
  // How many columns the group has; 0 behind the last row.
  __device__ __forceinline__ int width(const CutEntry& entry) const {
    if (!inside()) return 0;
    const int64_t rest = entry.columns - static_cast<int64_t>(group) * 8;
    return rest < 8 ? static_cast<int>(rest) : 8;
  }
  // Bits of the columns that are there.
  template <int DTYPE>
  __device__ __forceinline__ uint32_t valid(const CutEntry& entry) const {
    if (DTYPE != kAny) return inside() ? 0xFFu : 0;
    return (1u << width(entry)) - 1;
  }
  // Of the group's first weight, in an order of all of the list.
  __device__ __forceinline__ int64_t place(const CutEntry& entry) const {
    return (entry.first_group + number()) * 8;
  }
  template <int DTYPE>
  __device__ __forceinline__ int64_t base_offset(const CutEntry& entry) const {
    if (DTYPE != kAny) return offset;  // strides are equal
    return row * entry.base_stride + static_cast<int64_t>(group) * 8;
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
__device__ __forceinline__ Packed load_group(const void* data, int64_t offset,
                                             const CutEntry& entry, const Walk& at) {
  Packed p = {};
  if (!at.inside()) return p;
  const auto* halves = static_cast<const uint16_t*>(data) + offset;
  const auto* words = static_cast<const uint32_t*>(data) + offset;
  if (DTYPE != kAny) {
    take(p.word, __ldcg(reinterpret_cast<const uint4*>(halves)));
    return p;
  }
  const int width = at.width(entry);
  if (entry.vectors) {
    if (entry.dtype < kFp32) {
      take(p.word, __ldcg(reinterpret_cast<const uint4*>(halves)));
    } else {
      take(p.word, __ldcg(reinterpret_cast<const uint4*>(words)));
      take(p.word + 4, __ldcg(reinterpret_cast<const uint4*>(words) + 1));
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
__device__ __forceinline__ void load_norms(float (&n)[8], const CutEntry& entry, const Walk& at,
                                           int selection) {
  // Not by index: that would put the entry into memory.
  const int step = selection == 0 ? entry.norm_steps[0] : entry.norm_steps[1];
  const float* norm = selection == 0 ? entry.norms[0] : entry.norms[1];
  norm += at.group * (8u * static_cast<uint32_t>(step));
  if (DTYPE != kAny || entry.vectors) {
    const float4 a = __ldg(reinterpret_cast<const float4*>(norm));
    const float4 b = __ldg(reinterpret_cast<const float4*>(norm) + 1);
    n[0] = a.x, n[1] = a.y, n[2] = a.z, n[3] = a.w;
    n[4] = b.x, n[5] = b.y, n[6] = b.z, n[7] = b.w;
    return;
  }
  const int width = at.width(entry);
#pragma unroll
  for (int i = 0; i < 8; ++i) n[i] = i < width ? norm[i * step] : 0.0f;
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
    load_norms<DTYPE>(n, entry, at, selection);
    score_group<DTYPE == kAny ? kBf16 : DTYPE>(key, raw, raw, n, false);
    return;
  }
  if (entry.dtype == kSigned) {
#pragma unroll
    for (int i = 0; i < 8; ++i) key[i] = key_of_signed(raw.word[i]);
    return;
  }
  load_norms<DTYPE>(n, entry, at, selection);
  Packed base = {};
  if (delta) base = load_group<DTYPE>(entry.base, at.base_offset<DTYPE>(entry), entry, at);
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
    auto tiles = static_cast<int32_t>(end - tile);
    tile = end;
    Walk at = walk;
    Packed raw = load_group<DTYPE>(entry.weight, walk.offset, entry, walk);
    walk.step();
    Walk next_at = walk;
    Packed next = {};
    if (tiles > 1) next = load_group<DTYPE>(entry.weight, walk.offset, entry, walk);
    for (; tiles > 0; --tiles) {
      walk.step();
      Packed last_raw = {};
      if (tiles > 2) last_raw = load_group<DTYPE>(entry.weight, walk.offset, entry, walk);
      body(entry, at, raw);
      at = next_at;
      raw = next;
      next_at = walk;
      next = last_raw;
    }
  }
}

}  // namespace antidote::cuda
