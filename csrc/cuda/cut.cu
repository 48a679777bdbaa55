// Tensor and global scope: one exact selection over all weights of a list, in two readings.
//
// 1. A sample brackets the key sought. The first reading counts the keys above the bracket, and
//    keeps those inside: a few of a hundred.
// 2. The exact key is searched among those kept. Where the bracket missed, or they are too many, it
//    is searched among all weights instead, digit by digit; no value on the host need say which.
//    Of the weights with that key, the place is found from which on they are taken.
// 3. The second reading marks and removes.
//
// The first k are what the last n - k leave, so all of it searches from the largest key down. What
// is added atomically are integers: the results are the same in any order.

#include <algorithm>
#include <cmath>

#include "cut_read.cuh"
#include "cut_search.cuh"
#include "prune.h"
#include "table.cuh"

namespace antidote::cuda {

namespace {

constexpr double kMargin = 4.5;  // standard deviations between the rank and the bracket's ends
constexpr double kSpare = 1.5;   // room for the keys kept, over the number expected
constexpr int64_t kClearBlocks = 8;
constexpr int64_t kSampleShare = 16384;  // weights for one of a sample that grows with them

// Consecutive pieces of the scratch; sizes alone where that begins at 0.
class Arena {
 public:
  explicit Arena(void* begin) : begin_(reinterpret_cast<intptr_t>(begin)), size_(0) {}
  template <typename T>
  T* take(int64_t count) {
    T* result = pointer<T>(begin_ + size_);
    size_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return result;
  }
  int64_t size() const { return size_; }

