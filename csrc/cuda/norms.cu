// Sums of squares over tokens: one launch, and a second where the tokens are split.
#include <algorithm>

#include "norms.cuh"

namespace antidote::cuda {
namespace {

constexpr int kThreads = 32 * kNormStrands;
constexpr int kResident = 4;         // blocks a processor, all at once: 64 KB of loads in flight
constexpr int64_t kMaxSplits = 128;  // a thread of the second launch reads that many numbers
constexpr int64_t kRuns = 2;         // runs of a strand at least, as a second launch costs more

struct NormShared {
  double sums[kNormShared];
};

template <int DTYPE>
__global__ void __launch_bounds__(kThreads, kResident)
    norm_kernel(const __grid_constant__ NormPlan plan) {
  ANTIDOTE_SHARED(NormShared, shared);
  sum_items<DTYPE>(plan, shared.sums, 1);
}

__global__ void __launch_bounds__(128)
    combine_kernel(const __grid_constant__ NormPlan plan, float* sums) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= plan.columns) return;
  const double total = combined(plan, column);
  sums[column] = static_cast<float>(static_cast<double>(sums[column]) + total);
}

cudaError_t start(const NormPlan& plan, cudaStream_t stream) {
  const Grid grid{plan.items, kThreads, 0, stream};
  switch (plan.dtype) {
    case DType::kBf16:
      return launch(grid, norm_kernel<kBf16>, plan);
    case DType::kFp16:
      return launch(grid, norm_kernel<kFp16>, plan);
    default:
      return launch(grid, norm_kernel<kFp32>, plan);
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Dimensions that lie adjacent in memory become one, those of size 1 none.
cudaError_t merge_dimensions(const Activations& x, NormPlan* plan) {
  int64_t sizes[kNormDims] = {1};
  plan->dims = 0;
  plan->tokens = 1;
  for (size_t d = 0; d < x.sizes.size(); ++d) {
    plan->tokens *= x.sizes[d];
    if (x.sizes[d] == 1) continue;
    const int last = plan->dims - 1;
    if (last >= 0 && plan->strides[last] == x.sizes[d] * x.strides[d]) {
      sizes[last] *= x.sizes[d];
      plan->strides[last] = x.strides[d];
      continue;
    }
    if (plan->dims == kNormDims) return cudaErrorInvalidValue;
    sizes[plan->dims] = x.sizes[d];
    plan->strides[plan->dims++] = x.strides[d];
  }
  if (plan->dims == 0) plan->strides[plan->dims++] = 0;
  for (int d = 0; d < plan->dims; ++d) plan->sizes[d] = Divider::by(sizes[d]);
  return cudaSuccess;
}

}  // namespace

cudaError_t plan_norms(const Activations& x, NormPlan* plan) {
  *plan = {};
  plan->x = x.x;
  plan->token_mask = x.token_mask;
  plan->columns = x.columns;
  plan->dtype = x.dtype;
  ANTIDOTE_TRY(merge_dimensions(x, plan));
  if (plan->tokens == 0 || plan->columns == 0) return cudaSuccess;  // no items
  Device device;
  ANTIDOTE_TRY(current_device(&device));
  const int64_t per_lane = 16 / item_size(x.dtype);
  plan->vector = reinterpret_cast<uintptr_t>(x.x) % 16 == 0 && x.columns % per_lane == 0;
  for (int d = 0; d < plan->dims; ++d) plan->vector &= plan->strides[d] % per_lane == 0;
  while (plan->lane_shift < 5 && (per_lane << plan->lane_shift) < x.columns) ++plan->lane_shift;
  plan->blocks = ceil_div(x.columns, per_lane << plan->lane_shift);
  plan->blocks_of = Divider::by(plan->blocks);
  // All blocks run at the same time: as many splits as that allows, each of whole runs.
  const int64_t step = per_lane * (32 >> plan->lane_shift) * kNormStrands;
  const int64_t wanted = device.processors * kResident / plan->blocks;
  const int64_t most = std::min(kMaxSplits, ceil_div(plan->tokens, step * kRuns));
  const int64_t splits = std::max<int64_t>(std::min(wanted, most), 1);
  plan->per_split = ceil_div(ceil_div(plan->tokens, splits), step) * step;
  plan->splits = ceil_div(plan->tokens, plan->per_split);
  plan->items = plan->splits * plan->blocks;
  // Sizes that no memory holds; kernels count these in 32 bits, and divide below 2^64.
  bool fits = plan->per_split < 1 << 30 && plan->items < 1 << 30;
  for (int d = 1; d < plan->dims; ++d) {
    fits &= Divider::serves(plan->tokens, static_cast<int64_t>(plan->sizes[d].size));
  }
  if (!fits) return cudaErrorInvalidValue;
  return cudaSuccess;
}

cudaError_t norms_scratch(const Activations& x, size_t* bytes) {
  NormPlan plan;
  ANTIDOTE_TRY(plan_norms(x, &plan));
  *bytes = plan.splits > 1 ? partial_bytes(plan) : 0;
  return cudaSuccess;
}

cudaError_t accumulate_sq_norm(float* sq_sum, const Activations& x, void* scratch,
                               cudaStream_t stream) {
  NormPlan plan;
  ANTIDOTE_TRY(plan_norms(x, &plan));
  if (plan.items == 0) return cudaSuccess;
  if (plan.splits == 1) {
    plan.sums = sq_sum;
    return start(plan, stream);
  }
  plan.partials = static_cast<double*>(scratch);
  ANTIDOTE_TRY(start(plan, stream));
  return launch({ceil_div(plan.columns, 128), 128, 0, stream}, combine_kernel, plan, sq_sum);
}

}  // namespace antidote::cuda
