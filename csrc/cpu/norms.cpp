// Sums of squares over tokens: each element read once, summed in float64, the same bits whatever
// the number of threads.

#include <algorithm>
#include <vector>

#include "prune.h"
#include "rows.h"
#include "threads.h"

namespace antidote::cpu {
namespace {

constexpr int64_t kTile = 4096;             // columns an item; its sums fit the first-level cache
constexpr int64_t kRowsAtOnce = 8;          // rows added to a sum while it is in a register
constexpr int64_t kPartialDoubles = 98304;  // 768 KB of partial sums at most

struct Shape {
  const std::vector<int64_t>& sizes;
  const std::vector<int64_t>& strides;

  int64_t rows() const {
    int64_t product = 1;
    for (int64_t size : sizes) product *= size;
    return product;
  }

  int64_t offset(int64_t row) const {
    int64_t at = 0;
    for (size_t d = sizes.size(); d-- > 0; row /= sizes[d]) at += row % sizes[d] * strides[d];
    return at;
  }
};

}  // namespace

void accumulate_sq_norm(const Rows& rows, float* sq_sum, const void* x, DType dtype,
                        int64_t columns, const std::vector<int64_t>& sizes,
                        const std::vector<int64_t>& strides, const uint8_t* token_mask,
                        int threads) {
  Shape shape{sizes, strides};
  int64_t num_rows = shape.rows();
  if (num_rows == 0 || columns == 0) return;
  int64_t tiles = (columns + kTile - 1) / kTile;
  // A function of the shape alone: threads must not change the order of a sum.
  int64_t row_blocks = std::min<int64_t>({16, (num_rows + 63) / 64, kPartialDoubles / columns});
  row_blocks = std::max<int64_t>(row_blocks, 1);
  int64_t rows_per_block = (num_rows + row_blocks - 1) / row_blocks;
  int64_t items = row_blocks * tiles;
  if (num_rows * columns < (1 << 18)) threads = 1;  // some 30 us: not worth waking others

  threads = static_cast<int>(std::min<int64_t>(std::max(threads, 1), items));
  std::vector<double> partial(row_blocks > 1 ? row_blocks * columns : 0);
  std::vector<double> spare(row_blocks > 1 ? 0 : threads * kTile);
  int64_t size = item_size(dtype);
  parallel_for(items, threads, [&](int thread, int64_t item) {
    int64_t block = item / tiles, first = item % tiles * kTile;
    int64_t width = std::min(kTile, columns - first);
    double* sums =
        row_blocks > 1 ? partial.data() + block * columns + first : spare.data() + thread * kTile;
    if (row_blocks == 1) std::fill(sums, sums + width, 0.0);
    const void* group[kRowsAtOnce];
    int64_t grouped = 0;
    int64_t last = std::min(num_rows, (block + 1) * rows_per_block);
    for (int64_t r = block * rows_per_block; r < last; ++r) {
      if (token_mask != nullptr && !token_mask[r]) continue;
      group[grouped++] = static_cast<const char*>(x) + (shape.offset(r) + first) * size;
      if (grouped == kRowsAtOnce) {
        rows.add_squares(group, grouped, width, dtype, sums);
        grouped = 0;
      }
    }
    if (grouped) rows.add_squares(group, grouped, width, dtype, sums);
    if (row_blocks == 1) {
      for (int64_t c = 0; c < width; ++c) {
        sq_sum[first + c] = static_cast<float>(sq_sum[first + c] + sums[c]);
      }
    }
  });
  if (row_blocks == 1) return;
  for (int64_t c = 0; c < columns; ++c) {
    double total = 0;
    for (int64_t b = 0; b < row_blocks; ++b) total += partial[b * columns + c];
    sq_sum[c] = static_cast<float>(sq_sum[c] + total);
  }
}

}  // namespace antidote::cpu
