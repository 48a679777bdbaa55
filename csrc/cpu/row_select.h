// Exact selection along one row: which columns are the last k in the order (key, column).
#pragma once

#include <cstdint>
#include <vector>

#include "rows.h"

namespace antidote::cpu {

// Where the last rows' thresholds lay, in units of the 16-bit key: where to look first in the next.
// A guess decides how soon the answer is found, never what it is.
struct Guess {
  float center = 0;
  float reach = 0;  // 0: no row seen yet
};

// One thread's memory for rows of up to `max_columns`, groups of up to `max_group`.
class RowSelector {
 public:
  RowSelector(const Rows& rows, int64_t max_columns, int64_t max_group);

  // Marks the last k (largest) or the first k columns in the order (key, column).
  void select(const Source& source, int64_t k, bool largest, Guess& guess, uint32_t* marks);
  // The same for each `group` columns: `removed` of each, tail * removed / group of a short one.
  void select_groups(const Source& source, int64_t removed, int64_t group, bool largest,
                     uint32_t* marks);
  // The score at the edge: the smallest marked (largest), else the largest marked; NaN if none.
  float edge(const Source& source, bool largest, const uint32_t* marks);

  int32_t* keys32(const Source& source);  // this row's keys, whole blocks
  int16_t* keys16(const Source& source);
  const Rows& rows() const { return rows_; }
  uint32_t* spare_marks() { return between_.data(); }

 private:
  void select_last(const Source& source, int64_t k, Guess& guess, uint32_t* marks);
  void pick(const Source& source, int64_t need, int64_t candidates, uint32_t* marks);
  void mark_group(const int32_t* keys, int64_t begin, int64_t size, int64_t count, bool largest,
                  uint32_t* marks);

  const Rows& rows_;
  std::vector<int16_t> keys16_;
  std::vector<int32_t> keys32_;
  std::vector<uint32_t> between_;
  std::vector<int32_t> hit_blocks_;
  std::vector<uint64_t> composites_;
};

// Marks the last `count` of the set bits of `from` in `to`.
void mark_last_bits(const uint32_t* from, int64_t blocks, int64_t count, uint32_t* to);

// All columns of a row; the pads stay 0.
void mark_all(int64_t columns, uint32_t* marks);

}  // namespace antidote::cpu
