// Rows in plain C++: the fallback on any machine, and the readable form of the other two.

#include "rows.h"

namespace antidote::cpu {
namespace {

template <typename Key>
void fill_keys(const Source& source, Key* keys, Key pad, int shift) {
  for (int64_t c = 0; c < source.columns; ++c) {
    keys[c] = static_cast<Key>(key_at(source, c) >> shift);
  }
  for (int64_t c = source.columns; c < num_blocks(source.columns) * kBlock; ++c) keys[c] = pad;
}

void keys16(const Source& source, int16_t* keys) { fill_keys(source, keys, kMinKey16, 16); }
void keys32(const Source& source, int32_t* keys) { fill_keys(source, keys, kMinKey, 0); }

template <typename Key>
void mark(const Key* keys, int64_t blocks, Key low, Key high, uint32_t* above, uint32_t* between,
          int64_t counts[2]) {
  counts[0] = counts[1] = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    uint32_t above_low = 0, above_high = 0;
    for (int64_t c = 0; c < kBlock; ++c) {
      above_low |= static_cast<uint32_t>(keys[b * kBlock + c] > low) << c;
      above_high |= static_cast<uint32_t>(keys[b * kBlock + c] > high) << c;
    }
    above[b] = above_high;
    between[b] = above_low & ~above_high;
    counts[0] += __builtin_popcount(above_low);
    counts[1] += __builtin_popcount(above_high);
  }
}

uint64_t last_of_few(const int32_t* keys, int count, int need) {
  uint64_t last = 0;
  for (int i = 0; i < count; ++i) {
    int behind = 0;  // the greater ones, and the equal ones further on
    for (int j = 0; j < count; ++j) behind += keys[j] > keys[i] || (keys[j] == keys[i] && j > i);
    last |= static_cast<uint64_t>(behind < need) << i;
  }
  return last;
}

template <typename Item>
void remove_items(const uint32_t* marks, int64_t columns, Item* weight, const Item* base) {
  for (int64_t b = 0; b < num_blocks(columns); ++b) {
    for (uint32_t left = marks[b]; left != 0; left &= left - 1) {
      int64_t c = b * kBlock + __builtin_ctz(left);
      weight[c] = base == nullptr ? Item{0} : base[c];
    }
  }
}

void remove(const uint32_t* marks, int64_t columns, DType dtype, void* weight, const void* base) {
  if (dtype == DType::kFp32) {
    remove_items(marks, columns, static_cast<uint32_t*>(weight),
                 static_cast<const uint32_t*>(base));
  } else {
    remove_items(marks, columns, static_cast<uint16_t*>(weight),
                 static_cast<const uint16_t*>(base));
  }
}

void add_squares(const void* const* rows, int64_t num_rows, int64_t columns, DType dtype,
                 double* sums) {
  add_tail_squares(rows, num_rows, 0, columns, dtype, sums);
}

}  // namespace

const Rows kRowsPlain = {"plain",       0,           keys16, keys32,     mark<int16_t>,
                         mark<int32_t>, last_of_few, remove, add_squares};

}  // namespace antidote::cpu
