#include <algorithm>

#include "row_plan.h"
#include "rows.cuh"
#include "table.cuh"

namespace antidote::cuda {
namespace {

constexpr int kThreadsOfMixed = 352;     // the most of a list's block: it has all kinds of rows
constexpr int64_t kAlone = 16 << 20;     // weights of a matrix that has a launch of its own,
constexpr int64_t kTogether = 64 << 20;  // where the list has more than this
constexpr int kNormReserve = 16 << 10;   // bytes of nearest cache beside the norms

template <int DTYPE>
__global__ __launch_bounds__(DTYPE == kFp32 ? 512 : 1024) void rows_by_block(
    const __grid_constant__ RowEntry entry, int stages) {
  ANTIDOTE_SHARED(Search, search);
  prune_by_block<DTYPE>(entry, search, reinterpret_cast<uint4*>(dynamic_shared()), stages);
}

template <int DTYPE>
__global__ __launch_bounds__(kThreadsOfMany,
                             4) void rows_by_warp(const __grid_constant__ RowEntry entry) {
  unsigned char* shared = dynamic_shared();
  Search* searches = reinterpret_cast<Search*>(shared);
  prune_by_warp<DTYPE>(entry, searches,
                       reinterpret_cast<uint4*>(shared + blockDim.x / 32 * sizeof(Search)));
}

template <int DTYPE>
__global__ __launch_bounds__(kThreadsOfMany) void rows_by_thread(
    const __grid_constant__ RowEntry entry) {
  prune_by_thread<DTYPE>(entry, static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x);
}

template <int DTYPE>
__global__ __launch_bounds__(1024) void rows_by_reading(const RowEntry* list, int number,
                                                        int64_t tiles) {
  ANTIDOTE_SHARED(Search, search);
  prune_streamed_tiles<DTYPE>(list, number, tiles, search);
}

template <int DTYPE>
__global__ __launch_bounds__(kThreadsOfMixed, 2) void rows_of_list(const RowEntry* list, int number,
                                                                   int64_t tiles) {
  prune_tiles<DTYPE>(list, number, tiles, dynamic_shared());
}

// Blocks of a persistent grid.
template <typename... P>
cudaError_t persistent(int64_t* blocks, void (*kernel)(P...), int threads, size_t shared,
                       const Device& device, int64_t work) {
  int resident;
  ANTIDOTE_TRY(resident_blocks(&resident, kernel, threads, shared));
  *blocks =
      std::min<int64_t>(work, static_cast<int64_t>(device.processors) * std::max(resident, 1));
  return cudaSuccess;
}

// Blocks of a multiprocessor that leave the norms their place in its nearest cache.
int beside_norms(const Device& device, const RowEntry& e, size_t shared) {
  const int64_t norms = int64_t{4} * e.columns * (e.preserve == nullptr ? 1 : 2) + kNormReserve;
  return static_cast<int>(std::max<int64_t>(1, (device.shared - norms) / (shared + 1024)));
}

template <int DTYPE>
cudaError_t launch_by_block(RowEntry e, const Device& device, cudaStream_t stream) {
  const int threads = threads_of_row(e.columns);
  set_sample_ranks(e, threads);
  const size_t held = held_bytes(threads, e.columns, sizeof(Raw<DTYPE>));
  int blocks[2] = {};
  for (int stages = 1; stages <= 2; ++stages) {
    const size_t shared = stages * held + sizeof(Search);
    if (shared > static_cast<size_t>(device.shared_a_block)) break;
    int resident;
    ANTIDOTE_TRY(resident_blocks(&resident, rows_by_block<DTYPE>, threads, stages * held));
    blocks[stages - 1] = std::min(resident, beside_norms(device, e, shared));
  }
  // Two stages overlap loading within a block, more blocks overlap it among them.
  const int stages = blocks[1] > 0 && 10 * blocks[1] >= 7 * blocks[0] ? 2 : 1;
  const int64_t grid =
      std::min(e.rows, static_cast<int64_t>(device.processors) * std::max(blocks[stages - 1], 1));
  return launch({grid, threads, stages * held, stream}, rows_by_block<DTYPE>, e, stages);
}

template <int DTYPE>
cudaError_t launch_one(RowEntry e, const Device& device, cudaStream_t stream) {
  if (e.flags & kByBlock) return launch_by_block<DTYPE>(e, device, stream);
  if (e.flags & kByThread) {
    const int64_t blocks = (e.rows + kThreadsOfMany - 1) / kThreadsOfMany;
    return launch({blocks, kThreadsOfMany, 0, stream}, rows_by_thread<DTYPE>, e);
  }
  constexpr int kWarps = kThreadsOfMany / 32;
  set_sample_ranks(e, 32);
  const size_t shared = kWarps * (sizeof(Search) + held_bytes(32, e.columns, sizeof(Raw<DTYPE>)));
  int64_t blocks;
  ANTIDOTE_TRY(persistent(&blocks, rows_by_warp<DTYPE>, kThreadsOfMany, shared, device,
                          (e.rows + kWarps - 1) / kWarps));
  return launch({blocks, kThreadsOfMany, shared, stream}, rows_by_warp<DTYPE>, e);
}

template <int DTYPE>
cudaError_t launch_list(std::vector<RowEntry> entries, bool by_reading, const Device& device,
                        RowEntry* scratch, cudaStream_t stream) {
  const ListPlan plan = plan_list(entries, sizeof(Raw<DTYPE>));
  ANTIDOTE_TRY(upload(entries, scratch, stream));
  const RowEntry* list = scratch;
  const int number = static_cast<int>(entries.size());
  int64_t blocks;
  if (by_reading) {
    ANTIDOTE_TRY(persistent(&blocks, rows_by_reading<DTYPE>, plan.threads, 0, device, plan.tiles));
    return launch({blocks, plan.threads, 0, stream}, rows_by_reading<DTYPE>, list, number,
                  plan.tiles);
  }
  if constexpr (DTYPE != kSigned) {
    ANTIDOTE_TRY(
        persistent(&blocks, rows_of_list<DTYPE>, plan.threads, plan.shared, device, plan.tiles));
    return launch({blocks, plan.threads, plan.shared, stream}, rows_of_list<DTYPE>, list, number,
                  plan.tiles);
  }
  return cudaErrorInvalidValue;
}

// What one launch takes: matrices of a list together, or one that is better off alone.
struct Share {
  std::vector<RowEntry> entries;
  bool by_reading = false;
  bool alone = false;
};

std::vector<Share> parts_of(const Matrices& matrices, const Plan& plan, DType dtype,
                            const Device& device) {
  Share together, read;
  read.by_reading = true;
  std::vector<Share> parts;
  int64_t total = 0, members = 0;
  for (const Matrix& m : matrices) {
    if (m.dtype == dtype) total += m.rows * m.columns, ++members;
  }
  for (const Matrix& m : matrices) {
    if (m.dtype != dtype) continue;
    const RowEntry e = row_entry(m, plan, device);
    if (e.flags & kByReading) {
      read.entries.push_back(e);
    } else if (members == 1 || threads_of_row(e.columns) > kThreadsOfMixed ||
               (total > kTogether && m.rows * m.columns >= kAlone)) {
      parts.push_back({{e}, false, true});
    } else {
      together.entries.push_back(e);
    }
  }
  if (!together.entries.empty()) {
    together.alone = together.entries.size() == 1;
    parts.push_back(together);
  }
  if (!read.entries.empty()) parts.push_back(read);
  return parts;
}

template <int DTYPE>
cudaError_t prune_parts(const Matrices& matrices, const Plan& plan, DType dtype, RowEntry* scratch,
                        cudaStream_t stream) {
  Device device;
  ANTIDOTE_TRY(current_device(&device));
  for (const Share& part : parts_of(matrices, plan, dtype, device)) {
    if constexpr (DTYPE != kSigned) {
      if (part.alone) {
        ANTIDOTE_TRY(launch_one<DTYPE>(part.entries[0], device, stream));
        continue;
      }
    }
    ANTIDOTE_TRY(launch_list<DTYPE>(part.entries, part.by_reading, device, scratch, stream));
    scratch += part.entries.size();
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t rows_scratch(const Matrices& matrices, const Plan&, size_t* bytes) {
  *bytes = matrices.size() * sizeof(RowEntry);
  return cudaSuccess;
}

cudaError_t prune_rows(const Matrices& matrices, const Plan& plan, void* scratch,
                       cudaStream_t stream) {
  RowEntry* list = static_cast<RowEntry*>(scratch);
  if (plan.is_signed) return prune_parts<kSigned>(matrices, plan, DType::kFp32, list, stream);
  int64_t number = 0;  // dtypes have lists of their own, one after the other
  for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    auto is_one = [dtype](const Matrix& m) { return m.dtype == dtype; };
    const int64_t members = std::count_if(matrices.begin(), matrices.end(), is_one);
    if (members == 0) continue;
    if (dtype == DType::kBf16) {
      ANTIDOTE_TRY(prune_parts<kBf16>(matrices, plan, dtype, list + number, stream));
    } else if (dtype == DType::kFp16) {
      ANTIDOTE_TRY(prune_parts<kFp16>(matrices, plan, dtype, list + number, stream));
    } else {
      ANTIDOTE_TRY(prune_parts<kFp32>(matrices, plan, dtype, list + number, stream));
    }
    number += members;
  }
  return cudaSuccess;
}

}  // namespace antidote::cuda
