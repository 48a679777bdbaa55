// The operations of the extension on raw device addresses; bind.cpp gives them to Python. Each
// returns the first error of the runtime and waits for nothing. Scratch is device memory of the
// caller, at least 256-byte aligned, as large as the function of the name says; its contents are
// free before and after.
#pragma once

#include <vector>

#include "launch.h"
#include "matrix.h"

namespace antidote::cuda {

using Matrices = std::vector<Matrix>;  // none is empty

// Row scope, in one launch behind what uploads a list.
cudaError_t rows_scratch(const Matrices& matrices, const Plan& plan, size_t* bytes);
cudaError_t prune_rows(const Matrices& matrices, const Plan& plan, void* scratch,
                       cudaStream_t stream);

// One selection over all the matrices together: tensor scope where there is one, else global.
cudaError_t cut_scratch(const Matrices& matrices, const Plan& plan, size_t* bytes);
cudaError_t prune_cut(const Matrices& matrices, const Plan& plan, void* scratch,
                      cudaStream_t stream);

// plan.removed of each plan.group consecutive columns. `marks`, a byte a weight in rows of
// `columns`, takes what is removed where the bits of a group do not begin at a byte's first
// (needs_marks); null else, and matrix.bits are filled.
bool needs_marks(const Plan& plan);
cudaError_t prune_groups(const Matrix& matrix, const Plan& plan, uint8_t* marks,
                         cudaStream_t stream);

cudaError_t score(const Matrix& matrix, bool delta, float* out, cudaStream_t stream);
cudaError_t apply_mask(const Matrix& matrix, cudaStream_t stream);

// Activations: `sizes` and `strides` (elements) of the dimensions before the unit-stride columns.
struct Activations {
  const void* x;
  DType dtype;
  int64_t columns;
  std::vector<int64_t> sizes, strides;
  const uint8_t* token_mask;  // contiguous, or null
};
cudaError_t norms_scratch(const Activations& x, size_t* bytes);
cudaError_t accumulate_sq_norm(float* sq_sum, const Activations& x, void* scratch,
                               cudaStream_t stream);

// Norms and row scope in one cooperative launch; `norm` takes the square roots of the sums, the
// same bits that accumulate_sq_norm on zeros gives. Not for all rows and types: serves_linear.
bool serves_linear(const Matrix& matrix, const Plan& plan, const Activations& x);
cudaError_t linear_scratch(const Activations& x, size_t* bytes);
cudaError_t prune_linear(const Matrix& matrix, const Plan& plan, float* norm, const Activations& x,
                         void* scratch, cudaStream_t stream);

}  // namespace antidote::cuda
