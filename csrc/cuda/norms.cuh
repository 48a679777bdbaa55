// Sums of squares over tokens, the same bits on every run and for every size of block.
//
// A work item is a block of columns (256 of 16 bits, 128 of fp32) over a split of the tokens. Its
// tokens are dealt to kNormStrands strands; one warp sums a strand, and the strands are added in
// their order. Squares are summed in fp32 over a run of tokens (8 of 16 bits, 4 of fp32), these in
// float64; splits are added in their order too, and the total is rounded once. Which tokens a
// strand takes depends on the shape and on the number of processors, never on the launch.
//
// A kernel that does more than sums (linear.cu) calls, with a plan whose partials are in scratch
// and whose sums are null:
//
//   sum_items<DTYPE>(plan, shared, at_once);         // all threads of all blocks
//   grid_sync();
//   ... combined(plan, column) ...                   // a thread a column, any thread
//
// where `shared` holds at_once * kNormShared doubles. at_once > 1 lets a block of at_once * 256
// threads or more work on several items at a time; a block of fewer threads takes its strands in
// turns. float(combined) is what accumulate_sq_norm leaves in sums that were zero.
#pragma once

#include "divide.cuh"
#include "keys.cuh"
#include "prune.h"

namespace antidote::cuda {

constexpr int kNormDims = 8;        // dimensions of tokens that do not merge
constexpr int kNormStrands = 8;     // warps of a block in norms.cu
constexpr int kNormSlots = 32 * 9;  // doubles of a strand: 8 a lane, and one so that banks differ
constexpr int kNormShared = kNormStrands * kNormSlots;  // doubles of an item

struct NormPlan {
  const void* x;
  const uint8_t* token_mask;  // null: every token counts
  float* sums;                // added to, where not null (one split)
  double* partials;           // (splits, columns), written where sums is null
  int64_t tokens, columns;
  int64_t splits, per_split;   // the tokens of a split
  int64_t blocks, items;       // blocks of columns; items = splits * blocks
  Divider blocks_of;           // by blocks
  Divider sizes[kNormDims];    // dimensions of the tokens, outermost first
  int64_t strides[kNormDims];  // in elements
  int dims;                    // at least 1
  int lane_shift;              // 2^lane_shift lanes take a token; a warp 32 >> lane_shift tokens
  DType dtype;
  bool vector;  // 16-byte loads are possible
};

// The plan of a call on the current device; sums and partials stay null. An error where more than
// kNormDims dimensions do not merge.
cudaError_t plan_norms(const Activations& x, NormPlan* plan);

// Bytes of the partials of a plan.
static inline size_t partial_bytes(const NormPlan& plan) {
  return static_cast<size_t>(plan.splits) * plan.columns * sizeof(double);
}

#if defined(__CUDACC__) || defined(ANTIDOTE_SIMT)

// Columns of a lane, which is also the number of tokens of a run.
template <int DTYPE>
constexpr int kNormColumns = DTYPE == kFp32 ? 4 : 8;

__device__ __forceinline__ int64_t token_offset(const NormPlan& p, int64_t token) {
  int64_t offset = 0;
#pragma unroll 1
  for (int d = p.dims - 1; d > 0; --d) {
    const int64_t outer = p.sizes[d].quotient(token);
    offset += p.sizes[d].remainder(token, outer) * p.strides[d];
    token = outer;
  }
  return offset + token * p.strides[0];
}

// Whether `span` tokens from one on differ in the innermost dimension alone.
__device__ __forceinline__ bool evenly_spaced(const NormPlan& p, int64_t token, int span) {
  if (p.dims == 1) return true;
  const Divider& inner = p.sizes[p.dims - 1];
  const int64_t place = inner.remainder(token, inner.quotient(token));
  return place + span <= static_cast<int64_t>(inner.size);
}

// 16 bytes of values that lie `step` apart; 0 for those from `left` on.
template <typename Raw>
__device__ __forceinline__ uint4 gathered(const Raw* at, int step, int left) {
  constexpr int kValues = 16 / sizeof(Raw);
  uint32_t words[4] = {};
#pragma unroll
  for (int j = 0; j < kValues; ++j) {
    const uint32_t value = j * step < left ? at[j * step] : 0;
    words[j * 4 / kValues] |= sizeof(Raw) == 2 && j % 2 ? value << 16 : value;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// sums += the squares of 16 bytes. A fused multiply-add: squares of 16-bit values are exact anyway.
template <int DTYPE>
__device__ __forceinline__ void add_squares(const uint4& raw, float (&sums)[kNormColumns<DTYPE>]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < kNormColumns<DTYPE>; ++i) {
    float value;
    if (DTYPE == kFp32) {
      value = __uint_as_float(words[i]);
    } else if (DTYPE == kBf16) {
      value = __uint_as_float(i % 2 ? words[i / 2] & 0xFFFF0000u : words[i / 2] << 16);
    } else {
      value = half_to_float(i % 2 ? words[i / 2] >> 16 : words[i / 2]);
    }
    sums[i] = __fmaf_rn(value, value, sums[i]);
  }
}

// run += the squares of some tokens: those of kTokens that lie `step` apart which `counted` says.
template <int DTYPE, bool VECTOR, int kTokens, typename Raw>
__device__ __forceinline__ void add_tokens(const NormPlan& p, const Raw* at, int64_t step,
                                           unsigned counted, int left,
                                           float (&run)[kNormColumns<DTYPE>]) {
  uint4 raw[kTokens];
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    raw[i] = make_uint4(0, 0, 0, 0);
    if ((counted >> i & 1) != 0) {
      if (VECTOR) {
        raw[i] = *reinterpret_cast<const uint4*>(at);
      } else {
        raw[i] = gathered(at, 1 << p.lane_shift, left);
      }
    }
    at += step;
  }
#pragma unroll
  for (int i = 0; i < kTokens; ++i) add_squares<DTYPE>(raw[i], run);
}

// The squares of a lane's tokens and columns of one strand: of `count` tokens from `first` on. The
// totals stay in shared memory (volatile, or they would not): 16 registers fewer, for 16 bytes of
// it moved a 16-byte load.
template <int DTYPE, bool VECTOR>
__device__ __forceinline__ void sum_strand(const NormPlan& p, int64_t first, int count,
                                           int64_t column, int strand, volatile double* totals) {
  using Raw = typename RawOf<DTYPE>::type;
  constexpr int kRun = kNormColumns<DTYPE>;
  constexpr int kBatch = VECTOR ? 4 : 2;  // tokens whose loads are in flight: registers are few
  const int at_once = 32 >> p.lane_shift;
  const int span = kRun * at_once;
  const Raw* x = static_cast<const Raw*>(p.x) + column;
  const int left = static_cast<int>(min(p.columns - column, int64_t{256}));
  if (left <= 0) count = 0;
#pragma unroll 1
  for (int start = strand * span; start < count; start += kNormStrands * span) {
    const int place = start + (threadIdx.x % 32 >> p.lane_shift);
    const int64_t token = first + place;
    unsigned counted = (1u << kRun) - 1;
    if (p.token_mask != nullptr || count - start < span) {
      counted = 0;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        bool one = place + i * at_once < count;
        if (one && p.token_mask != nullptr) one = p.token_mask[token + i * at_once] != 0;
        counted |= static_cast<unsigned>(one) << i;
      }
    }
    float run[kRun] = {};
    if (evenly_spaced(p, first + start, span)) {
      const int64_t step = p.strides[p.dims - 1] * at_once;
      const Raw* at = x + token_offset(p, token);
#pragma unroll 1
      for (int i = 0; i < kRun; i += kBatch) {
        add_tokens<DTYPE, VECTOR, kBatch>(p, at, step, counted >> i, left, run);
        at += kBatch * step;
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kRun; ++i) {
        const Raw* at = x + token_offset(p, token + i * at_once);
        add_tokens<DTYPE, VECTOR, 1>(p, at, 0, counted >> i, left, run);
      }
    }
    double before[kRun];  // all are read before one is written: they wait for each other else
#pragma unroll
    for (int j = 0; j < kRun; ++j) before[j] = totals[j];
#pragma unroll
    for (int j = 0; j < kRun; ++j) totals[j] = before[j] + static_cast<double>(run[j]);
  }
}

