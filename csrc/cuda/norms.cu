#include "prune.h"

namespace antidote::cuda {
cudaError_t norms_scratch(const Activations&, size_t* bytes) {
  *bytes = 0;
  return cudaSuccess;
}
cudaError_t accumulate_sq_norm(float*, const Activations&, void*, cudaStream_t) {
  return cudaErrorNotSupported;
}
}  // namespace antidote::cuda
