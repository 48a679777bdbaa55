// What the operations on matrices share: rows cut into items of work, and one thread's memory.
#pragma once

#include <algorithm>
#include <vector>

#include "prune.h"
#include "row_select.h"

namespace antidote::cpu {

// A few rows of one matrix.
struct Item {
  int64_t matrix, begin, end;
};

// Items of about 64K weights: large enough to amortise a norm's layout, small enough to balance.
inline std::vector<Item> cut_into_items(const std::vector<Matrix>& matrices) {
  constexpr int64_t kWeights = 1 << 16;
  std::vector<Item> items;
  for (size_t m = 0; m < matrices.size(); ++m) {
    const Matrix& matrix = matrices[m];
    int64_t step = std::max<int64_t>(1, kWeights / std::max<int64_t>(1, matrix.columns));
    if (matrix.columns == 0) continue;
    for (int64_t r = 0; r < matrix.rows; r += step) {
      items.push_back({static_cast<int64_t>(m), r, std::min(matrix.rows, r + step)});
    }
  }
  return items;
}

inline int64_t max_columns(const std::vector<Matrix>& matrices) {
  int64_t most = 0;
  for (const Matrix& matrix : matrices) most = std::max(most, matrix.columns);
  return most;
}

// Threads worth waking for this much work.
inline int useful_threads(const std::vector<Item>& items, int threads) {
  return std::max(1,
                  std::min<int>(threads, static_cast<int>(std::min<size_t>(items.size(), 4096))));
}

// A norm in the order that the row kernels load it, kept while the next item has the same one.
class LaidOutNorm {
 public:
  LaidOutNorm(int64_t half, int64_t max_columns)
      : bf16_half_(half), values_(num_blocks(max_columns) * kBlock) {}

  const float* get(const float* norm, int64_t columns, DType dtype) {
    if (norm == norm_ && columns == columns_ && dtype == dtype_) return values_.data();
    int64_t half = dtype == DType::kBf16 ? bf16_half_ : 0;
    int64_t whole = num_blocks(columns) * kBlock;
    for (int64_t c = 0; c < whole; ++c) {
      int64_t in_run = half ? c % (2 * half) : 0;
      int64_t at = half ? c - in_run + (in_run % 2) * half + in_run / 2 : c;
      values_[at] = c >= columns ? 0.0f : norm == nullptr ? 1.0f : norm[c];
    }
    norm_ = norm, columns_ = columns, dtype_ = dtype;
    return values_.data();
  }

 private:
  int64_t bf16_half_;
  std::vector<float> values_;
  const float* norm_ = nullptr;
  int64_t columns_ = -1;
  DType dtype_ = DType::kFp32;
};

struct Worker {
  Worker(const Rows& rows, int64_t columns, int64_t group)
      : selector(rows, columns, group),
        act_norm(rows.norm_half, columns),
        preserve_norm(rows.norm_half, columns),
        marks(num_blocks(columns)),
        kept(num_blocks(columns)) {}

  // A row scored by its activation norm, or by its preserve norm.
  Source source(const Matrix& m, int64_t row, bool delta, bool is_signed, bool preserve = false) {
    int64_t size = item_size(m.dtype);
    const char* base = static_cast<const char*>(m.base);
    const float* norm = preserve ? m.preserve_norm : m.act_norm;
    LaidOutNorm& layout = preserve ? preserve_norm : act_norm;
    const char* weight = static_cast<const char*>(m.weight) + row * m.weight_stride * size;
    return {weight,    delta ? base + row * m.base_stride * size : nullptr,
            norm,      is_signed ? nullptr : layout.get(norm, m.columns, m.dtype),
            m.columns, m.dtype,
            is_signed, row + 1 < m.rows ? weight + m.weight_stride * size : weight};
  }

  RowSelector selector;
  LaidOutNorm act_norm, preserve_norm;
  Guess guess, preserve_guess;
  std::vector<uint32_t> marks, kept;
};

}  // namespace antidote::cpu
