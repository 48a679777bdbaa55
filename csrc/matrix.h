// What a call prunes, in raw addresses: shared by the operations of csrc/cpu and csrc/cuda.
#pragma once

#include <array>
#include <cstdint>

#include "selection.h"

namespace antidote {

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

// A matrix as Python's tuple: (weight, weight_stride, base, base_stride, act_norm, preserve_norm,
// bits, thresholds, rows, columns, dtype, k, preserve_k)
using Row = std::array<int64_t, 13>;

template <typename T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

static inline Matrix matrix_of(const Row& r) {
  return {pointer<void>(r[0]),
          r[1],
          pointer<const void>(r[2]),
          r[3],
          pointer<const float>(r[4]),
          pointer<const float>(r[5]),
          pointer<uint8_t>(r[6]),
          pointer<float>(r[7]),
          r[8],
          r[9],
          static_cast<DType>(r[10]),
          r[11],
          r[12]};
}

}  // namespace antidote
