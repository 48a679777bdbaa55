// A row that is read again for each question: too long to be held, or scored in an unusual way.
#pragma once

#include "row_entry.cuh"
#include "row_search.cuh"

namespace antidote::cuda {

template <int DTYPE>
struct Streamed {
  const Raw<DTYPE>* weight;
  const Raw<DTYPE>* base;  // null unless it counts
  const float* norm;
  uint32_t columns;
  int rank, size, column_bits, slots;

  __device__ __forceinline__ uint32_t column(int slot) const { return slot * size + rank; }
  __device__ __forceinline__ bool has(int slot) const { return column(slot) < columns; }
  // Signed keys are moved up to be unsigned.
  __device__ __forceinline__ uint32_t key(int slot) const {
    const uint32_t place = column(slot);
    const uint32_t key = key_at<DTYPE>(weight, base, norm, place, place, place);
    return DTYPE == kSigned ? key + 0x80000000u : key;
  }
  __device__ __forceinline__ uint64_t composite(int slot) const {
    return static_cast<uint64_t>(key(slot)) << column_bits | column(slot);
  }
};

// Composites from here on are the last `last`.
template <int DTYPE>
__device__ __forceinline__ uint64_t streamed_pivot(const Team<false> team, Search& s,
                                                   const Streamed<DTYPE>& row, uint32_t last) {
  if (last == 0) return ~0ull;
  if (last >= row.columns) return 0;
  const int bits = (DTYPE == kSigned ? 32 : 31) + row.column_bits;
  return pivot_by_counting(team, s, row, 0, bits, last);
}

template <int DTYPE>
__device__ __forceinline__ void prune_streamed(const Team<false> team, Search& s, const RowEntry& e,
                                               int64_t row_number) {
  const int slots = (e.columns + team.size - 1) / team.size;
  const Raw<DTYPE>* base = e.base == nullptr ? nullptr : base_row<DTYPE>(e, row_number);
  Streamed<DTYPE> row{raw_row<DTYPE>(e, row_number),
                      e.flags & kDelta ? base : nullptr,
                      e.norm,
                      e.columns,
                      team.rank,
                      team.size,
                      bits_of(e.columns),
                      slots};
  const bool smallest = e.flags & kSmallest;
  const bool preserves = e.preserve != nullptr && e.preserve_last > 0;
  uint64_t pivot = 0, kept_pivot = ~0ull;
#pragma unroll 1
  for (int pass = 0; pass < 1 + preserves; ++pass) {
    row.norm = pass == 0 ? e.norm : e.preserve;
    const uint32_t last = pass == 0 ? e.last : e.preserve_last;
    (pass == 0 ? pivot : kept_pivot) = streamed_pivot(team, s, row, last);
  }
  if (e.thresholds != nullptr && !(e.flags & kUnselected)) {
    row.norm = e.norm;
    int32_t edge = smallest ? -1 : kMaxKey;
    for (int slot = 0; slot < slots; ++slot) {
      if (!row.has(slot) || (row.composite(slot) >= pivot) == smallest) continue;
      const int32_t key = row.key(slot);
      edge = smallest ? max(edge, key) : min(edge, key);
    }
    edge = edge_of_team(team, s, edge, !smallest);
    if (team.rank == 0) e.thresholds[row_number] = score_of_key(edge);
  }
  // A warp decides 32 neighbours at a time, so that four of its lanes hold whole bytes of the mask.
  Raw<DTYPE>* to = const_cast<Raw<DTYPE>*>(row.weight);
  const uint32_t bytes = (e.columns + 7) / 8;
  for (int slot = 0; slot < slots; ++slot) {
    const uint32_t column = row.column(slot);
    bool removed = false;
    if (column < e.columns) {
      row.norm = e.norm;
      removed = (row.composite(slot) >= pivot) != smallest;
      if (removed && preserves) {
        row.norm = e.preserve;
        removed = row.composite(slot) < kept_pivot;
      }
      if (removed && (e.flags & kWrite)) to[column] = base == nullptr ? 0 : base[column];
    }
    const uint32_t marks = __ballot_sync(0xFFFFFFFFu, removed);
    if (e.bits != nullptr && column % 8 == 0 && column < e.columns) {
      e.bits[row_number * bytes + column / 8] = static_cast<uint8_t>(marks >> (column % 32));
    }
  }
}

}  // namespace antidote::cuda
