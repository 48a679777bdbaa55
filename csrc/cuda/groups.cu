// n of each m consecutive columns: ranks within a group where m is 1, 2, 4, 8 or 16, else a search
// in each group.
#include <algorithm>

#include "columns.cuh"
#include "prune.h"

namespace antidote::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLargest = 16;  // a thread keeps so many keys
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

bool is_small(int64_t group) { return group <= kLargest && (group & (group - 1)) == 0; }

// How many of a group come last in the order, of whole groups and of a row's incomplete one; what
// is removed are these or, with `smallest`, the others.
struct Counts {
  int64_t whole, tail;
  bool smallest;

  static Counts of(const Plan& plan, int64_t columns) {
    const int64_t rest = columns % plan.group, fewer = rest * plan.removed / plan.group;
    if (plan.largest) return {plan.removed, fewer, false};
    return {plan.group - plan.removed, rest - fewer, true};
  }
};

struct SmallTask {
  Units units;
  void* weight;
  const void* base;
  const float* norm;
  uint8_t* bits;
  int64_t bits_stride;
  int64_t whole_columns;  // of a row, in whole groups
  int group, whole, tail;
  bool smallest, delta, write;
  float one;  // a 1 that the compiler does not know: a NaN must pass a multiplication
};

// The keys of a unit; below every key past the end of a row.
template <int DTYPE, int WIDTH>
__device__ __forceinline__ void unit_keys(const SmallTask& t, const Place& place,
                                          const uint32_t (&words)[kWords<DTYPE, WIDTH>],
                                          int32_t (&keys)[WIDTH]) {
  using Raw = typename RawOf<DTYPE>::type;
  const int64_t valid = t.units.columns - place.column;
  uint32_t base[kWords<DTYPE, WIDTH>];
  if (t.delta) {
    const int64_t start = place.row * t.units.base_stride + place.column;
    load_unit<DTYPE, WIDTH>(static_cast<const Raw*>(t.base) + start, t.units.vector, valid, base);
  }
  float norm[WIDTH];
  if (t.norm != nullptr && t.units.vector) {
#pragma unroll
    for (int i = 0; i < WIDTH; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(t.norm + place.column + i);
      norm[i] = four.x, norm[i + 1] = four.y, norm[i + 2] = four.z, norm[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      norm[i] = t.norm != nullptr && i < valid ? t.norm[place.column + i] : t.one;
    }
  }
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    const uint32_t raw = raw_of<DTYPE>(words, i);
    if (DTYPE == kSigned) {
      keys[i] = key_of_signed_raw(raw);
    } else {
      float value = value_of<DTYPE>(raw);
      if (t.delta) value = __fsub_rn(value, value_of<DTYPE>(raw_of<DTYPE>(base, i)));
      keys[i] = key_of(value, norm[i]);
    }
    if (!t.units.vector && i >= valid) keys[i] = kMinKey;
  }
}

// Bit i: column i of a unit is removed. GROUP is the group's size, or 8 for one that divides 8.
template <int GROUP, int WIDTH>
__device__ __forceinline__ uint32_t removed_of(const SmallTask& t, int64_t column,
                                               const int32_t (&keys)[WIDTH]) {
  const int group = GROUP == 8 ? t.group : GROUP;
  int after[WIDTH];  // how many of its group come after a key
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) {
    after[j] = j & (group - 1);
#pragma unroll
    for (int i = j & ~(GROUP - 1); i < j; ++i) {
      const bool later = keys[j] >= keys[i] && (GROUP != 8 || (i ^ j) < group);
      after[i] += later;
      after[j] -= later;
    }
  }
  uint32_t removed = 0;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    const int last = t.units.vector || column + i < t.whole_columns ? t.whole : t.tail;
    removed |= static_cast<uint32_t>(after[i] < last) << i;
  }
  if (t.smallest) removed = ~removed;
  const int64_t valid = t.units.vector ? WIDTH : min(t.units.columns - column, int64_t{WIDTH});
  return removed & ((1u << valid) - 1);
}

template <int DTYPE, int GROUP>
constexpr int kUnitWidth = GROUP < 8 ? 8 : GROUP;
template <int DTYPE, int GROUP>
constexpr int kUnitsAtOnce =
    kUnitWidth<DTYPE, GROUP> * sizeof(typename RawOf<DTYPE>::type) > 16 ? 1 : 2;