 private:
  int64_t begin_, size_;
};

struct Cut {
  std::vector<CutEntry> entries;
  CutTask task;
  bool fast;  // vectors of one 16-bit type, without options; bases with the weights' strides
  bool edges;
  int dtype;
  int64_t find_blocks, apply_blocks;
  unsigned long long* counters;
  int64_t counters_size;
  int64_t bytes;
};

bool is_aligned(const Matrix& m) {
  const auto whole = [](const void* data, int64_t stride, int64_t rows) {
    return reinterpret_cast<intptr_t>(data) % 16 == 0 && (rows == 1 || stride % 8 == 0);
  };
  return m.columns % 8 == 0 && whole(m.weight, m.weight_stride, m.rows) &&
         whole(m.base, m.base == nullptr ? 0 : m.base_stride, m.rows) && whole(m.act_norm, 0, 1) &&
         whole(m.preserve_norm, 0, 1);
}

// The entries of the list and the one behind; the totals of both selections.
void list_entries(const Matrices& matrices, const Plan& plan, Cut* cut) {
  CutTask& task = cut->task;
  CutEntry end = {};
  cut->fast = !plan.score_delta && !plan.is_signed;
  cut->edges = false;
  cut->dtype = static_cast<int>(matrices[0].dtype);
  for (const Matrix& m : matrices) {
    CutEntry e = {};
    e.weight = m.weight;
    e.base = m.base;
    e.norms[0] = m.act_norm;
    e.norms[1] = m.preserve_norm;
    e.bits = m.bits;
    e.thresholds = m.thresholds;
    e.weight_stride = m.weight_stride;
    e.base_stride = m.base_stride;
    e.rows = m.rows;
    e.columns = m.columns;
    for (int i = 0; i < 2; ++i) {
      e.first[i] = end.first[i];
      e.norm_steps[i] = e.norms[i] != nullptr;
      e.in_selection[i] = i == 0 || e.norms[i] != nullptr;
    }
    e.first_group = end.first_group;
    e.first_tile = end.first_tile;
    e.dtype = plan.is_signed ? kSigned : static_cast<int>(m.dtype);
    e.vectors = is_aligned(m);
    for (float& one : e.ones) one = 1.0f;
    const int64_t groups = m.rows * ((m.columns + 7) / 8);
    end.first[0] += m.rows * m.columns;
    if (m.preserve_norm != nullptr) end.first[1] += m.rows * m.columns;
    end.first_group += groups;
    end.first_tile += (groups + kCutThreads - 1) / kCutThreads;
    const bool parallel = m.base == nullptr || m.base_stride == m.weight_stride || m.rows == 1;
    cut->fast = cut->fast && e.vectors && parallel && e.dtype == cut->dtype && e.dtype != kFp32;
    cut->edges = cut->edges || m.thresholds != nullptr;
    cut->entries.push_back(e);
  }
  cut->entries.push_back(end);
  task.list.count = static_cast<int64_t>(matrices.size());
  task.list.tiles = end.first_tile;
  task.list.delta = plan.score_delta;
  task.searches[0].total = end.first[0];
  task.searches[1].total = end.first[1];
}

// Where the bracket ends in the sample; returns how many keys are expected to be kept.
double set_sample(CutSearch* search) {
  if (search->total == 0) return 0;
  const int64_t size = std::clamp(search->total / kSampleShare, kSample, 32 * kSample);
  search->sample = std::min(search->total, size);
  const double sample = static_cast<double>(search->sample);
  const double total = static_cast<double>(search->total);
  const double share = static_cast<double>(search->rank) / total;
  const auto rank = static_cast<int64_t>(std::ceil(share * sample));
  int64_t reach = 0;
  search->heavy = 1;
  if (search->sample < search->total) {
    reach = static_cast<int64_t>(kMargin * std::sqrt(sample * share * (1 - share))) + 3;
    search->heavy = std::max<int64_t>(8, reach / 4);
  }
  search->high_rank = std::max<int64_t>(rank - reach, 0);
  search->low_rank = rank + reach;
  if (search->sample == search->total) search->high_rank = search->low_rank = search->rank;
  return (2.0 * reach + 2.0 * search->heavy) / sample * total;
}

template <typename... P>
cudaError_t all_blocks(int64_t* blocks, void (*kernel)(P...), const Device& device, int64_t limit) {
  int resident;
  ANTIDOTE_TRY(resident_blocks(&resident, kernel, kCutThreads, 0));
  *blocks = std::min(static_cast<int64_t>(device.processors) * std::max(resident, 1), limit);
  return cudaSuccess;
}

// The instance of a kernel that takes a list.
auto count_kernel(const Cut& cut) {
  return !cut.fast            ? &cut_count_kernel<kAny>
         : cut.dtype == kBf16 ? &cut_count_kernel<kBf16>
                              : &cut_count_kernel<kFp16>;
}

auto apply_kernel(const Cut& cut) {
  return !cut.fast            ? &cut_apply_kernel<kAny>
         : cut.dtype == kBf16 ? &cut_apply_kernel<kBf16>
                              : &cut_apply_kernel<kFp16>;
}

cudaError_t prepare(const Matrices& matrices, const Plan& plan, void* scratch, Cut* cut) {
  CutTask& task = cut->task;
  task = {};
  list_entries(matrices, plan, cut);
  const int64_t k = matrices[0].k;
  CutSearch* searches = task.searches;
  task.write = plan.write;
  task.smallest = !plan.largest && k > 0;
  searches[0].rank = k == 0 || plan.largest ? k : searches[0].total - k + 1;
  searches[0].after = task.smallest;
  for (const Matrix& m : matrices) {
    if (m.preserve_norm != nullptr) searches[1].rank = m.preserve_k;
  }
  task.selections = searches[1].rank > 0 && k > 0 ? 2 : 1;
  cut->fast = cut->fast && task.selections == 1;
  cut->edges = cut->edges && k > 0;

  Device device;
  ANTIDOTE_TRY(current_device(&device));
  const int64_t tiles = task.list.tiles;
  ANTIDOTE_TRY(all_blocks(&task.stretches, count_kernel(*cut), device, tiles));
  ANTIDOTE_TRY(all_blocks(&cut->apply_blocks, apply_kernel(*cut), device, tiles));
  ANTIDOTE_TRY(all_blocks(&cut->find_blocks, &cut_find_kernel, device, task.stretches));

  Arena arena(scratch);
  const auto size = static_cast<int64_t>(cut->entries.size());
  auto* entries = arena.take<CutEntry>(size);
  task.list.entries = entries;
  for (int64_t i = 0; i < size && scratch != nullptr; ++i) {  // absent norms are read all the same
    for (const float*& norm : cut->entries[i].norms) {
      if (norm == nullptr) norm = entries[i].ones;
    }
  }
  const int64_t before = arena.size();
  cut->counters = arena.take<unsigned long long>(0);
  for (CutSearch& s : task.searches) {
    s.digits = arena.take<unsigned long long>(kLevels * kDigits);
    s.ties = arena.take<uint32_t>(task.stretches);
    s.parts = arena.take<uint32_t>(cut->find_blocks);
    if (task.selections == 1) break;
  }
  cut->counters_size = (arena.size() - before) / static_cast<int64_t>(sizeof *cut->counters);
  for (int i = 0; i < task.selections; ++i) {
    CutSearch& s = searches[i];
    const auto kept = static_cast<int64_t>(kSpare * set_sample(&s));
    const int64_t chunks = task.stretches * kCutWarps + kept / kChunk + 1;
    s.chunks = static_cast<uint32_t>(std::min<int64_t>(chunks, UINT32_MAX / kChunk));
    s.state = arena.take<CutState>(1);
    s.equal = arena.take<uint32_t>(2 * task.stretches);
    s.samples = arena.take<int32_t>(s.sample);
    s.chunk_fill = arena.take<uint32_t>(s.chunks);
    s.chunk_owner = arena.take<uint32_t>(s.chunks);
    s.keys = arena.take<int32_t>(static_cast<int64_t>(s.chunks) * kChunk);
  }
  cut->bytes = arena.size();
  return cudaSuccess;
}

}  // namespace

cudaError_t cut_scratch(const Matrices& matrices, const Plan& plan, size_t* bytes) {
  *bytes = 0;
  if (matrices.empty()) return cudaSuccess;
  Cut cut;
  ANTIDOTE_TRY(prepare(matrices, plan, nullptr, &cut));
  *bytes = static_cast<size_t>(cut.bytes);
  return cudaSuccess;
}

cudaError_t prune_cut(const Matrices& matrices, const Plan& plan, void* scratch,
                      cudaStream_t stream) {
  if (matrices.empty()) return cudaSuccess;
  Cut cut;
  ANTIDOTE_TRY(prepare(matrices, plan, scratch, &cut));
  const CutTask& task = cut.task;
  ANTIDOTE_TRY(upload(cut.entries, const_cast<CutEntry*>(task.list.entries), stream));
  ANTIDOTE_TRY(launch({task.selections + kClearBlocks, kBracketThreads, 0, stream},
                      &cut_bracket_kernel, task, cut.counters, cut.counters_size));
  if (task.searches[0].rank > 0) {
    ANTIDOTE_TRY(launch({task.stretches, kCutThreads, 0, stream}, count_kernel(cut), task));
    ANTIDOTE_TRY(launch({cut.find_blocks, kCutThreads, 0, stream, true}, &cut_find_kernel, task));
  }
  ANTIDOTE_TRY(launch({cut.apply_blocks, kCutThreads, 0, stream}, apply_kernel(cut), task));
  if (cut.edges) {
    ANTIDOTE_TRY(launch({task.list.count, kCutThreads, 0, stream}, &cut_edge_kernel, task));
  }
  return cudaSuccess;
}

}  // namespace antidote::cuda
