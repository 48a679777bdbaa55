// n of each m consecutive columns: ranks within a group where m is 1, 2, 4, 8 or 16, else a search
// in each group.
#include <algorithm>

#include "prune.h"
#include "small_groups.cuh"

namespace antidote::cuda {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

bool is_small(int64_t group) { return group <= kLargestSmall && (group & (group - 1)) == 0; }

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
__global__ void __launch_bounds__(kGroupThreads) groups_kernel(const __grid_constant__ Task t) {
  using Raw = typename RawOf<DTYPE>::type;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kGroupThreads / 32);
  const int lane = threadIdx.x % 32;
  for (int64_t number = static_cast<int64_t>(blockIdx.x) * (kGroupThreads / 32) + threadIdx.x / 32;
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

template <int DTYPE, int GROUP>
cudaError_t launch_small(SmallTask task, const Matrix& m, cudaStream_t stream) {
  constexpr int kWidth = GROUP < 8 ? 8 : GROUP;
  ANTIDOTE_TRY(Units::of(m, kWidth, &task.units));
  const int64_t a_block =
      kGroupThreads * units_at_once(kWidth, static_cast<int>(item_size(m.dtype)));
  const Grid grid{(task.units.count + a_block - 1) / a_block, kGroupThreads, 0, stream};
  if (task.units.vector) return launch(grid, small_groups_kernel<DTYPE, GROUP, true>, task);
  return launch(grid, small_groups_kernel<DTYPE, GROUP, false>, task);
}

template <int DTYPE>
cudaError_t prune_small(const Matrix& m, const Plan& plan, cudaStream_t stream) {
  const Counts last = Counts::of(plan, m.columns);
  const SmallTask task{{},
                       m.weight,
                       plan.write || plan.score_delta ? m.base : nullptr,
                       m.act_norm,
                       m.bits,
                       (m.columns + 7) / 8,
                       m.columns / plan.group * plan.group,
                       static_cast<int>(plan.group),
                       static_cast<int>(last.whole),
                       static_cast<int>(last.tail),
                       last.smallest ? 0 : kTops,
                       plan.score_delta,
                       plan.write,
                       1.0f};
  if (plan.group == 16) return launch_small<DTYPE, 16>(task, m, stream);
  if (plan.group == 4) return launch_small<DTYPE, 4>(task, m, stream);
  return launch_small<DTYPE, 8>(task, m, stream);
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
  return launch({blocks, kGroupThreads, 0, stream}, groups_kernel<DTYPE>, task);
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