template <int DTYPE, int GROUP>
__global__ void __launch_bounds__(kThreads)
    small_groups_kernel(const __grid_constant__ SmallTask t) {
  using Raw = typename RawOf<DTYPE>::type;
  constexpr int kWidth = kUnitWidth<DTYPE, GROUP>, kUnits = kUnitsAtOnce<DTYPE, GROUP>;
  constexpr int kCount = kWords<DTYPE, kWidth>;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kUnits + threadIdx.x;
  uint32_t words[kUnits][kCount];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (first + u * kThreads >= t.units.count) continue;
    const Place place(t.units, first + u * kThreads);
    const int64_t start = place.row * t.units.weight_stride + place.column;
    load_unit<DTYPE, kWidth>(static_cast<const Raw*>(t.weight) + start, t.units.vector,
                             t.units.columns - place.column, words[u]);
  }
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (first + u * kThreads >= t.units.count) continue;
    const Place place(t.units, first + u * kThreads);
    int32_t keys[kWidth];
    unit_keys<DTYPE, kWidth>(t, place, words[u], keys);
    const uint32_t removed = removed_of<GROUP, kWidth>(t, place.column, keys);
    if (t.bits != nullptr) {
      uint8_t* bits = t.bits + place.row * t.bits_stride + (place.column >> 3);
      bits[0] = static_cast<uint8_t>(removed);
      if (kWidth == 16 && place.column + 8 < t.units.columns) {
        bits[1] = static_cast<uint8_t>(removed >> 8);
      }
    }
    if (!t.write || removed == 0) continue;
    uint32_t fill[kCount] = {};
    if (t.base != nullptr) {
      const int64_t start = place.row * t.units.base_stride + place.column;
      load_unit<DTYPE, kWidth>(static_cast<const Raw*>(t.base) + start, t.units.vector,
                               t.units.columns - place.column, fill);
    }
    const int64_t start = place.row * t.units.weight_stride + place.column;
    store_removed<DTYPE, kWidth>(static_cast<Raw*>(t.weight) + start, t.units.vector, removed,
                                 words[u], fill);
  }
}

struct Task {
  void* weight;
  const void* base;
  const float* norm;
  uint8_t* marks;
  int64_t weight_stride, base_stride, columns, group;
  int64_t count;  // groups of all rows
  Divider a_row;
  Counts last;
  bool delta, write;
};

// A group of any size, in memory.
template <int DTYPE>
struct Group {
  using Raw = typename RawOf<DTYPE>::type;
  const void* weight;
  const void* base;  // null: no difference
  const float* norm;
  int64_t size;

  __device__ __forceinline__ int32_t key(int64_t i) const {
    const int32_t key = key_at<DTYPE>(weight, base, norm, i, i, i);
    return DTYPE != kSigned && key > 0x7F800000 ? kCanonicalNan : key;
  }

  // How many keys are at least `bound`; the same in all lanes of the warp.
  __device__ __forceinline__ int64_t at_least(int32_t bound) const {
    int64_t own = 0;
    for (int64_t i = threadIdx.x % 32; i < size; i += 32) own += key(i) >= bound;
    for (int offset = 16; offset > 0; offset /= 2) {
      own += __shfl_xor_sync(kAllLanes, own, offset);
    }
    return own;
  }
};

// Those that come last of a group: keys above `key`, and of those equal to it the last `ties`.
struct Edge {
  int32_t key;
  int64_t ties;
};

