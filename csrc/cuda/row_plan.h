// How the rows of a matrix are shared out: decided on the host from shapes, strides and addresses.
#pragma once

#include <vector>

#include "prune.h"
#include "rows.cuh"

namespace antidote::cuda {

constexpr int kThreadsOfMany = 256;  // of a block of warps or threads with a row each

// The entry of a matrix without first_tile; its flags say who prunes a row.
RowEntry row_entry(const Matrix& matrix, const Plan& plan, const Device& device);

// Threads of a block that takes a whole row.
int threads_of_row(uint32_t columns);

// A launch over a list: a block's threads and shared memory, and the tiles of all.
struct ListPlan {
  int threads;
  size_t shared;
  int64_t tiles;
};

// Fills in first_tile, and the ranks in samples, which depend on the threads.
ListPlan plan_list(std::vector<RowEntry>& entries, int item_size);

// The ranks, in a row's sample, between which the wanted one lies almost surely.
void set_sample_ranks(RowEntry& entry, int threads);

}  // namespace antidote::cuda
