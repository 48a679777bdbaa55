#include "launch.h"

namespace antidote::cuda {

#if !defined(ANTIDOTE_SIMT)
__global__ void __launch_bounds__(32) probe_kernel() {}
#endif

cudaError_t probe() {
#if defined(ANTIDOTE_SIMT)
  return cudaSuccess;
#else
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&probe_kernel));
#endif
}

cudaError_t current_device(Device* device) {
#if defined(ANTIDOTE_SIMT)
  *device = {2, 228 * 1024, 227 * 1024};
#else
  int number;
  ANTIDOTE_TRY(cudaGetDevice(&number));
  ANTIDOTE_TRY(cudaDeviceGetAttribute(&device->processors, cudaDevAttrMultiProcessorCount, number));
  ANTIDOTE_TRY(
      cudaDeviceGetAttribute(&device->shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, number));
  ANTIDOTE_TRY(cudaDeviceGetAttribute(&device->shared_a_block,
                                      cudaDevAttrMaxSharedMemoryPerBlockOptin, number));
#endif
  return cudaSuccess;
}

}  // namespace antidote::cuda
