// Adjacent weights of a row in the registers of a thread, and how a matrix is cut into such units.
#pragma once

#include "divide.cuh"
#include "keys.cuh"
#include "matrix.h"

namespace antidote::cuda {

// A matrix in units of adjacent columns, numbered row by row.
struct Units {
  int64_t count, columns;
  int64_t weight_stride, base_stride;  // in elements
  int width;                           // columns of a unit
  bool vector;                         // all units are whole, and can be moved 16 bytes at a time
  Divider a_row;

  static cudaError_t of(const Matrix& m, int width, Units* units) {
    const int64_t a_row = (m.columns + width - 1) / width, bytes = item_size(m.dtype) * width;
    *units = {m.rows * a_row, m.columns, m.weight_stride, m.base_stride, width, true, {}};
    if (!Divider::serves(units->count, a_row)) return cudaErrorInvalidValue;
    units->a_row = Divider::by(a_row);
    const int64_t align = bytes < 16 ? bytes : 16;
    units->vector = m.columns % width == 0 && aligned(m.weight, m.weight_stride, m, align) &&
                    aligned(m.base, m.base_stride, m, align) &&
                    reinterpret_cast<uintptr_t>(m.act_norm) % 16 == 0;
    return cudaSuccess;
  }

  static bool aligned(const void* data, int64_t stride, const Matrix& m, int64_t align) {
    const int64_t step = m.rows > 1 ? stride * item_size(m.dtype) : 0;
    return data == nullptr || (reinterpret_cast<uintptr_t>(data) % align == 0 && step % align == 0);
  }
};

#if defined(__CUDACC__) || defined(ANTIDOTE_SIMT)

// Where a unit lies.
struct Place {
  int64_t row, column;
  __device__ __forceinline__ Place(const Units& units, int64_t unit) {
    row = units.a_row.quotient(unit);
    column = units.a_row.remainder(unit, row) * units.width;
  }
};

// Raw weights in words: two of 16 bits, or one of 32.
template <int DTYPE, int WIDTH>
constexpr int kWords = WIDTH * sizeof(typename RawOf<DTYPE>::type) / 4;

template <int DTYPE>
__device__ __forceinline__ uint32_t raw_of(const uint32_t* words, int i) {
  if (sizeof(typename RawOf<DTYPE>::type) == 4) return words[i];
  return i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xFFFFu;
}

// Loads WIDTH adjacent weights, in vectors or those of them below `valid`, 0 for the others.
template <int DTYPE, int WIDTH>
__device__ __forceinline__ void load_unit(const void* at, bool vector, int64_t valid,
                                          uint32_t (&words)[kWords<DTYPE, WIDTH>]) {
  using Raw = typename RawOf<DTYPE>::type;
  constexpr int kCount = kWords<DTYPE, WIDTH>;
  if (vector) {
    if constexpr (kCount == 2) {
      const uint2 two = *static_cast<const uint2*>(at);
      words[0] = two.x, words[1] = two.y;
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const uint4 four = static_cast<const uint4*>(at)[i / 4];
        words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) words[i] = 0;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    if (i >= valid) continue;
    const uint32_t raw = static_cast<const Raw*>(at)[i];
    words[i * kCount / WIDTH] |= sizeof(Raw) == 2 && i % 2 ? raw << 16 : raw;
  }
}

// Stores what `removed` marks, from `words` (the weights as they are) and `fill`.
template <int DTYPE, int WIDTH>
__device__ __forceinline__ void store_removed(void* at, bool vector, uint32_t removed,
                                              const uint32_t (&words)[kWords<DTYPE, WIDTH>],
                                              const uint32_t (&fill)[kWords<DTYPE, WIDTH>]) {
  using Raw = typename RawOf<DTYPE>::type;
  constexpr int kCount = kWords<DTYPE, WIDTH>, kPerWord = WIDTH / kCount;
  if (!vector) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      if (removed >> i & 1) static_cast<Raw*>(at)[i] = static_cast<Raw>(raw_of<DTYPE>(fill, i));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const uint32_t dirty = removed >> (i * kPerWord) & ((1u << (4 * kPerWord)) - 1);
    if (dirty == 0) continue;
    uint32_t out[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t two = dirty >> (j * kPerWord);
      uint32_t mask = two & 1 ? (kPerWord == 2 ? 0xFFFFu : 0xFFFFFFFFu) : 0;
      if (kPerWord == 2 && (two & 2)) mask |= 0xFFFF0000u;
      out[j] = (words[i + j] & ~mask) | (fill[i + j] & mask);
    }
    static_cast<uint4*>(at)[i / 4] = make_uint4(out[0], out[1], out[2], out[3]);
  }
}

#endif

}  // namespace antidote::cuda
