// How device code meets its surroundings: nvcc and the CUDA runtime, or g++ and csrc/simt. Kernels
// use CUDA's own words; the few things that differ are named here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>

#if defined(ANTIDOTE_SIMT)
#include "simt/simt.h"
#else
#include <cuda_runtime.h>
#if defined(__CUDACC__)  // the host's compiler reads this file too
#include <cooperative_groups.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

// Shared memory of a kernel: `ANTIDOTE_SHARED(Buffers, s);` makes `Buffers& s`, one a block.
#define ANTIDOTE_SHARED(type, name) __shared__ __align__(16) type name

namespace antidote::cuda {

// The dynamic shared memory of a launch, 16-byte aligned.
__device__ static inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// Waits for all threads of a cooperative launch.
__device__ static inline void grid_sync() { cooperative_groups::this_grid().sync(); }

}  // namespace antidote::cuda
#endif
#endif

namespace antidote::cuda {

struct Grid {
  int64_t blocks;
  int threads;
  size_t shared;  // bytes of dynamic shared memory
  cudaStream_t stream;
  bool cooperative = false;
};

template <typename T>
struct Same {
  using type = T;
};

// The current device.
struct Device {
  int processors;      // multiprocessors
  int shared;          // bytes of shared memory a multiprocessor
  int shared_a_block;  // the most that one block may ask for
};
cudaError_t current_device(Device* device);

// Whether kernels of this build run there: the driver is new enough, and there is code for it.
cudaError_t probe();

#if defined(__CUDACC__) || defined(ANTIDOTE_SIMT)
#if !defined(ANTIDOTE_SIMT)
// What a kernel may ask for is one number a device: another thread must not change it before the
// call that counts on it is over.
inline std::mutex shared_memory_mutex;

// Beyond 48 KB, which a kernel's static shared memory is part of, it takes leave.
constexpr size_t kSharedWithoutLeave = 32 * 1024;

template <typename... P>
cudaError_t allow_shared(void (*kernel)(P...), size_t bytes) {
  if (bytes <= kSharedWithoutLeave) return cudaSuccess;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}
#endif

// Starts kernel(args...); every launch of the extension passes here.
template <typename... P>
cudaError_t launch(const Grid& grid, void (*kernel)(P...), typename Same<P>::type... args) {
  if (grid.blocks <= 0) return cudaSuccess;
#if defined(ANTIDOTE_SIMT)
  return simt::launch(grid.blocks, grid.threads, grid.shared, grid.cooperative,
                      [=] { kernel(args...); });
#else
  const std::lock_guard<std::mutex> lock(shared_memory_mutex);
  cudaError_t error = allow_shared(kernel, grid.shared);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared;
  config.stream = grid.stream;
  config.attrs = &attribute;
  config.numAttrs = grid.cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
#endif
}

// Blocks of a kernel that one multiprocessor holds at a time.
template <typename... P>
cudaError_t resident_blocks(int* blocks, void (*kernel)(P...), int threads, size_t shared) {
#if defined(ANTIDOTE_SIMT)
  *blocks = 2;
  return cudaSuccess;
#else
  const std::lock_guard<std::mutex> lock(shared_memory_mutex);
  cudaError_t error = allow_shared(kernel, shared);
  if (error != cudaSuccess) return error;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      blocks, reinterpret_cast<const void*>(kernel), threads, shared);
#endif
}
#endif

}  // namespace antidote::cuda

// Ends the function with the error of a call that failed.
#define ANTIDOTE_TRY(call)                                    \
  do {                                                        \
    cudaError_t antidote_error = (call);                      \
    if (antidote_error != cudaSuccess) return antidote_error; \
  } while (false)
