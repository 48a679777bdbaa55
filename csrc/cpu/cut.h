// Where a selection over a whole tensor, or over a list of them, cuts: three exact passes.
#pragma once

#include <vector>

#include "worker.h"

namespace antidote::cpu {

// The last k in the order (key, flat index) are the keys above `key`, and of those equal to it the
// ones from row `tie_row` on: all of later rows, the last `ties_in_row` of that row.
struct Cut {
  int32_t key = kMaxKey;
  int64_t tie_matrix = 0, tie_row = 0, ties_in_row = 0;
  bool all = false;
  float edge = 0;
};

class Cuts {
 public:
  // Marks what the selection takes of one row.
  void mark(Worker& worker, const std::vector<Matrix>& matrices, int64_t matrix, int64_t row,
            uint32_t* marks) const;
  // The score at the edge of the selection that this matrix is part of; NaN where none was taken.
  float edge(int64_t matrix) const { return cuts_[cut_of_[matrix]].edge; }

 private:
  friend Cuts find_cuts(const std::vector<Matrix>&, const std::vector<Item>&, const Plan&, bool,
                        std::vector<Worker>&);
  bool largest_ = true, delta_ = false, signed_ = false, preserve_ = false;
  std::vector<Cut> cuts_;
  std::vector<int64_t> cut_of_;  // one cut a matrix, or one for all
};

// The cuts of the selection itself, or (preserve) of what is protected from it.
Cuts find_cuts(const std::vector<Matrix>& matrices, const std::vector<Item>& items,
               const Plan& plan, bool preserve, std::vector<Worker>& workers);

}  // namespace antidote::cpu
