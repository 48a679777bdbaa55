#include <algorithm>
#include <cmath>

#include "row_plan.h"

namespace antidote::cuda {
namespace {

bool is_aligned(const void* address, int64_t stride, int item_size) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0 && stride * item_size % 16 == 0;
}

void ranks(uint32_t last, uint32_t columns, int threads, uint32_t& top, uint32_t& low) {
  if (columns <= 8u * threads) {  // the sample is the row
    top = low = last;
    return;
  }
  const double size = 2 * ((columns + 7) / 8);
  const double share = static_cast<double>(last) / columns;
  // Three and a half standard deviations: one row in some thousand is looked through again.
  const double reach =
      3.5 * std::sqrt(size * share * (1 - share) * std::max(0.0, 1 - size / columns)) + 1.5;
  top = static_cast<uint32_t>(std::max(1.0, std::floor(share * size - reach)));
  low = static_cast<uint32_t>(std::min(size, std::ceil(share * size + reach)));
}

}  // namespace

int threads_of_row(uint32_t columns) {
  return std::max<int>(64, (columns + 32 * kSlots - 1) / (32 * kSlots) * 32);
}

void set_sample_ranks(RowEntry& entry, int threads) {
  const int team = entry.flags & kByWarp ? 32 : threads;
  ranks(entry.last, entry.columns, team, entry.rank_top, entry.rank_low);
  ranks(entry.preserve_last, entry.columns, team, entry.preserve_top, entry.preserve_low);
}

RowEntry row_entry(const Matrix& m, const Plan& plan, const Device& device) {
  const int item_size = static_cast<int>(antidote::item_size(m.dtype));
  RowEntry e = {};
  e.weight = m.weight, e.base = m.base, e.norm = m.act_norm, e.preserve = m.preserve_norm;
  e.bits = m.bits, e.thresholds = m.thresholds;
  e.weight_stride = m.weight_stride, e.base_stride = m.base_stride;
  e.one = 1.0f;
  e.rows = m.rows;
  e.columns = static_cast<uint32_t>(m.columns);
  e.last = static_cast<uint32_t>(plan.largest ? m.k : m.columns - m.k);
  e.preserve_last = static_cast<uint32_t>(m.preserve_k);
  if (plan.write) e.flags |= kWrite;
  if (!plan.largest) e.flags |= kSmallest;
  if (plan.score_delta) e.flags |= kDelta;
  if (m.k == 0) e.flags |= kUnselected;
  const int64_t stride = m.rows == 1 ? 0 : m.weight_stride;
  const int64_t base_stride = m.rows == 1 ? 0 : m.base_stride;
  if (m.columns % 8 == 0 && is_aligned(m.weight, stride, item_size) &&
      is_aligned(m.base, base_stride, item_size) && is_aligned(m.act_norm, 0, 4) &&
      is_aligned(m.preserve_norm, 0, 4)) {
    e.flags |= kVectors;
  }
  const size_t held = static_cast<size_t>(threads_of_row(e.columns)) * kSlots * item_size;
  if (plan.is_signed || plan.score_delta || m.columns * item_size > 2 * kLongestByBlock ||
      held + sizeof(Search) > static_cast<size_t>(device.shared_a_block) || m.rows > INT32_MAX) {
    e.flags |= kByReading;
  } else {
    e.flags |= e.columns <= kShort ? kByThread : e.columns <= kLongestByWarp ? kByWarp : kByBlock;
  }
  return e;
}

ListPlan plan_list(std::vector<RowEntry>& entries, int item_size) {
  ListPlan plan = {128, sizeof(Search), 0};
  for (const RowEntry& e : entries) {
    if (e.flags & (kByBlock | kByReading)) {
      plan.threads = std::max(plan.threads, std::min(threads_of_row(e.columns), 1024));
    }
  }
  for (RowEntry& e : entries) {
    const int warps = plan.threads / 32;
    const int team = e.flags & kByWarp ? 32 : plan.threads;
    const size_t held = held_bytes(team, e.columns, item_size);
    if (e.flags & kByWarp) {
      plan.shared = std::max(plan.shared, (1 + warps) * sizeof(Search) + warps * held);
    } else if (e.flags & kByBlock) {
      plan.shared = std::max(plan.shared, sizeof(Search) + held);
    }
    e.first_tile = plan.tiles;
    const int rows = rows_of_tile(e.flags, plan.threads);
    plan.tiles += (e.rows + rows - 1) / rows;
    set_sample_ranks(e, plan.threads);
  }
  plan.shared += sizeof(RowEntry);
  return plan;
}

}  // namespace antidote::cuda
