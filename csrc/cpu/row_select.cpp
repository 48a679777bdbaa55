#include "row_select.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace antidote::cpu {
namespace {

constexpr int64_t kFew = 40;  // candidates that are ranked one by one instead of counted again

// Keys above `low` number above_low >= k, keys above `high` number above_high < k.
template <typename Key>
struct Interval {
  Key low, high;
  int64_t above_low, above_high;

  int64_t candidates() const { return above_low - above_high; }
  int64_t width() const { return static_cast<int64_t>(high) - low; }
  bool settled(int64_t k) const {
    return width() == 1 || candidates() <= kFew || candidates() == k - above_high;
  }
  void learn(Key threshold, int64_t above, int64_t k) {
    if (above >= k) {
      if (threshold > low) low = threshold, above_low = above;
    } else if (threshold < high) {
      high = threshold, above_high = above;
    }
  }
};

// Narrows the interval round the k-th largest key, two thresholds a pass over the row.
template <typename Key, typename Count>
void narrow(const Key* keys, int64_t blocks, int64_t k, double center, double reach, Count count,
            Interval<Key>& interval) {
  for (int pass = 0; !interval.settled(k); ++pass) {
    double low = center - reach, high = center + reach;
    if (pass > 3 || !(reach > 0)) {  // thirds always arrive
      low = interval.low + interval.width() / 3.0;
      high = interval.low + interval.width() / 1.5;
    }
    double first = static_cast<double>(interval.low) + 1, last = interval.high - 1.0;
    Key a = static_cast<Key>(std::min(std::max(std::floor(low), first), last));
    Key b = static_cast<Key>(std::min(std::max(std::floor(high), static_cast<double>(a)), last));
    int64_t above[2];
    count(keys, blocks, a, b, above);
    interval.learn(a, above[0], k);
    interval.learn(b, above[1], k);
    // Keys lie about evenly over a stretch this short: aim where the k-th should be.
    if (above[0] >= k && above[1] < k) {
      double density = std::max<double>(interval.candidates(), 1) / interval.width();
      center = interval.low + (interval.above_low - k) / density;
      reach = std::max(0.3 * kFew / density, 0.5);
    } else {
      double density = std::max<double>(above[0] - above[1], 1) / std::max(b - a, 1);
      center = above[1] >= k ? b + (above[1] - k) / density : a - (k - above[0]) / density;
      reach = std::max(0.5 * kFew / density, 0.25 * std::fabs(center - (above[1] >= k ? b : a)));
    }
  }
}

uint64_t composite(int32_t key, int64_t column) {  // unsigned order = (key, column)
  return (static_cast<uint64_t>(static_cast<uint32_t>(key) ^ 0x80000000u) << 32) |
         static_cast<uint64_t>(column);
}

}  // namespace

void mark_all(int64_t columns, uint32_t* marks) {
  int64_t blocks = num_blocks(columns);
  for (int64_t b = 0; b < blocks; ++b) marks[b] = ~0u;
  if (columns % kBlock) marks[blocks - 1] = (1u << (columns % kBlock)) - 1;
}

void mark_last_bits(const uint32_t* from, int64_t blocks, int64_t count, uint32_t* to) {
  for (int64_t b = blocks - 1; b >= 0 && count > 0; --b) {
    uint32_t word = from[b];
    int64_t here = __builtin_popcount(word);
    for (; here > count; --here) word &= word - 1;  // drop the first ones
    to[b] |= word;
    count -= here;
  }
}

RowSelector::RowSelector(int64_t max_columns, int64_t max_group)
    : keys16_(num_blocks(max_columns) * kBlock),
      keys32_(num_blocks(max_columns) * kBlock),
      between_(num_blocks(max_columns)),
      composites_(max_group) {}

int16_t* RowSelector::keys16(const Source& source) {
  rows().keys16(source, keys16_.data());
  return keys16_.data();
}

int32_t* RowSelector::keys32(const Source& source) {
  rows().keys32(source, keys32_.data());
  return keys32_.data();
}

void RowSelector::select(const Source& source, int64_t k, bool largest, Guess& guess,
                         uint32_t* marks) {
  int64_t columns = source.columns;
  select_last(source, largest ? k : columns - k, guess, marks);
  if (largest) return;
  for (int64_t b = 0; b < num_blocks(columns); ++b) marks[b] = ~marks[b];
  if (columns % kBlock) marks[num_blocks(columns) - 1] &= (1u << (columns % kBlock)) - 1;
}

