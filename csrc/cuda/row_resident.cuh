// A row that a team holds in shared memory: each thread the weights it loaded itself, in groups of
// eight columns, so that loading needs no barrier and the next row can be on its way.
#pragma once

#include "row_entry.cuh"
#include "row_search.cuh"

namespace antidote::cuda {

// A thread's part of the row, and a norm to score it with.
template <int DTYPE>
struct Resident {
  const uint4* held;  // part p of group v is at [(v * kParts + p) * size + rank]
  const float* norm;
  float one;  // where there is no norm
  uint32_t columns;
  int rank, size, column_bits;
  static constexpr int slots = kSlots;

  __device__ __forceinline__ uint32_t first_column(int v) const { return (v * size + rank) * 8; }
  __device__ __forceinline__ uint32_t column(int slot) const {
    return first_column(slot / 8) + slot % 8;
  }
  __device__ __forceinline__ bool has(int slot) const { return column(slot) < columns; }
  __device__ __forceinline__ Group<DTYPE> group(int v) const {
    Group<DTYPE> result;
#pragma unroll
    for (int p = 0; p < Group<DTYPE>::kParts; ++p) {
      result.part[p] = held[(v * Group<DTYPE>::kParts + p) * size + rank];
    }
    return result;
  }
  __device__ __forceinline__ uint32_t key(int slot) const {
    constexpr int kInPart = 16 / sizeof(Raw<DTYPE>);
    const int part = slot / kInPart;  // groups follow each other in parts
    const uint32_t raw =
        reinterpret_cast<const Raw<DTYPE>*>(held + part * size + rank)[slot % kInPart];
    return key_of(value_of<DTYPE>(raw), norm == nullptr ? one : norm[column(slot)]);
  }
  __device__ __forceinline__ uint64_t composite(int slot) const {
    return static_cast<uint64_t>(key(slot)) << column_bits | column(slot);
  }
  // One bit a slot that the row has.
  __device__ __forceinline__ uint32_t valid() const {
    uint32_t bits = 0;
#pragma unroll
    for (int v = 0; v < kGroups; ++v) {
      bits |= ((1u << width_at(columns, first_column(v))) - 1) << (8 * v);
    }
    return bits;
  }
};

__device__ __forceinline__ void count_coarse(Search& s, uint32_t key, uint32_t& largest) {
  if (key > 0) atomicAdd(&s.coarse[(key >> kCoarseShift) & (kBins - 1)], 1u);
  largest = max(largest, key);
}

// Which of a thread's slots are among the last `last` of the row. 0 < last < columns.
template <int DTYPE, bool WARP>
__device__ __forceinline__ uint32_t select_last(const Team<WARP> team, Search& s,
                                                const Resident<DTYPE> row, uint32_t last,
                                                uint32_t rank_top, uint32_t rank_low, bool vectors,
                                                uint32_t valid) {
  // The sample: two weights of each group, or all of a row of one group a thread.
  uint32_t largest = 0;
  const bool whole = row.columns <= 8u * row.size;
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    const int slot = whole ? i : 8 * (i / 2) + 2 * (i / 2) + i % 2;
    if ((valid >> slot) & 1) count_coarse(s, row.key(slot), largest);
  }
  largest = __reduce_max_sync(0xFFFFFFFFu, largest);
  if ((threadIdx.x & 31) == 0) atomicMax(&s.max_key, largest);
  team.sync();
  if (team.looks()) set_bounds(s, rank_top, rank_low);
  team.sync();
  const uint32_t low = s.low, top = s.top;
  const int shift = s.shift;
  team.clear(s.coarse);
  if (team.rank == 0) s.max_key = s.listed = 0;

  uint32_t below = 0, above = 0;
#pragma unroll(DTYPE == kFp32 ? 1 : 2)
  for (int v = 0; v < kGroups; ++v) {
    const uint32_t column = row.first_column(v);
    if (column >= row.columns) break;
    const Group<DTYPE> group = row.group(v);
    float norms[8];
    load_norms(norms, row.norm, row.one, column, width_at(row.columns, column), vectors);
    uint32_t falls_short = 0, exceeds = 0;
#pragma unroll
    for (int i = 7; i >= 0; --i) {  // a difference's sign is shifted in: two instructions
      const uint32_t key = key_of(group.value(i), norms[i]);
      falls_short = __funnelshift_l(key - low, falls_short, 1);
      exceeds = __funnelshift_l(top - key, exceeds, 1);
    }
    below |= falls_short << (8 * v);
    above |= exceeds << (8 * v);
  }
  above &= valid;
  const uint32_t between = ~(below | above) & valid;
#pragma unroll 1
  for (uint32_t rest = between; rest != 0; rest &= rest - 1) {
    atomicAdd(&s.fine[(row.key(__ffs(rest) - 1) - low) >> shift], 1u);
  }
  const uint32_t number = __reduce_add_sync(0xFFFFFFFFu, __popc(above));
  if ((threadIdx.x & 31) == 0 && number != 0) atomicAdd(&s.above, number);
  team.sync();
  if (team.looks()) {
    const uint32_t certain = s.above;
    if (certain >= last) {
      if ((threadIdx.x & 31) == 0) s.bin = -1;
    } else {
      find_bin(s, last - certain);
    }
  }
  team.sync();
  const int bin = s.bin;
  const uint32_t need = s.need, count = s.count;
  if (team.rank == 0) s.above = 0;
  team.clear(s.fine);