// One strand of an item, into its part of the shared memory.
template <int DTYPE>
__device__ __forceinline__ void sum_strand_of(const NormPlan& p, int item, int strand,
                                              double* shared) {
  constexpr int kColumns = kNormColumns<DTYPE>;
  const int64_t split = p.blocks_of.quotient(item);
  const int64_t block = p.blocks_of.remainder(item, split);
  const int64_t first = split * p.per_split;
  const int count = static_cast<int>(min(p.tokens - first, p.per_split));
  const int lane = threadIdx.x % 32, place = lane & ((1 << p.lane_shift) - 1);
  const int64_t begin = block * kColumns << p.lane_shift;
  double* totals = shared + strand * kNormSlots + lane * (kColumns + 1);
#pragma unroll
  for (int j = 0; j < kColumns; ++j) totals[j] = 0;
  // A lane takes adjacent columns where it loads vectors, else every lanes-th one.
  if (p.vector) {
    sum_strand<DTYPE, true>(p, first, count, begin + place * kColumns, strand, totals);
  } else {
    sum_strand<DTYPE, false>(p, first, count, begin + place, strand, totals);
  }
}

// The sum of a column of an item over its strands, and over the lanes that share it.
template <int DTYPE>
__device__ __forceinline__ double sum_of_strands(const NormPlan& p, int inner,
                                                 const double* shared) {
  constexpr int kColumns = kNormColumns<DTYPE>;
  const int lanes = 1 << p.lane_shift;
  const int place = p.vector ? inner / kColumns : inner & (lanes - 1);
  const int j = p.vector ? inner % kColumns : inner >> p.lane_shift;
  double total = 0;
#pragma unroll 1
  for (int lane = place; lane < 32; lane += lanes) {
    const double* slot = shared + lane * (kColumns + 1) + j;
#pragma unroll
    for (int s = 0; s < kNormStrands; ++s) total += slot[s * kNormSlots];
  }
  return total;
}

