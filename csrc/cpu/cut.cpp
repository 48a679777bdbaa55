#include "cut.h"

#include <limits>

#include "threads.h"

namespace antidote::cpu {
namespace {

constexpr int64_t kBins = 1 << 16;

// A histogram a thread, summed; items of the matrices in [first, last) only.
class Histograms {
 public:
  explicit Histograms(size_t threads) : bins_(threads, std::vector<int64_t>(kBins)) {}

  std::vector<int64_t>& of(int thread) { return bins_[thread]; }

  const std::vector<int64_t>& sum() {
    for (size_t t = 1; t < bins_.size(); ++t) {
      for (int64_t b = 0; b < kBins; ++b) bins_[0][b] += bins_[t][b];
    }
    return bins_[0];
  }

  void clear() {
    for (auto& bins : bins_) std::fill(bins.begin(), bins.end(), 0);
  }

 private:
  std::vector<std::vector<int64_t>> bins_;
};

// The bin in which the k-th from the top lies; k is lowered by what lies above it.
int64_t bin_of_kth(const std::vector<int64_t>& bins, int64_t& k) {
  int64_t bin = kBins - 1;
  for (; bin > 0 && bins[bin] < k; --bin) k -= bins[bin];
  return bin;
}

struct Pass {
  const std::vector<Matrix>& matrices;
  const std::vector<Item>& items;
  std::vector<Worker>& workers;
  bool delta, is_signed, preserve;