  if (bin < 0 || count > kFew) {  // the bounds missed, or many keys are alike
    const uint64_t first = bin < 0 ? 0 : low + (static_cast<uint64_t>(bin) << shift);
    const int bits = (bin < 0 ? 31 : shift) + row.column_bits;
    const uint64_t pivot =
        pivot_by_counting(team, s, row, first << row.column_bits, bits, bin < 0 ? last : need);
    uint32_t taken = 0;
#pragma unroll 1
    for (int slot = 0; slot < kSlots; ++slot) {
      if (((valid >> slot) & 1) && row.composite(slot) >= pivot) taken |= 1u << slot;
    }
    return taken;
  }

  uint32_t taken = above, listed = 0;
#pragma unroll 1
  for (uint32_t rest = between; rest != 0; rest &= rest - 1) {
    const int slot = __ffs(rest) - 1;
    const int own = static_cast<int>((row.key(slot) - low) >> shift);
    if (own > bin) taken |= 1u << slot;
    if (own == bin) listed |= 1u << slot;
  }
  if (need == count) return taken | listed;
#pragma unroll 1
  for (uint32_t rest = listed; rest != 0; rest &= rest - 1) {
    s.list[atomicAdd(&s.listed, 1u)] = row.composite(__ffs(rest) - 1);
  }
  team.sync();
#pragma unroll 1
  for (uint32_t rest = listed; rest != 0; rest &= rest - 1) {
    const int slot = __ffs(rest) - 1;
    const uint64_t own = row.composite(slot);
    uint32_t larger = 0;
#pragma unroll 1
    for (uint32_t i = 0; i < count; ++i) larger += s.list[i] > own;
    if (larger < need) taken |= 1u << slot;
  }
  return taken;
}

// The score at the edge of what is selected: the smallest selected, or the largest. For reports.
template <int DTYPE, bool WARP>
__device__ __forceinline__ float edge_score(const Team<WARP> team, Search& s,
                                            const Resident<DTYPE> row, uint32_t selected,
                                            bool smallest_selected) {
  int32_t edge = smallest_selected ? kMaxKey : -1;
#pragma unroll 1
  for (uint32_t rest = selected; rest != 0; rest &= rest - 1) {
    const int32_t key = row.key(__ffs(rest) - 1);
    edge = smallest_selected ? min(edge, key) : max(edge, key);
  }
  return score_of_key(edge_of_team(team, s, edge, smallest_selected));
}

template <int DTYPE, bool WARP>
__device__ __forceinline__ void prune_resident(const Team<WARP> team, Search& s, const RowEntry& e,
                                               int64_t row_number, const uint4* held) {
  const bool vectors = e.flags & kVectors;
  Resident<DTYPE> row{held, e.norm, e.one, e.columns, team.rank, team.size, bits_of(e.columns)};
  const uint32_t valid = row.valid();
  uint32_t removed = 0;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {  // what goes, then what is kept of it
    const uint32_t last = pass == 0 ? e.last : e.preserve_last;
    if (pass == 1 && (e.preserve == nullptr || last == 0)) break;
    row.norm = pass == 0 ? e.norm : e.preserve;
    uint32_t taken = last == 0 ? 0 : valid;
    if (last > 0 && last < e.columns) {
      taken = select_last(team, s, row, last, pass == 0 ? e.rank_top : e.preserve_top,
                          pass == 0 ? e.rank_low : e.preserve_low, vectors, valid);
    }
    if (pass == 1) {
      removed &= ~taken;
      break;
    }
    removed = e.flags & kSmallest ? ~taken & valid : taken;
    if (e.thresholds != nullptr && !(e.flags & kUnselected)) {
      const float edge = edge_score(team, s, row, removed, !(e.flags & kSmallest));
      if (team.rank == 0) e.thresholds[row_number] = edge;
    }
  }
#pragma unroll
  for (int v = 0; v < kGroups; ++v) {
    const uint32_t column = row.first_column(v);
    if (column >= e.columns) continue;
    const uint32_t marks = (removed >> (8 * v)) & 0xFFu;
    if (e.bits != nullptr) {
      e.bits[row_number * ((e.columns + 7) / 8) + column / 8] = static_cast<uint8_t>(marks);
    }
    if ((e.flags & kWrite) && marks != 0) {
      remove_marked<DTYPE>(e, row_number, column, row.group(v), marks);
    }
  }
}

// Starts to load a thread's part of a row; there when the pipeline says so.
template <int DTYPE>
__device__ __forceinline__ void start_row(const RowEntry& e, int64_t row_number, uint4* held,
                                          int rank, int size) {
  const Raw<DTYPE>* from = raw_row<DTYPE>(e, row_number);
  constexpr int kParts = Group<DTYPE>::kParts;
#pragma unroll
  for (int v = 0; v < kGroups; ++v) {
    const uint32_t column = (v * size + rank) * 8;
    if (column >= e.columns) continue;
    if (e.flags & kVectors) {
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        __pipeline_memcpy_async(&held[(v * kParts + p) * size + rank],
                                reinterpret_cast<const uint4*>(from + column) + p, 16);
      }
    } else {
      const Group<DTYPE> group =
          load_group<DTYPE>(from + column, width_at(e.columns, column), false);
#pragma unroll
      for (int p = 0; p < kParts; ++p) held[(v * kParts + p) * size + rank] = group.part[p];
    }
  }
}

}  // namespace antidote::cuda
