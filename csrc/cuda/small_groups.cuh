// n of each m consecutive columns where m is 1, 2, 4, 8 or 16: a thread holds whole groups in its
// registers and counts, for each key, how many of its group come after it.
#pragma once

#include "columns.cuh"

namespace antidote::cuda {

constexpr int kGroupThreads = 256;
constexpr int kLargestSmall = 16;  // a thread keeps so many keys

// Units of a thread, so that it has 32 bytes to load at least.
ANTIDOTE_HD constexpr int units_at_once(int width, int item) { return width * item > 16 ? 1 : 2; }

struct SmallTask {
  Units units;
  void* weight;
  const void* base;  // null where it is not read
  const float* norm;
  uint8_t* bits;
  int64_t bits_stride;
  int64_t whole_columns;  // of a row, in whole groups
  int group, whole, tail;
  uint32_t flip;  // what turns "many come after it" into "removed"
  bool delta, write;
  float one;  // a 1 that the compiler does not know: a NaN must pass a multiplication
};

constexpr uint32_t kTops = 0x88888888u;  // the highest bit of each nibble

// The keys of a unit; below every key past the end of a row.
template <int DTYPE, int WIDTH, bool VECTOR>
__device__ __forceinline__ void unit_keys(const SmallTask& t, int64_t column,
                                          const uint32_t (&words)[kWords<DTYPE, WIDTH>],
                                          const uint32_t (&base)[kWords<DTYPE, WIDTH>],
                                          int32_t (&keys)[WIDTH]) {
  const int valid =
      VECTOR ? WIDTH : static_cast<int>(min(t.units.columns - column, int64_t{WIDTH}));
  float values[WIDTH], norm[WIDTH];
  if (DTYPE == kSigned) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) keys[i] = key_of_signed(raw_of<DTYPE>(words, i));
  } else {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      values[i] = value_of<DTYPE>(raw_of<DTYPE>(words, i));
      norm[i] = t.one;
    }
    if (t.delta) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        values[i] = __fsub_rn(values[i], value_of<DTYPE>(raw_of<DTYPE>(base, i)));
      }
    }
    if (t.norm != nullptr && VECTOR) {
#pragma unroll
      for (int i = 0; i < WIDTH; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(t.norm + column + i);
        norm[i] = four.x, norm[i + 1] = four.y, norm[i + 2] = four.z, norm[i + 3] = four.w;
      }
    } else if (t.norm != nullptr) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        if (i < valid) norm[i] = t.norm[column + i];
      }
    }
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) keys[i] = key_of(values[i], norm[i]);
  }
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    if (!VECTOR && i >= valid) keys[i] = kMinKey;
  }
}

// The top of nibble i of removed[i / 8]: column i of a unit is removed. GROUP is the size of a
// group, or 8 for one that divides 8.
//
// A nibble counts how many of its group come after a key. Before the comparisons all earlier ones
// do and no later one; each then moves a 1 between two nibbles, and none leaves 0 to 15 on the way.
template <int GROUP, int WIDTH, bool VECTOR>
__device__ __forceinline__ void ranked(const SmallTask& t, int64_t column,
                                       const int32_t (&keys)[WIDTH],
                                       uint32_t (&removed)[WIDTH / 8]) {
  const int group = GROUP == 8 ? t.group : GROUP;
#pragma unroll
  for (int w = 0; w < WIDTH / 8; ++w) removed[w] = 0;
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) {
    removed[j / 8] += static_cast<uint32_t>(j & (group - 1)) << (4 * (j % 8));
#pragma unroll
    for (int i = j & ~(GROUP - 1); i < j; ++i) {
      if (keys[j] < keys[i] || (GROUP == 8 && (i ^ j) >= group)) continue;
      const uint32_t one = 1u << (4 * (i % 8)), other = 1u << (4 * (j % 8));
      if (i / 8 == j / 8) {
        removed[i / 8] += one - other;
      } else {
        removed[i / 8] += one;
        removed[j / 8] -= other;
      }
    }
  }
  const int64_t whole = t.whole_columns - column;  // columns left in whole groups
  if (GROUP == 16) {
    const int last = VECTOR || whole > 0 ? t.whole : t.tail;
    const uint32_t bias = (0x80u - last) * 0x01010101u;
#pragma unroll
    for (int w = 0; w < WIDTH / 8; ++w) {
      const uint32_t even = (removed[w] & 0x0F0F0F0Fu) + bias;
      const uint32_t odd = (removed[w] >> 4 & 0x0F0F0F0Fu) + bias;
      removed[w] = (even >> 4 & 0x08080808u) | (odd & 0x80808080u);
    }
  } else {
    uint32_t bias = (8u - t.whole) * 0x11111111u;
    if (!VECTOR) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        if (i >= whole) bias += static_cast<uint32_t>(t.whole - t.tail) << (4 * i);
      }
    }
    removed[0] += bias;
  }