  template <typename Body>  // body(thread, matrix, row, source)
  void rows_of(int64_t first, int64_t last, Body body) {
    auto before = [](const Item& item, int64_t m) { return item.matrix < m; };
    auto begin = std::lower_bound(items.begin(), items.end(), first, before);
    auto end = std::lower_bound(items.begin(), items.end(), last, before);
    parallel_for(end - begin, static_cast<int>(workers.size()), [&](int thread, int64_t i) {
      const Item& item = begin[i];
      const Matrix& m = matrices[item.matrix];
      if (preserve && m.preserve_norm == nullptr) return;
      for (int64_t r = item.begin; r < item.end; ++r) {
        body(thread, item.matrix, r, workers[thread].source(m, r, delta, is_signed, preserve));
      }
    });
  }
};

// The cut that takes the last k of the matrices in [first, last), which hold `total` weights.
Cut find_cut(Pass& pass, int64_t first, int64_t last, int64_t k, int64_t total, Histograms& bins) {
  Cut cut;
  cut.all = k >= total;
  if (k <= 0 || cut.all) return cut;

  bins.clear();
  pass.rows_of(first, last, [&](int thread, int64_t, int64_t, const Source& source) {
    const int16_t* keys = pass.workers[thread].selector.keys16(source);
    int64_t* counts = bins.of(thread).data() + kBins / 2;
    for (int64_t c = 0; c < source.columns; ++c) ++counts[keys[c]];
  });
  int32_t high = static_cast<int32_t>(bin_of_kth(bins.sum(), k) - kBins / 2);

  bins.clear();
  pass.rows_of(first, last, [&](int thread, int64_t, int64_t, const Source& source) {
    const int32_t* keys = pass.workers[thread].selector.keys32(source);
    int64_t* counts = bins.of(thread).data();
    for (int64_t c = 0; c < source.columns; ++c) {
      if (keys[c] >> 16 == high) ++counts[keys[c] & 0xFFFF];
    }
  });
  int32_t low = static_cast<int32_t>(bin_of_kth(bins.sum(), k));
  cut.key = high * 65536 + low;

  // k of the keys equal to the cut are taken: the last ones, whose first row is looked for.
  std::vector<std::vector<int64_t>> ties(last - first);
  for (int64_t m = first; m < last; ++m) ties[m - first].resize(pass.matrices[m].rows);
  pass.rows_of(first, last, [&](int thread, int64_t m, int64_t row, const Source& source) {
    const int32_t* keys = pass.workers[thread].selector.keys32(source);
    int64_t equal = 0;
    for (int64_t c = 0; c < source.columns; ++c) equal += keys[c] == cut.key;
    ties[m - first][row] = equal;
  });
  for (int64_t m = last - 1; m >= first; --m) {
    for (int64_t row = pass.matrices[m].rows - 1; row >= 0; --row) {
      int64_t here = ties[m - first][row];
      if (here >= k) {
        cut.tie_matrix = m, cut.tie_row = row, cut.ties_in_row = k;
        return cut;
      }
      k -= here;
    }
  }
  return cut;
}

}  // namespace

Cuts find_cuts(const std::vector<Matrix>& matrices, const std::vector<Item>& items,
               const Plan& plan, bool preserve, std::vector<Worker>& workers) {
  Cuts cuts;
  cuts.largest_ = preserve || plan.largest;
  cuts.delta_ = plan.score_delta, cuts.signed_ = plan.is_signed, cuts.preserve_ = preserve;
  int64_t count = static_cast<int64_t>(matrices.size());
  bool global = plan.scope == Scope::kGlobal;
  cuts.cuts_.resize(global ? 1 : count);
  cuts.cut_of_.resize(count);
  Pass pass{matrices, items, workers, plan.score_delta, plan.is_signed, preserve};
  Histograms bins(workers.size());
  for (int64_t i = 0; i < static_cast<int64_t>(cuts.cuts_.size()); ++i) {
    int64_t first = global ? 0 : i, last = global ? count : i + 1, total = 0;
    bool reported = false;  // an empty matrix has no address for its thresholds
    for (int64_t m = first; m < last; ++m) {
      cuts.cut_of_[m] = i;
      reported = reported || matrices[m].thresholds != nullptr;
      if (!preserve || matrices[m].preserve_norm != nullptr) {
        total += matrices[m].rows * matrices[m].columns;
      }
    }
    int64_t k = preserve ? matrices[first].preserve_k : matrices[first].k;
    if (total > 0) {
      // The first k are what the last total - k leave.
      cuts.cuts_[i] = find_cut(pass, first, last, cuts.largest_ ? k : total - k, total, bins);
    }
    // A report's edge is looked for only where one is asked for.
    cuts.cuts_[i].edge = std::numeric_limits<float>::quiet_NaN();
    if (preserve || !reported || k == 0) continue;
    std::vector<int32_t> best(workers.size(), cuts.largest_ ? kMaxKey : kMinKey);
    pass.rows_of(first, last, [&](int thread, int64_t m, int64_t row, const Source& source) {
      Worker& w = workers[thread];
      cuts.mark(w, matrices, m, row, w.marks.data());
      float edge = w.selector.edge(source, cuts.largest_, w.marks.data());
      bool some = false;
      for (int64_t b = 0; b < num_blocks(source.columns); ++b) some = some || w.marks[b] != 0;
      if (!some) return;
      int32_t key = static_cast<int32_t>(bits_of_float(edge));
      best[thread] = cuts.largest_ ? std::min(best[thread], key) : std::max(best[thread], key);
    });
    int32_t edge = best[0];
    for (int32_t b : best) edge = cuts.largest_ ? std::min(edge, b) : std::max(edge, b);
    if (edge != kMaxKey && edge != kMinKey) {
      cuts.cuts_[i].edge = float_of_bits(static_cast<uint32_t>(edge));
    }
  }
  return cuts;
}

void Cuts::mark(Worker& worker, const std::vector<Matrix>& matrices, int64_t matrix, int64_t row,
                uint32_t* marks) const {
  const Matrix& m = matrices[matrix];
  const Cut& cut = cuts_[cut_of_[matrix]];
  int64_t blocks = num_blocks(m.columns);
  if (cut.all) {
    mark_all(m.columns, marks);
  } else if (cut.key == kMaxKey) {
    std::fill(marks, marks + blocks, 0u);
  } else {
    Source source = worker.source(m, row, delta_, signed_, preserve_);
    uint32_t* equal = worker.selector.spare_marks();
    int64_t counts[2];
    worker.selector.rows().mark32(worker.selector.keys32(source), blocks, cut.key - 1, cut.key,
                                  marks, equal, counts);
    bool later = matrix > cut.tie_matrix || (matrix == cut.tie_matrix && row > cut.tie_row);
    bool same = matrix == cut.tie_matrix && row == cut.tie_row;
    mark_last_bits(equal, blocks, later ? m.columns : same ? cut.ties_in_row : 0, marks);
  }
  if (largest_) return;
  for (int64_t b = 0; b < blocks; ++b) marks[b] = ~marks[b];
  if (m.columns % kBlock) marks[blocks - 1] &= (1u << (m.columns % kBlock)) - 1;
}

}  // namespace antidote::cpu