template <int DTYPE>
__device__ __forceinline__ Edge edge_of(const Group<DTYPE>& group, int64_t last) {
  if (last == 0) return {kMaxKey, 0};
  int32_t low = kMaxKey, high = kMinKey;
  for (int64_t i = threadIdx.x % 32; i < group.size; i += 32) {
    const int32_t key = group.key(i);
    low = min(low, key), high = max(high, key);
  }
  low = __reduce_min_sync(kAllLanes, low);
  high = __reduce_max_sync(kAllLanes, high);
  while (low < high) {  // at least `last` keys are >= low, fewer are > high
    const uint32_t half = (static_cast<uint32_t>(high) - static_cast<uint32_t>(low) + 1) / 2;
    const int32_t middle = static_cast<int32_t>(static_cast<uint32_t>(low) + half);
    const int64_t count = group.at_least(middle);
    if (count == last) return {middle, INT64_MAX};
    if (count > last) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return {low, low == kMaxKey ? last : last - group.at_least(low + 1)};
}

// A warp a group.
template <int DTYPE>
__global__ void __launch_bounds__(kThreads) groups_kernel(const __grid_constant__ Task t) {
  using Raw = typename RawOf<DTYPE>::type;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  const int lane = threadIdx.x % 32;
  for (int64_t number = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
       number < t.count; number += warps) {
    const int64_t row = t.a_row.quotient(number);
    const int64_t column = t.a_row.remainder(number, row) * t.group;
    Raw* weight = static_cast<Raw*>(t.weight) + row * t.weight_stride + column;
    const Raw* base = nullptr;
    if (t.base != nullptr) {
      base = static_cast<const Raw*>(t.base) + row * t.base_stride + column;
    }
    const Group<DTYPE> group{weight, t.delta ? base : nullptr,
                             t.norm == nullptr ? nullptr : t.norm + column,
                             min(t.group, t.columns - column)};
    const Edge edge = edge_of(group, group.size == t.group ? t.last.whole : t.last.tail);
    uint8_t* marks = t.marks == nullptr ? nullptr : t.marks + row * t.columns + column;
    int64_t ties = 0;  // met on the way from the end
    for (int64_t begin = (group.size - 1) / 32 * 32; begin >= 0; begin -= 32) {
      const int64_t i = begin + lane;
      const bool inside = i < group.size;
      const int32_t key = inside ? group.key(i) : kMinKey;
      const unsigned tied = __ballot_sync(kAllLanes, inside && key == edge.key);
      const int64_t later = ties + __popc(tied & ~((2u << lane) - 1));
      ties += __popc(tied);
      if (!inside) continue;
      const bool last = key > edge.key || (key == edge.key && later < edge.ties);
      const bool removed = last != t.last.smallest;
      if (marks != nullptr) marks[i] = removed;
      if (t.write && removed) weight[i] = base == nullptr ? Raw{0} : base[i];
    }
  }
}

template <int DTYPE>
cudaError_t prune_small(const Matrix& m, const Plan& plan, cudaStream_t stream) {
  const int width = plan.group == 16 ? 16 : 8;
  const Counts last = Counts::of(plan, m.columns);
  SmallTask task{{},
                 m.weight,
                 m.base,
                 m.act_norm,
                 m.bits,
                 (m.columns + 7) / 8,
                 m.columns / plan.group * plan.group,
                 static_cast<int>(plan.group),
                 static_cast<int>(last.whole),
                 static_cast<int>(last.tail),
                 last.smallest,
                 plan.score_delta,
                 plan.write,
                 1.0f};
  ANTIDOTE_TRY(Units::of(m, width, &task.units));
  const int at_once = width * item_size(m.dtype) > 16 ? 1 : 2;
  const int64_t units = kThreads * at_once;
  const Grid grid{(task.units.count + units - 1) / units, kThreads, 0, stream};
  if (plan.group == 16) return launch(grid, small_groups_kernel<DTYPE, 16>, task);
  if (plan.group == 4) return launch(grid, small_groups_kernel<DTYPE, 4>, task);
  return launch(grid, small_groups_kernel<DTYPE, 8>, task);
}

template <int DTYPE>
cudaError_t prune_any(const Matrix& m, const Plan& plan, uint8_t* marks, cudaStream_t stream) {
  const int64_t a_row = (m.columns + plan.group - 1) / plan.group;
  const Task task{m.weight,
                  m.base,
                  m.act_norm,
                  marks,
                  m.weight_stride,
                  m.base_stride,
                  m.columns,
                  plan.group,
                  m.rows * a_row,
                  Divider::by(a_row),
                  Counts::of(plan, m.columns),
                  plan.score_delta,
                  plan.write};
  if (!Divider::serves(task.count, a_row)) return cudaErrorInvalidValue;
  Device device;
  ANTIDOTE_TRY(current_device(&device));
  const int64_t blocks = std::min<int64_t>((task.count + 7) / 8, device.processors * 32);
  return launch({blocks, kThreads, 0, stream}, groups_kernel<DTYPE>, task);
}

template <int DTYPE>
cudaError_t prune(const Matrix& m, const Plan& plan, uint8_t* marks, cudaStream_t stream) {
  if (is_small(plan.group)) return prune_small<DTYPE>(m, plan, stream);
  return prune_any<DTYPE>(m, plan, marks, stream);
}

}  // namespace

bool needs_marks(const Plan& plan) { return !is_small(plan.group); }

cudaError_t prune_groups(const Matrix& m, const Plan& plan, uint8_t* marks, cudaStream_t stream) {
  if (plan.is_signed) return prune<kSigned>(m, plan, marks, stream);
  switch (m.dtype) {
    case DType::kBf16:
      return prune<kBf16>(m, plan, marks, stream);
    case DType::kFp16:
      return prune<kFp16>(m, plan, marks, stream);
    default:
      return prune<kFp32>(m, plan, marks, stream);
  }
}

}  // namespace antidote::cuda
