#include "prune.h"

namespace antidote::cuda {
cudaError_t cut_scratch(const Matrices&, const Plan&, size_t* bytes) {
  *bytes = 0;
  return cudaSuccess;
}
cudaError_t prune_cut(const Matrices&, const Plan&, void*, cudaStream_t) {
  return cudaErrorNotSupported;
}
}  // namespace antidote::cuda
