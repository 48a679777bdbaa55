// One matrix as the row kernels read it, and how its weights are read and written.
#pragma once

#include "keys.cuh"

namespace antidote::cuda {

// Null where absent. The last `last` of a row are selected, or all but those (kSmallest).
struct alignas(16) RowEntry {
  void* weight;
  const void* base;
  const float* norm;
  const float* preserve;
  uint8_t* bits;
  float* thresholds;
  int64_t weight_stride, base_stride;  // elements
  int64_t rows;
  int64_t first_tile;  // in a list: tiles of the matrices before
  uint32_t columns, last, preserve_last;
  // Ranks, in the sample of a row, of the bounds of what is looked for; then of what is kept.
  uint32_t rank_top, rank_low, preserve_top, preserve_low;
  uint32_t flags;
  float one;  // 1, which the compiler must not know: times it, every NaN becomes the same
};

constexpr uint32_t kWrite = 1, kSmallest = 2;
constexpr uint32_t kVectors = 4;  // 16-byte loads and stores of whole groups
constexpr uint32_t kDelta = 8;    // scored as |weight - base|
constexpr uint32_t kByBlock = 16, kByWarp = 32, kByThread = 64, kByReading = 128;
constexpr uint32_t kUnselected = 256;  // the edge is of an empty selection

template <int DTYPE>
using Raw = typename RawOf<DTYPE>::type;

// Eight neighbours: 16 bytes of 16-bit weights, twice that of others.
template <int DTYPE>
struct Group {
  static constexpr int kParts = sizeof(Raw<DTYPE>) / 2;
  uint4 part[kParts];

  __device__ __forceinline__ uint32_t word(int i) const {
    const uint4& p = part[i / 4];
    return i % 4 == 0 ? p.x : i % 4 == 1 ? p.y : i % 4 == 2 ? p.z : p.w;
  }
  __device__ __forceinline__ void set_word(int i, uint32_t to) {
    uint4& p = part[i / 4];
    (i % 4 == 0 ? p.x : i % 4 == 1 ? p.y : i % 4 == 2 ? p.z : p.w) = to;
  }
  __device__ __forceinline__ float value(int i) const {
    if (sizeof(Raw<DTYPE>) == 4) return __uint_as_float(word(i));
    if (DTYPE == kBf16)
      return __uint_as_float(i % 2 ? word(i / 2) & 0xFFFF0000u : word(i / 2) << 16);
    return half_to_float(i % 2 ? word(i / 2) >> 16 : word(i / 2) & 0xFFFFu);
  }
  // Marked weights take the bits of `other`'s.
  __device__ __forceinline__ void replace(uint32_t marks, const Group& other) {
#pragma unroll
    for (int i = 0; i < 4 * kParts; ++i) {
      uint32_t mask;
      if (sizeof(Raw<DTYPE>) == 4) {
        mask = (marks >> i) & 1 ? 0xFFFFFFFFu : 0;
      } else {
        const uint32_t two = marks >> (2 * i);
        mask = ((two & 1) | ((two & 2) << 15)) * 0xFFFFu;
      }
      set_word(i, (word(i) & ~mask) | (other.word(i) & mask));
    }
  }
  __device__ __forceinline__ void set_zero() {
#pragma unroll
    for (int p = 0; p < kParts; ++p) part[p] = make_uint4(0, 0, 0, 0);
  }
};

template <int DTYPE>
__device__ __forceinline__ const Raw<DTYPE>* raw_row(const RowEntry& e, int64_t row) {
  return static_cast<const Raw<DTYPE>*>(e.weight) + row * e.weight_stride;
}

template <int DTYPE>
__device__ __forceinline__ const Raw<DTYPE>* base_row(const RowEntry& e, int64_t row) {
  return static_cast<const Raw<DTYPE>*>(e.base) + row * e.base_stride;
}

// How many of the eight columns from `column` on the row has.
__device__ __forceinline__ int width_at(uint32_t columns, uint32_t column) {
  return column >= columns ? 0 : min(8u, columns - column);
}

template <int DTYPE>
__device__ __forceinline__ Group<DTYPE> load_group(const Raw<DTYPE>* from, int width,
                                                   bool vectors) {
  Group<DTYPE> group;
  if (vectors) {
#pragma unroll
    for (int p = 0; p < Group<DTYPE>::kParts; ++p) {
      group.part[p] = reinterpret_cast<const uint4*>(from)[p];
    }
    return group;
  }
  group.set_zero();
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i >= width) continue;
    const uint32_t raw = from[i];
    if (sizeof(Raw<DTYPE>) == 4) {
      group.set_word(i % (4 * Group<DTYPE>::kParts), raw);
    } else {
      group.set_word(i / 2, group.word(i / 2) | raw << (16 * (i % 2)));
    }
  }
  return group;
}

// Eight norms from `column` on; `one` where there are none. The usual case comes first and alone,
// or its registers are filled with the other cases' values before.
__device__ __forceinline__ void load_norms(float (&n)[8], const float* norm, float one,
                                           uint32_t column, int width, bool vectors) {
  if (vectors && norm != nullptr) {
    const float4* from = reinterpret_cast<const float4*>(norm + column);
    const float4 a = from[0], b = from[1];
    n[0] = a.x, n[1] = a.y, n[2] = a.z, n[3] = a.w;
    n[4] = b.x, n[5] = b.y, n[6] = b.z, n[7] = b.w;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) n[i] = norm == nullptr || i >= width ? one : norm[column + i];
  }
}

// Removes the marked ones of eight weights at `to`, whose contents are `group`.
template <int DTYPE>
__device__ __forceinline__ void remove_marked(const RowEntry& e, int64_t row, uint32_t column,
                                              Group<DTYPE> group, uint32_t marks) {
  Raw<DTYPE>* to = const_cast<Raw<DTYPE>*>(raw_row<DTYPE>(e, row)) + column;
  const Raw<DTYPE>* base = e.base == nullptr ? nullptr : base_row<DTYPE>(e, row) + column;
  if (e.flags & kVectors) {
    Group<DTYPE> other;
    other.set_zero();
    if (base != nullptr) other = load_group<DTYPE>(base, 8, true);
    group.replace(marks, other);
#pragma unroll
    for (int p = 0; p < Group<DTYPE>::kParts; ++p) reinterpret_cast<uint4*>(to)[p] = group.part[p];
    return;
  }
  for (int i = 0; i < 8; ++i) {
    if ((marks >> i) & 1) to[i] = base == nullptr ? Raw<DTYPE>(0) : base[i];
  }
}

}  // namespace antidote::cuda
