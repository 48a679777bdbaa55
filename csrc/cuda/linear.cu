// A linear layer from one batch of its input: norms, scores, selection and removal in one launch.
#include <algorithm>

#include "norms.cuh"
#include "row_plan.h"
#include "rows.cuh"

namespace antidote::cuda {
namespace {

constexpr int kMostThreads = 512;  // sums and selection together take 128 registers

// The shared memory serves the sums first, then the rows.
template <int DTYPE>
__global__ __launch_bounds__(kMostThreads,
                             1) void linear_kernel(const __grid_constant__ NormPlan norms,
                                                   float* norm,
                                                   const __grid_constant__ RowEntry entry,
                                                   int stages) {
  unsigned char* shared = dynamic_shared();
  sum_items<DTYPE>(norms, reinterpret_cast<double*>(shared),
                   max(1, static_cast<int>(blockDim.x) / (32 * kNormStrands)));
  grid_sync();
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       column < norms.columns; column += step) {
    norm[column] = __fsqrt_rn(static_cast<float>(combined(norms, column)));
  }
  grid_sync();
  if (entry.flags & kByWarp) {
    const size_t searches = blockDim.x / 32 * sizeof(Search);
    prune_by_warp<DTYPE>(entry, reinterpret_cast<Search*>(shared),
                         reinterpret_cast<uint4*>(shared + searches));
  } else {
    prune_by_block<DTYPE>(entry, *reinterpret_cast<Search*>(shared),
                          reinterpret_cast<uint4*>(shared + sizeof(Search)), stages);
  }
}

template <int DTYPE>
cudaError_t start(RowEntry e, const NormPlan& norms, float* norm, const Device& device,
                  cudaStream_t stream) {
  if (e.flags & kByThread) e.flags ^= kByThread | kByWarp;  // one kind of rows less in the kernel
  const bool by_block = e.flags & kByBlock;
  const int threads = by_block ? threads_of_row(e.columns) : kThreadsOfMany;
  if (threads > kMostThreads) return cudaErrorInvalidConfiguration;
  set_sample_ranks(e, threads);
  const size_t sums = std::max(1, threads / (32 * kNormStrands)) * kNormShared * sizeof(double);
  const int teams = by_block ? 1 : threads / 32;
  const size_t held = held_bytes(by_block ? threads : 32, e.columns, sizeof(Raw<DTYPE>));
  int blocks = 0, stages = by_block ? 3 : 2;
  size_t shared = 0;
  while (blocks == 0) {  // two stages, or one where two leave a processor without a block
    if (--stages == 0) return cudaErrorInvalidConfiguration;
    shared = std::max(sums, teams * (sizeof(Search) + stages * held));
    if (shared > static_cast<size_t>(device.shared_a_block)) continue;
    ANTIDOTE_TRY(resident_blocks(&blocks, linear_kernel<DTYPE>, threads, shared));
  }
  const int64_t grid = static_cast<int64_t>(blocks) * device.processors;
  return launch({grid, threads, shared, stream, true}, linear_kernel<DTYPE>, norms, norm, e,
                stages);
}

}  // namespace

bool serves_linear(const Matrix& matrix, const Plan& plan, const Activations& x) {
  Device device;
  NormPlan norms;
  if (matrix.dtype != x.dtype || current_device(&device) != cudaSuccess) return false;
  const RowEntry e = row_entry(matrix, plan, device);
  return !(e.flags & kByReading) && threads_of_row(e.columns) <= kMostThreads &&
         plan_norms(x, &norms) == cudaSuccess && norms.items > 0;
}

cudaError_t linear_scratch(const Activations& x, size_t* bytes) {
  NormPlan norms;
  ANTIDOTE_TRY(plan_norms(x, &norms));
  *bytes = partial_bytes(norms);
  return cudaSuccess;
}

cudaError_t prune_linear(const Matrix& matrix, const Plan& plan, float* norm, const Activations& x,
                         void* scratch, cudaStream_t stream) {
  Device device;
  NormPlan norms;
  ANTIDOTE_TRY(current_device(&device));
  ANTIDOTE_TRY(plan_norms(x, &norms));
  norms.partials = static_cast<double*>(scratch);
  const RowEntry e = row_entry(matrix, plan, device);
  switch (matrix.dtype) {
    case DType::kBf16:
      return start<kBf16>(e, norms, norm, device, stream);
    case DType::kFp16:
      return start<kFp16>(e, norms, norm, device, stream);
    default:
      return start<kFp32>(e, norms, norm, device, stream);
  }
}

}  // namespace antidote::cuda
