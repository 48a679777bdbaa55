// A row of a few columns in the registers of one thread: each weight is compared with each other.
#pragma once

#include "row_entry.cuh"

namespace antidote::cuda {

constexpr uint32_t kShortest = 16, kShort = 32;

// One bit a column: whether it is among the last `last` of keys[0 .. WIDTH), of which those behind
// the row's end are below every key. A number a weight of how many come after it, four in a word.
template <int WIDTH>
__device__ __forceinline__ uint32_t last_of(const int32_t (&keys)[WIDTH], uint32_t last) {
  uint32_t after[WIDTH / 4];
#pragma unroll
  for (int q = 0; q < WIDTH / 4; ++q) after[q] = 0;
#pragma unroll
  for (int j = 1; j < WIDTH; ++j) {
#pragma unroll
    for (int i = 0; i < j; ++i) {
      const bool later = keys[j] >= keys[i];
      if (later) after[i / 4] += 1u << (8 * (i % 4));
      if (!later) after[j / 4] += 1u << (8 * (j % 4));
    }
  }
  uint32_t taken = 0;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    if (((after[i / 4] >> (8 * (i % 4))) & 0xFFu) < last) taken |= 1u << i;
  }
  return taken;
}

template <int DTYPE, int WIDTH>
__device__ __forceinline__ uint32_t keys_and_last(const RowEntry& e, int64_t row, const float* norm,
                                                  uint32_t last, int32_t (&keys)[WIDTH]) {
  const bool vectors = e.flags & kVectors;
#pragma unroll
  for (int v = 0; v < WIDTH / 8; ++v) {
    const int width = width_at(e.columns, 8 * v);
#pragma unroll
    for (int i = 0; i < 8; ++i) keys[8 * v + i] = kMinKey;
    if (width == 0) continue;
    const Group<DTYPE> group = load_group<DTYPE>(raw_row<DTYPE>(e, row) + 8 * v, width, vectors);
    float norms[8];
    load_norms(norms, norm, e.one, 8 * v, width, vectors);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < width) keys[8 * v + i] = key_of(group.value(i), norms[i]);
    }
  }
  return last_of(keys, last);
}

template <int DTYPE, int WIDTH>
__device__ __forceinline__ void prune_short(const RowEntry& e, int64_t row) {
  const uint32_t valid = e.columns == 32 ? 0xFFFFFFFFu : (1u << e.columns) - 1;
  int32_t keys[WIDTH];
  uint32_t removed = keys_and_last<DTYPE>(e, row, e.norm, e.last, keys) & valid;
  if (e.flags & kSmallest) removed = ~removed & valid;
  if (e.thresholds != nullptr && removed != 0) {
    const bool smallest = e.flags & kSmallest;
    int32_t edge = smallest ? -1 : kMaxKey;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      if ((removed >> i) & 1) edge = smallest ? max(edge, keys[i]) : min(edge, keys[i]);
    }
    e.thresholds[row] = score_of_key(edge);
  }
  if (e.preserve != nullptr && e.preserve_last > 0) {
    removed &= ~keys_and_last<DTYPE>(e, row, e.preserve, e.preserve_last, keys);
  }
#pragma unroll
  for (int v = 0; v < WIDTH / 8; ++v) {
    const int width = width_at(e.columns, 8 * v);
    if (width == 0) continue;
    const uint32_t marks = (removed >> (8 * v)) & 0xFFu;
    if (e.bits != nullptr) e.bits[row * ((e.columns + 7) / 8) + v] = static_cast<uint8_t>(marks);
    if ((e.flags & kWrite) && marks != 0) {
      const Group<DTYPE> group =
          load_group<DTYPE>(raw_row<DTYPE>(e, row) + 8 * v, width, e.flags & kVectors);
      remove_marked<DTYPE>(e, row, 8 * v, group, marks);
    }
  }
}

}  // namespace antidote::cuda
