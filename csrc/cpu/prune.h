// The operations of the extension on raw addresses; bind.cpp gives them to Python.
#pragma once

#include <cstdint>
#include <vector>

#include "rows.h"

namespace antidote::cpu {

// One weight of a call; null where absent. Strides are in elements; masks are contiguous.
struct Matrix {
  void* weight;
  int64_t weight_stride;
  const void* base;
  int64_t base_stride;
  const float* act_norm;
  const float* preserve_norm;
  uint8_t* bits;
  float* thresholds;
  int64_t rows, columns;
  DType dtype;
  // How many are selected and protected: along a row, or in this matrix (tensor scope); global
  // scope takes the first matrix's.
  int64_t k, preserve_k;
};

struct Plan {
  Scope scope;
  bool largest;
  bool score_delta;
  bool is_signed;
  bool write;
  int64_t removed, group;  // n_m; group 0: none
};

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
