// The operations of the extension on raw addresses; bind.cpp gives them to Python.
#pragma once

#include <cstdint>
#include <vector>

#include "matrix.h"
#include "rows.h"

namespace antidote::cpu {

void select(const Rows& rows, const std::vector<Matrix>& matrices, const Plan& plan, int threads);
void score(const Rows& rows, const Matrix& matrix, bool delta, float* out, int threads);
void apply_mask(const Rows& rows, const Matrix& matrix, int threads);

// x has `dims` leading dimensions of these sizes and strides (elements) before its unit-stride
// rows.
void accumulate_sq_norm(const Rows& rows, float* sq_sum, const void* x, DType dtype,
                        int64_t columns, const std::vector<int64_t>& sizes,
                        const std::vector<int64_t>& strides, const uint8_t* token_mask,
                        int threads);

}  // namespace antidote::cpu