void RowSelector::select_last(const Source& source, int64_t k, Guess& guess, uint32_t* marks) {
  const Rows& table = rows();
  int64_t columns = source.columns, blocks = num_blocks(columns);
  if (k <= 0 || k >= columns) {
    std::fill(marks, marks + blocks, 0u);
    if (k > 0) mark_all(columns, marks);
    return;
  }
  int16_t* coarse = keys16(source);
  Interval<int16_t> near = {kMinKey16, kCanonicalNan >> 16, columns, 0};
  narrow(coarse, blocks, k, guess.center, guess.reach, table.count16, near);
  double density = std::max<double>(near.candidates(), 1) / near.width();
  double center = near.low + (near.above_low - k) / density;
  guess.center = static_cast<float>(guess.reach > 0 ? (guess.center + center) / 2 : center);
  guess.reach = static_cast<float>(std::max(0.5 * kFew / density, 0.5));
  table.mark16(coarse, blocks, near.low, near.high, marks, between_.data());
  int64_t need = k - near.above_high;
  if (near.candidates() == need || near.candidates() <= kFew) {
    return pick(source, need, near.candidates(), marks);
  }
  // Many keys share the high half: go on with whole keys.
  int32_t* keys = keys32(source);
  Interval<int32_t> exact = {near.low * 65536 + 0xFFFF, near.high * 65536 + 0xFFFF, near.above_low,
                             near.above_high};
  narrow(keys, blocks, k, 0, 0, table.count32, exact);
  table.mark32(keys, blocks, exact.low, exact.high, marks, between_.data());
  need = k - exact.above_high;
  if (exact.width() == 1) return mark_last_bits(between_.data(), blocks, need, marks);  // ties
  pick(source, need, exact.candidates(), marks);
}

// Adds to `marks` the last `need` of the candidates that between_ marks.
void RowSelector::pick(const Source& source, int64_t need, int64_t candidates, uint32_t* marks) {
  int64_t blocks = num_blocks(source.columns);
  if (need == candidates) {
    for (int64_t b = 0; b < blocks; ++b) marks[b] |= between_[b];
    return;
  }
  uint64_t few[kFew];
  int64_t found = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    for (uint32_t left = between_[b]; left != 0; left &= left - 1) {
      int64_t column = b * kBlock + __builtin_ctz(left);
      few[found++] = composite(key_at(source, column), column);
    }
  }
  std::nth_element(few, few + (found - need), few + found);
  for (int64_t i = found - need; i < found; ++i) {
    int64_t column = static_cast<int64_t>(few[i] & 0xFFFFFFFFu);
    marks[column / kBlock] |= 1u << (column % kBlock);
  }
}

void RowSelector::select_groups(const Source& source, int64_t removed, int64_t group, bool largest,
                                uint32_t* marks) {
  const int32_t* keys = keys32(source);
  std::fill(marks, marks + num_blocks(source.columns), 0u);
  for (int64_t begin = 0; begin < source.columns; begin += group) {
    int64_t size = std::min(group, source.columns - begin);
    int64_t count = size == group ? removed : size * removed / group;
    mark_group(keys, begin, size, count, largest, marks);
  }
}

void RowSelector::mark_group(const int32_t* keys, int64_t begin, int64_t size, int64_t count,
                             bool largest, uint32_t* marks) {
  if (count == 0) return;
  if (size <= 8) {  // rank each by comparing it with the others
    for (int64_t i = begin; i < begin + size; ++i) {
      int64_t before = 0;
      for (int64_t j = begin; j < begin + size; ++j) {
        before += keys[j] < keys[i] || (keys[j] == keys[i] && j < i);
      }
      bool removed = largest ? before >= size - count : before < count;
      marks[i / kBlock] |= static_cast<uint32_t>(removed) << (i % kBlock);
    }
    return;
  }
  uint64_t* all = composites_.data();
  for (int64_t i = 0; i < size; ++i) all[i] = composite(keys[begin + i], begin + i);
  int64_t first = largest ? size - count : 0, last = first + count;
  int64_t cut = largest ? first : last;
  if (cut < size) std::nth_element(all, all + cut, all + size);
  for (int64_t i = first; i < last; ++i) {
    int64_t column = static_cast<int64_t>(all[i] & 0xFFFFFFFFu);
    marks[column / kBlock] |= 1u << (column % kBlock);
  }
}

float RowSelector::edge(const Source& source, bool largest, const uint32_t* marks) {
  const int32_t* keys = keys32(source);
  int32_t best = largest ? kMaxKey : kMinKey;
  for (int64_t b = 0; b < num_blocks(source.columns); ++b) {
    for (uint32_t left = marks[b]; left != 0; left &= left - 1) {
      int32_t key = keys[b * kBlock + __builtin_ctz(left)];
      best = largest ? std::min(best, key) : std::max(best, key);
    }
  }
  if (best == kMaxKey || best == kMinKey) return std::numeric_limits<float>::quiet_NaN();
  return float_of_bits(static_cast<uint32_t>(best));
}

}  // namespace antidote::cpu