#pragma unroll
  for (int w = 0; w < WIDTH / 8; ++w) {
    removed[w] = (removed[w] ^ t.flip) & kTops;
    const int64_t valid = t.units.columns - column - 8 * w;
    if (!VECTOR && valid < 8) removed[w] &= valid <= 0 ? 0 : (1u << (4 * valid)) - 1;
  }
}

// The tops of nibbles as the bits of a byte.
__device__ __forceinline__ uint8_t byte_of(uint32_t tops) {
  tops = (tops >> 3 | tops >> 6) & 0x03030303u;
  tops = (tops | tops >> 6) & 0x000F000Fu;
  return static_cast<uint8_t>(tops | tops >> 12);
}

// The bits of word i that are removed, of 8 weights.
template <int DTYPE>
__device__ __forceinline__ uint32_t mask_of(uint32_t tops, int i) {
  if (sizeof(typename RawOf<DTYPE>::type) == 4) return tops >> (4 * i + 3) & 1 ? 0xFFFFFFFFu : 0;
  // Byte i of tops has one weight's in its bit 3, the other's in bit 7: to bits 15 and 31.
  const uint32_t two = __byte_perm(tops << 4, tops, 0x4400 + 0x1111 * i) & 0x80008000u;
  return 2 * two - (two >> 15);
}

template <int DTYPE, int GROUP, bool VECTOR>
__global__ void __launch_bounds__(kGroupThreads)
    small_groups_kernel(const __grid_constant__ SmallTask t) {
  using Raw = typename RawOf<DTYPE>::type;
  constexpr int kWidth = GROUP < 8 ? 8 : GROUP, kUnits = units_at_once(kWidth, sizeof(Raw));
  constexpr int kCount = kWords<DTYPE, kWidth>;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kGroupThreads * kUnits + threadIdx.x;
  uint32_t words[kUnits][kCount];
  int64_t rows[kUnits], columns[kUnits];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (first + u * kGroupThreads >= t.units.count) continue;
    const Place place(t.units, first + u * kGroupThreads);
    rows[u] = place.row, columns[u] = place.column;
    const int64_t start = rows[u] * t.units.weight_stride + columns[u];
    load_unit<DTYPE, kWidth>(static_cast<const Raw*>(t.weight) + start, VECTOR,
                             t.units.columns - columns[u], words[u]);
  }
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (first + u * kGroupThreads >= t.units.count) continue;
    const int64_t valid = t.units.columns - columns[u];
    uint32_t base[kCount] = {};
    if (t.base != nullptr) {
      const int64_t start = rows[u] * t.units.base_stride + columns[u];
      load_unit<DTYPE, kWidth>(static_cast<const Raw*>(t.base) + start, VECTOR, valid, base);
    }
    int32_t keys[kWidth];
    unit_keys<DTYPE, kWidth, VECTOR>(t, columns[u], words[u], base, keys);
    uint32_t removed[kWidth / 8];
    ranked<GROUP, kWidth, VECTOR>(t, columns[u], keys, removed);
    if (t.bits != nullptr) {
      uint8_t* bits = t.bits + rows[u] * t.bits_stride + (columns[u] >> 3);
#pragma unroll
      for (int w = 0; w < kWidth / 8; ++w) {
        if (VECTOR || valid > 8 * w) bits[w] = byte_of(removed[w]);
      }
    }
    if (!t.write) continue;
    Raw* weight = static_cast<Raw*>(t.weight) + rows[u] * t.units.weight_stride + columns[u];
#pragma unroll
    for (int i = 0; i < (VECTOR ? kCount : 0); i += 4) {
      constexpr int kEach = kCount / (kWidth / 8);  // words of 8 weights
      uint32_t out[4], dirty = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t mask = mask_of<DTYPE>(removed[(i + j) / kEach], (i + j) % kEach);
        out[j] = (words[u][i + j] & ~mask) | (base[i + j] & mask);
        dirty |= mask;
      }
      if (dirty != 0) {
        reinterpret_cast<uint4*>(weight)[i / 4] = make_uint4(out[0], out[1], out[2], out[3]);
      }
    }
#pragma unroll
    for (int i = 0; i < (VECTOR ? 0 : kWidth); ++i) {
      const bool one = removed[i / 8] >> (4 * (i % 8) + 3) & 1;
      if (one) weight[i] = static_cast<Raw>(raw_of<DTYPE>(base, i));
    }
  }
}

}  // namespace antidote::cuda
