#include "prune.h"

namespace antidote::cuda {
cudaError_t linear_scratch(const Matrix&, const Plan&, const Activations&, size_t* bytes) {
  *bytes = 0;
  return cudaSuccess;
}
cudaError_t prune_linear(const Matrix&, const Plan&, float*, const Activations&, void*,
                         cudaStream_t) {
  return cudaErrorNotSupported;
}
}  // namespace antidote::cuda
