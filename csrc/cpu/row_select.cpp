#include "row_select.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace antidote::cpu {
namespace {

// Aim for a stretch that holds this many keys on either side of the k-th.
constexpr double kReach = 0.35 * kFew;

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

// Narrows the interval round the k-th largest key, two thresholds a pass over the row, and leaves
// the row marked with it: above its high end, and between its ends.
template <typename Key, typename Mark>
void narrow(const Key* keys, int64_t blocks, int64_t k, double center, double reach, Mark mark,
            uint32_t* above, uint32_t* between, Interval<Key>& interval) {
  Key a = interval.low, b = interval.low;  // what the marks were made with; equal: not at all
  int64_t counts[2];
  for (int pass = 0; !interval.settled(k); ++pass) {
    double low = center - reach, high = center + reach;
    if (pass > 3 || !(reach > 0)) {  // thirds always arrive
      low = interval.low + interval.width() / 3.0;
      high = interval.low + interval.width() / 1.5;
    }
    double first = static_cast<double>(interval.low) + 1, last = interval.high - 1.0;
    a = static_cast<Key>(std::min(std::max(std::floor(low), first), last));
    b = static_cast<Key>(std::min(std::max(std::floor(high), static_cast<double>(a)), last));
    mark(keys, blocks, a, b, above, between, counts);
    interval.learn(a, counts[0], k);
    interval.learn(b, counts[1], k);
    // Keys lie about evenly over a stretch this short: aim where the k-th should be.
    if (counts[0] >= k && counts[1] < k) {
      double density = std::max<double>(interval.candidates(), 1) / interval.width();
      center = interval.low + (interval.above_low - k) / density;
      reach = std::max(kReach / density, 0.5);
    } else {
      bool higher = counts[1] >= k;
      double density = std::max<double>(counts[0] - counts[1], 1) / std::max<int64_t>(b - a, 1);
      center = higher ? b + (counts[1] - k) / density : a - (k - counts[0]) / density;
      reach = std::max(kReach / density, 0.25 * std::fabs(center - (higher ? b : a)));
    }
  }
  if (a != interval.low || b != interval.high) {
    mark(keys, blocks, interval.low, interval.high, above, between, counts);
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

RowSelector::RowSelector(const Rows& rows, int64_t max_columns, int64_t max_group)
    : rows_(rows),
      keys16_(num_blocks(max_columns) * kBlock),
      keys32_(std::max(num_blocks(max_columns) * kBlock, kFew)),
      between_(num_blocks(max_columns)),
      hit_blocks_(num_blocks(max_columns)),
      composites_(max_group) {}

int16_t* RowSelector::keys16(const Source& source) {
  rows_.keys16(source, keys16_.data());
  return keys16_.data();
}

int32_t* RowSelector::keys32(const Source& source) {
  rows_.keys32(source, keys32_.data());
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
  int64_t columns = source.columns, blocks = num_blocks(columns);
  if (k <= 0 || k >= columns) {
    std::fill(marks, marks + blocks, 0u);
    if (k > 0) mark_all(columns, marks);
    return;
  }
  if (columns <= kFew) {  // LoRA B: as wide as its rank
    uint64_t last =
        rows_.last_of_few(keys32(source), static_cast<int>(columns), static_cast<int>(k));
    marks[0] = static_cast<uint32_t>(last);
    if (blocks > 1) marks[1] = static_cast<uint32_t>(last >> 32);
    return;
  }
  int16_t* coarse = keys16(source);
  uint32_t* between = between_.data();
  Interval<int16_t> near = {kMinKey16, kCanonicalNan >> 16, columns, 0};
  narrow(coarse, blocks, k, guess.center, guess.reach, rows_.mark16, marks, between, near);
  double density = std::max<double>(near.candidates(), 1) / near.width();
  double center = near.low + (near.above_low - k) / density;
  guess.center = static_cast<float>(guess.reach > 0 ? (guess.center + center) / 2 : center);
  guess.reach = static_cast<float>(std::max(kReach / density, 0.5));
  int64_t need = k - near.above_high;
  if (near.candidates() == need || near.candidates() <= kFew) {
    return pick(source, need, near.candidates(), marks);
  }
  // Many keys share the high half: go on with whole keys.
  Interval<int32_t> exact = {near.low * 65536 + 0xFFFF, near.high * 65536 + 0xFFFF, near.above_low,
                             near.above_high};
  narrow(keys32(source), blocks, k, 0, 0, rows_.mark32, marks, between, exact);
  need = k - exact.above_high;
  if (exact.width() == 1) return mark_last_bits(between, blocks, need, marks);  // ties
  pick(source, need, exact.candidates(), marks);
}

// Adds to `marks` the last `need` of the candidates that between_ marks.
void RowSelector::pick(const Source& source, int64_t need, int64_t candidates, uint32_t* marks) {
  int64_t blocks = num_blocks(source.columns);
  if (need == candidates) {
    for (int64_t b = 0; b < blocks; ++b) marks[b] |= between_[b];
    return;
  }
  // No branch a block: where the candidates are cannot be predicted.
  int64_t hits = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    hit_blocks_[hits] = static_cast<int32_t>(b);
    hits += between_[b] != 0;
  }
  int32_t keys[kFew], columns[kFew];
  int found = 0;
  for (int64_t h = 0; h < hits; ++h) {
    int32_t block = hit_blocks_[h];
    for (uint32_t left = between_[block]; left != 0; left &= left - 1) {
      columns[found] = block * static_cast<int32_t>(kBlock) + __builtin_ctz(left);
      keys[found] = key_at(source, columns[found]);
      ++found;
    }
  }
  uint64_t last = rows_.last_of_few(keys, found, static_cast<int>(need));
  for (; last != 0; last &= last - 1) {
    int32_t column = columns[__builtin_ctzll(last)];
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