// The work items of a whole launch, each once; for all threads of all its blocks.
template <int DTYPE>
__device__ __forceinline__ void sum_items(const NormPlan& p, double* shared, int at_once) {
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  const int group = warp / kNormStrands;
  const int width_shift = p.lane_shift + (DTYPE == kFp32 ? 2 : 3);
  const int items = static_cast<int>(p.items), step = gridDim.x * at_once;
#pragma unroll 1
  for (int base = blockIdx.x * at_once; base < items; base += step) {
    if (group < at_once && base + group < items) {
#pragma unroll 1
      for (int strand = warp % kNormStrands; strand < kNormStrands; strand += warps) {
        sum_strand_of<DTYPE>(p, base + group, strand, shared + group * kNormShared);
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < at_once << width_shift; i += blockDim.x) {
      const int local = i >> width_shift, inner = i - (local << width_shift);
      const int64_t split = p.blocks_of.quotient(base + local);
      const int64_t block = p.blocks_of.remainder(base + local, split);
      const int64_t column = (block << width_shift) + inner;
      if (base + local >= items || column >= p.columns) continue;
      const double total = sum_of_strands<DTYPE>(p, inner, shared + local * kNormShared);
      if (p.sums != nullptr) {
        p.sums[column] = static_cast<float>(static_cast<double>(p.sums[column]) + total);
      } else {
        p.partials[split * p.columns + column] = total;
      }
    }
    __syncthreads();
  }
}

// The sum of a column over its splits, in their order.
__device__ __forceinline__ double combined(const NormPlan& p, int64_t column) {
  constexpr int kAhead = 8;  // loads in flight
  double total = 0;
  for (int64_t split = 0; split < p.splits; split += kAhead) {
    double part[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      part[i] = split + i < p.splits ? __ldcg(p.partials + (split + i) * p.columns + column) : 0.0;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) total += part[i];
  }
  return total;
}

#endif

}  // namespace antidote::cuda
