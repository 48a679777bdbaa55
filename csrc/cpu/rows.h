// What one row needs, in each instruction set: keys, counts, marks, removal. The files rows_*.cpp
// fill one table each; everything that decides (prune.cpp) is written once over the table.
//
// A row is worked in blocks of 32 columns. Key buffers hold whole blocks, the pads below every
// key; a mark is one 32-bit word a block, bit c = column c of the block.
#pragma once

#include <cstdint>
#include <vector>

#include "selection.h"

namespace antidote::cpu {

constexpr int64_t kBlock = 32;
constexpr int16_t kMinKey16 = INT16_MIN;
constexpr int64_t kFew = 64;

static inline int64_t num_blocks(int64_t columns) { return (columns + kBlock - 1) / kBlock; }

// Where a row's scores come from.
struct Source {
  const void* weight;
  const void* base;       // null, or scored as |weight - base|
  const float* norm;      // in column order; null: plain magnitude
  const float* laid_out;  // the same (1 for null) in whole blocks, in the order of Rows::norm_half
  int64_t columns;
  DType dtype;
  bool is_signed;     // fp32 values compared as they are (select_mask); the norms are not used
  const void* ahead;  // the row that will be read next, to prefetch; never dereferenced
};

// The key of one column.
static inline int32_t key_at(const Source& source, int64_t column) {
  float value = load_float(source.weight, column, source.dtype);
  if (source.is_signed) return key_of_signed(bits_of_float(value));
  if (source.base != nullptr) value = value - load_float(source.base, column, source.dtype);
  if (source.norm != nullptr) value = value * source.norm[column];
  return key_of_score(bits_of_float(value));
}

// sums[c] += the squares of columns [first, columns) of some rows, one by one.
static inline void add_tail_squares(const void* const* rows, int64_t num_rows, int64_t first,
                                    int64_t columns, DType dtype, double* sums) {
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t c = first; c < columns; ++c) {
      double value = load_float(rows[r], c, dtype);
      sums[c] += value * value;
    }
  }
}

struct Rows {
  const char* name;
  // bf16 norms are kept with even columns before odd ones in runs of 2 * norm_half, which is how
  // one load splits into floats without a shuffle. 0: in order.
  int64_t norm_half;
  void (*keys16)(const Source&, int16_t* keys);  // the high half of each key
  void (*keys32)(const Source&, int32_t* keys);
  // above: key > high; between: low < key <= high; counts: how many keys of whole blocks are above
  // low, and above high.
  void (*mark16)(const int16_t*, int64_t blocks, int16_t low, int16_t high, uint32_t* above,
                 uint32_t* between, int64_t counts[2]);
  void (*mark32)(const int32_t*, int64_t blocks, int32_t low, int32_t high, uint32_t* above,
                 uint32_t* between, int64_t counts[2]);
  // Which of up to kFew keys are the last `need` in the order (key, position): bit i = keys[i].
  // Whole blocks are read; what lies past `count` does not matter.
  uint64_t (*last_of_few)(const int32_t* keys, int count, int need);
  // Marked elements become +0, or the bits of base.
  void (*remove)(const uint32_t* marks, int64_t columns, DType dtype, void* weight,
                 const void* base);
  // sums[c] += the squares of `rows` rows of x at the given byte addresses, columns [0, columns).
  void (*add_squares)(const void* const* rows, int64_t num_rows, int64_t columns, DType dtype,
                      double* sums);
};

extern const Rows kRowsPlain;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define ANTIDOTE_X86 1
extern const Rows kRowsAvx2;
extern const Rows kRowsAvx512;
#endif

// The tables that this machine can run, the fastest first.
const std::vector<const Rows*>& supported_rows();

}  // namespace antidote::cpu
