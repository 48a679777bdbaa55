// Scores as a matrix, and masks applied.
#include <algorithm>

#include "columns.cuh"
#include "prune.h"

namespace antidote::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAtOnce = 4;  // units of a thread, all loaded before one is stored

struct ScoreTask {
  Units units;
  const void* weight;
  const void* base;  // null: no difference
  const float* norm;
  float* out;
  float one;  // a 1 that the compiler does not know: a NaN must pass a multiplication
};

// Units of 4 columns, so that a warp's stores are adjacent.
template <int DTYPE>
__global__ void __launch_bounds__(kThreads) score_kernel(const __grid_constant__ ScoreTask t) {
  using Raw = typename RawOf<DTYPE>::type;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kAtOnce + threadIdx.x;
  uint32_t words[kAtOnce][kWords<DTYPE, 4>];
#pragma unroll
  for (int u = 0; u < kAtOnce; ++u) {
    if (first + u * kThreads >= t.units.count) continue;
    const Place place(t.units, first + u * kThreads);
    const int64_t start = place.row * t.units.weight_stride + place.column;
    load_unit<DTYPE, 4>(static_cast<const Raw*>(t.weight) + start, t.units.vector,
                        t.units.columns - place.column, words[u]);
  }
#pragma unroll
  for (int u = 0; u < kAtOnce; ++u) {
    if (first + u * kThreads >= t.units.count) continue;
    const Place place(t.units, first + u * kThreads);
    const int64_t valid = t.units.columns - place.column;
    uint32_t base[kWords<DTYPE, 4>];
    if (t.base != nullptr) {
      const int64_t other = place.row * t.units.base_stride + place.column;
      load_unit<DTYPE, 4>(static_cast<const Raw*>(t.base) + other, t.units.vector, valid, base);
    }
    float scores[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float value = value_of<DTYPE>(raw_of<DTYPE>(words[u], i));
      if (t.base != nullptr) value = __fsub_rn(value, value_of<DTYPE>(raw_of<DTYPE>(base, i)));
      const bool has_norm = t.norm != nullptr && i < valid;
      scores[i] = score_of_key(key_of(value, has_norm ? t.norm[place.column + i] : t.one));
    }
    float* out = t.out + place.row * t.units.columns + place.column;
    if (t.units.vector) {
      *reinterpret_cast<float4*>(out) = make_float4(scores[0], scores[1], scores[2], scores[3]);
      continue;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < valid) out[i] = scores[i];
    }
  }
}

struct MaskTask {
  Units units;
  void* weight;
  const void* base;
  const uint8_t* bits;
  int64_t bits_stride;
};

// Units of 16 bytes; DTYPE says only how long a weight is.
template <int DTYPE>
__global__ void __launch_bounds__(kThreads) apply_kernel(const __grid_constant__ MaskTask t) {
  using Raw = typename RawOf<DTYPE>::type;
  constexpr int kWidth = 16 / sizeof(Raw);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kAtOnce + threadIdx.x;
  uint32_t removed[kAtOnce], words[kAtOnce][4];
#pragma unroll
  for (int u = 0; u < kAtOnce; ++u) {
    removed[u] = 0;
    if (first + u * kThreads >= t.units.count) continue;
    const Place place(t.units, first + u * kThreads);
    const uint32_t byte = t.bits[place.row * t.bits_stride + (place.column >> 3)];
    const int64_t valid = t.units.columns - place.column;  // pad bits may be anything
    removed[u] = byte >> (place.column & 7) & ((1u << min(valid, int64_t{kWidth})) - 1);
  }
#pragma unroll
  for (int u = 0; u < kAtOnce; ++u) {
    if (removed[u] == 0 || !t.units.vector) continue;
    const Place place(t.units, first + u * kThreads);
    const int64_t start = place.row * t.units.weight_stride + place.column;
    load_unit<DTYPE, kWidth>(static_cast<const Raw*>(t.weight) + start, true, kWidth, words[u]);
  }
#pragma unroll
  for (int u = 0; u < kAtOnce; ++u) {
    if (removed[u] == 0) continue;
    const Place place(t.units, first + u * kThreads);
    uint32_t fill[4] = {};
    if (t.base != nullptr) {
      const int64_t other = place.row * t.units.base_stride + place.column;
      load_unit<DTYPE, kWidth>(static_cast<const Raw*>(t.base) + other, t.units.vector,
                               t.units.columns - place.column, fill);
    }
    const int64_t start = place.row * t.units.weight_stride + place.column;
    store_removed<DTYPE, kWidth>(static_cast<Raw*>(t.weight) + start, t.units.vector, removed[u],
                                 words[u], fill);
  }
}

Grid grid_of(const Units& units, cudaStream_t stream) {
  constexpr int64_t kUnits = kThreads * kAtOnce;
  return {(units.count + kUnits - 1) / kUnits, kThreads, 0, stream};
}

}  // namespace

cudaError_t score(const Matrix& m, bool delta, float* out, cudaStream_t stream) {
  ScoreTask task{{}, m.weight, delta ? m.base : nullptr, m.act_norm, out, 1.0f};
  ANTIDOTE_TRY(Units::of(m, 4, &task.units));
  task.units.vector &= reinterpret_cast<uintptr_t>(out) % 16 == 0;
  const Grid grid = grid_of(task.units, stream);
  switch (m.dtype) {
    case DType::kBf16:
      return launch(grid, score_kernel<kBf16>, task);
    case DType::kFp16:
      return launch(grid, score_kernel<kFp16>, task);
    default:
      return launch(grid, score_kernel<kFp32>, task);
  }
}

cudaError_t apply_mask(const Matrix& m, cudaStream_t stream) {
  MaskTask task{{}, m.weight, m.base, m.bits, (m.columns + 7) / 8};
  ANTIDOTE_TRY(Units::of(m, static_cast<int>(16 / item_size(m.dtype)), &task.units));
  const Grid grid = grid_of(task.units, stream);
  if (m.dtype == DType::kFp32) return launch(grid, apply_kernel<kFp32>, task);
  return launch(grid, apply_kernel<kBf16>, task);
}

}  // namespace antidote::cuda
