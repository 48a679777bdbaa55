// Row scope and n:m, and the finish that all scopes share; cut.cpp finds where wider scopes cut.

#include "prune.h"

#include <limits>

#include "cut.h"
#include "threads.h"
#include "worker.h"

namespace antidote::cpu {
namespace {

// What was selected less what is protected, to the mask and to the weight.
void finish(const Rows& rows, const Matrix& m, int64_t row, const Plan& plan,
            const uint32_t* marks) {
  if (m.bits != nullptr) {
    int64_t bytes = (m.columns + 7) / 8;
    memcpy(m.bits + row * bytes, marks, bytes);  // little-endian words
  }
  if (!plan.write) return;
  int64_t size = item_size(m.dtype);
  const char* base = static_cast<const char*>(m.base);
  rows.remove(marks, m.columns, m.dtype,
              static_cast<char*>(m.weight) + row * m.weight_stride * size,
              base == nullptr ? nullptr : base + row * m.base_stride * size);
}

void drop(std::vector<uint32_t>& marks, const std::vector<uint32_t>& kept, int64_t blocks) {
  for (int64_t b = 0; b < blocks; ++b) marks[b] &= ~kept[b];
}

void select_row(Worker& w, const Matrix& m, int64_t row, const Plan& plan) {
  Source source = w.source(m, row, plan.score_delta, plan.is_signed);
  uint32_t* marks = w.marks.data();
  if (plan.group != 0) {
    w.selector.select_groups(source, plan.removed, plan.group, plan.largest, marks);
  } else {
    w.selector.select(source, m.k, plan.largest, w.guess, marks);
    if (m.thresholds != nullptr) m.thresholds[row] = w.selector.edge(source, plan.largest, marks);
  }
  if (m.preserve_norm != nullptr) {
    Source protect = w.source(m, row, plan.score_delta, false, true);
    w.selector.select(protect, m.preserve_k, true, w.preserve_guess, w.kept.data());
    drop(w.marks, w.kept, num_blocks(m.columns));
  }
  finish(w.selector.rows(), m, row, plan, marks);
}

}  // namespace

void select(const Rows& rows, const std::vector<Matrix>& matrices, const Plan& plan, int threads) {
  std::vector<Item> items = cut_into_items(matrices);
  threads = useful_threads(items, threads);
  std::vector<Worker> workers(threads, Worker(rows, max_columns(matrices), plan.group));
  if (plan.scope == Scope::kRow) {
    parallel_for(items.size(), threads, [&](int thread, int64_t i) {
      const Item& item = items[i];
      for (int64_t r = item.begin; r < item.end; ++r) {
        select_row(workers[thread], matrices[item.matrix], r, plan);
      }
    });
    return;
  }
  Cuts cuts = find_cuts(matrices, items, plan, false, workers);
  Cuts kept = find_cuts(matrices, items, plan, true, workers);
  parallel_for(items.size(), threads, [&](int thread, int64_t i) {
    const Item& item = items[i];
    const Matrix& m = matrices[item.matrix];
    Worker& w = workers[thread];
    for (int64_t r = item.begin; r < item.end; ++r) {
      cuts.mark(w, matrices, item.matrix, r, w.marks.data());
      if (m.preserve_norm != nullptr) {
        kept.mark(w, matrices, item.matrix, r, w.kept.data());
        drop(w.marks, w.kept, num_blocks(m.columns));
      }
      finish(rows, m, r, plan, w.marks.data());
    }
  });
  for (size_t m = 0; m < matrices.size(); ++m) {
    if (matrices[m].thresholds == nullptr || matrices[m].columns == 0) continue;
    std::fill(matrices[m].thresholds, matrices[m].thresholds + matrices[m].rows,
              cuts.edge(static_cast<int64_t>(m)));
  }
}

void score(const Rows& rows, const Matrix& matrix, bool delta, float* out, int threads) {
  std::vector<Matrix> one = {matrix};
  std::vector<Item> items = cut_into_items(one);
  threads = useful_threads(items, threads);
  std::vector<Worker> workers(threads, Worker(rows, matrix.columns, 0));
  parallel_for(items.size(), threads, [&](int thread, int64_t i) {
    Worker& w = workers[thread];
    for (int64_t r = items[i].begin; r < items[i].end; ++r) {
      memcpy(out + r * matrix.columns, w.selector.keys32(w.source(matrix, r, delta, false)),
             matrix.columns * sizeof(float));  // a score's key is its bits
    }
  });
}

void apply_mask(const Rows& rows, const Matrix& matrix, int threads) {
  std::vector<Matrix> one = {matrix};
  std::vector<Item> items = cut_into_items(one);
  threads = useful_threads(items, threads);
  std::vector<Worker> workers(threads, Worker(rows, matrix.columns, 0));
  Plan plan{};
  plan.write = true;
  Matrix unmasked = matrix;
  unmasked.bits = nullptr;
  int64_t bytes = (matrix.columns + 7) / 8;
  uint32_t tail = matrix.columns % kBlock ? (1u << (matrix.columns % kBlock)) - 1 : ~0u;
  parallel_for(items.size(), threads, [&](int thread, int64_t i) {
    std::vector<uint32_t>& marks = workers[thread].marks;
    for (int64_t r = items[i].begin; r < items[i].end; ++r) {
      marks[num_blocks(matrix.columns) - 1] = 0;
      memcpy(marks.data(), matrix.bits + r * bytes, bytes);
      marks[num_blocks(matrix.columns) - 1] &= tail;  // pad bits name no weight
      finish(rows, unmasked, r, plan, marks.data());
    }
  });
}

}  // namespace antidote::cpu
