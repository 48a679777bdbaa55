// Toys that csrc/simt must run rightly, or must see to be wrong; test_simt.py compiles and calls
// them as `toys NAME VARIANT [SEED...]`. A line of output is a result under one schedule.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cuda/launch.h"

using namespace antidote;
using namespace antidote::cuda;

namespace {

constexpr unsigned kAll = 0xFFFFFFFFu;

// ---- what the sanitizers see

struct Line {
  int values[64];
};

__global__ void write_past_static(int past, int* out) {
  ANTIDOTE_SHARED(Line, line);
  int* values = line.values;
  values[threadIdx.x + past] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void write_past_dynamic(int past, int* out) {
  int* values = reinterpret_cast<int*>(dynamic_shared());
  values[threadIdx.x + past] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void write_past_global(int past, int* out) { out[threadIdx.x + past] = threadIdx.x; }

__global__ void load_vector(int skipped, const unsigned* from, int* out) {
  uint4 four = __ldcg(reinterpret_cast<const uint4*>(from + skipped));
  out[0] = static_cast<int>(four.x + four.w);
}

// ---- what only an order of threads shows

__global__ void reverse(bool wait, int* out) {
  ANTIDOTE_SHARED(Line, line);
  line.values[threadIdx.x] = threadIdx.x;
  if (wait) __syncthreads();
  out[threadIdx.x] = line.values[63 - threadIdx.x];
}

// Its race needs an order in which a warp goes far ahead of another.
__global__ void two_rounds(bool wait, int* out) {
  ANTIDOTE_SHARED(Line, line);
  line.values[threadIdx.x] = 1;
  __syncthreads();
  int seen = line.values[threadIdx.x ^ 32];
  if (wait) __syncthreads();
  line.values[threadIdx.x] = 2;
  __syncthreads();
  out[threadIdx.x] = 10 * seen + line.values[threadIdx.x ^ 32];
}

struct Candidates {
  int columns[64];
  int count;
};

// Marks the last two of the columns with the largest key. Candidates come in any order; the wrong
// variant takes the first two that came.
__global__ void select_last_two(bool by_column, const int* keys, int* out) {
  ANTIDOTE_SHARED(Candidates, found);
  const int column = threadIdx.x;
  if (column == 0) found.count = 0;
  __syncthreads();
  if (keys[column] == 7) found.columns[atomicAdd(&found.count, 1)] = column;
  __syncthreads();
  int before = 0;
  for (int i = 0; i < found.count; ++i) {
    if (by_column) {
      before += found.columns[i] > column;
    } else if (found.columns[i] == column) {
      before = i;
    }
  }
  out[column] = keys[column] == 7 && before < 2;
}

__global__ void append(int* out) { out[1 + atomicAdd(out, 1)] = threadIdx.x; }

struct Vectors {
  uint4 values[32];
};

__global__ void pipeline(int groups_left, const uint4* from, int* out) {
  ANTIDOTE_SHARED(Vectors, stage);
  const int t = threadIdx.x;
  for (int i = 0; i < 2; ++i) {
    __pipeline_memcpy_async(&stage.values[t], &from[32 * i + t], 16);
    __pipeline_commit();
    if (i == 0) __pipeline_wait_prior(groups_left);
    out[i] = stage.values[t].y;
  }
  __pipeline_wait_prior(0);
  out[2] = stage.values[t].y;
}

__global__ void unwritten(int* out) {
  ANTIDOTE_SHARED(Line, line);
  out[0] = line.values[threadIdx.x];
  out[1] = reinterpret_cast<int*>(dynamic_shared())[threadIdx.x];
  line.values[threadIdx.x] = 0;  // the next block's is poison all the same
}

__global__ void sum_of_blocks(bool wait, int* partial, int* out) {
  if (threadIdx.x == 0) partial[blockIdx.x] = 1 + blockIdx.x;
  if (wait) grid_sync();
  int sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += partial[i];
  if (threadIdx.x == 5) out[blockIdx.x] = sum;
}

// ---- what must fail, not hang

__global__ void fail_by(const std::string* how, int* out) {
  const int t = threadIdx.x;
  struct Counted {  // what a failed launch leaves on the stacks is destroyed
    int* count;
    explicit Counted(int* count) : count(count) { ++*count; }
    ~Counted() { --*count; }
  } counted(out);
  if (*how == "two barriers") {
    if (t < 40) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (*how == "barrier and warp") {
    if (t < 40) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }
  if (*how == "lane ended" && t == 3) return;
  if (*how == "lane ended") __shfl_sync(kAll, t, 0);
  if (*how == "lane elsewhere") {
    if (t == 3) {
      __ballot_sync(kAll, 1);
    } else {
      __ballot_sync(kAll, 1);
    }
  }
  if (*how == "masks differ") __any_sync(t == 3 ? 0xFu : kAll, 1);
  if (*how == "not in mask") __ballot_sync(0xFu, 1);
  if (*how == "width") __shfl_xor_sync(kAll, t, 1, 12);
  if (*how == "grid, a thread ended" && blockIdx.x == 1 && t == 3) return;
  if (*how == "grid, no cooperation" || *how == "grid, a thread ended") grid_sync();
  if (*how == "nothing, half ended" && t < 32) return;
  if (*how == "spin" && t == 3) {
    while (atomicAdd(out + 1, 0) == 0) {
    }
  }
  if (*how == "trap" && t == 3) __trap();
  if (*how == "exception" && t == 3) throw std::runtime_error("thrown");
  if (*how == "copy size") __pipeline_memcpy_async(out, out, 12);
  if (*how == "copy alignment") __pipeline_memcpy_async(out + 1, out, 16);
  if (*how == "copy to global") __pipeline_memcpy_async(out + 4, out, 16);
  if (*how == "nested") simt::launch(1, 1, 0, false, [] {});
  if (*how == "large shared") {
    struct Large {
      char bytes[50000];
    };
    ANTIDOTE_SHARED(Large, large);
    large.bytes[t] = 1;
  }
  __syncthreads();  // threads that ended do not count
}

// ---- values

__global__ void lanes(long long* out) {
  const int t = threadIdx.x;
  int i = 0;
  auto put = [&](long long value) { out[32 * i++ + t] = value; };
  put(__shfl_sync(kAll, 10 * t, 5));
  put(__shfl_sync(kAll, 10 * t, t + 9, 8));
  put(__shfl_up_sync(kAll, 10 * t, 3));
  put(__shfl_up_sync(kAll, 10u * t, 3, 16));
  put(__shfl_down_sync(kAll, 10 * t, 3));
  put(static_cast<long long>(__shfl_down_sync(kAll, 10.0f * t, 3, 16)));
  put(__shfl_xor_sync(kAll, (1ll << 40) + t, 1));
  put(__shfl_xor_sync(kAll, 10 * t, 16, 16));
  put(__ballot_sync(kAll, t % 3 == 0));
  put(__any_sync(kAll, t == 31) + 2 * __any_sync(kAll, 0));
  put(__all_sync(kAll, 5) + 2 * __all_sync(kAll, t != 31));
  put(__match_any_sync(kAll, t / 4 % 2));
  put(__reduce_add_sync(kAll, t - 20) + (1ll << 33) * __reduce_add_sync(kAll, 1u));
  put(__reduce_min_sync(kAll, t - 20));
  put(__reduce_max_sync(kAll, t - 20));
  put(__reduce_min_sync(kAll, static_cast<unsigned>(t - 20)));
  put(__reduce_max_sync(kAll, static_cast<unsigned>(t - 20)));
  put(__reduce_or_sync(kAll, 1u << t % 4));
  put(__reduce_and_sync(kAll, 0xF0u | t));
  put(__reduce_xor_sync(kAll, static_cast<unsigned>(t)));
  const unsigned half = t < 16 ? 0xFFFFu : 0xFFFF0000u;  // two masks at a time
  put(__reduce_max_sync(half, t));
  put(t < 16 ? __shfl_sync(0xFFFFu, t, 20) : 0);  // undefined on a GPU: poison
  if (t % 2 == 0) {
    __syncwarp();
  } else {
    __syncwarp();  // documented to meet the other one
  }
  put(__syncthreads_count(t % 3 == 0) + 100 * __syncthreads_or(t == 4));
  put(__syncthreads_or(0) + 10 * __syncthreads_and(1) + 100 * __syncthreads_and(t));
}

template <typename T>
__global__ void atomics(T* at, long long* out) {
  int i = 0;
  auto put = [&](T old) {
    out[i++] = static_cast<long long>(old);
    out[i++] = static_cast<long long>(*at);
  };
  *at = 12;
  put(atomicAdd(at, T(3)));
  put(atomicMax(at, T(9)));
  put(atomicMax(at, T(21)));
  put(atomicMin(at, T(30)));
  put(atomicMin(at, T(20)));
  put(atomicOr(at, T(3)));
  put(atomicAnd(at, T(6)));
  put(atomicXor(at, T(5)));
  put(atomicExch(at, T(40)));
  put(atomicCAS(at, T(41), T(50)));
  put(atomicCAS(at, T(40), T(50)));
  put(atomicMin(at, static_cast<T>(-1)));  // the largest where T has no sign
}

__global__ void numbers(long long* out) {
  int i = 0;
  auto put = [&](long long value) { out[i++] = value; };
  auto bits = [&](float value) { put(__float_as_uint(value)); };
  put(__popc(0xF0F0u)), put(__popcll(0xF0F0000000000001ull));
  put(__ffs(0)), put(__ffs(0x80)), put(__ffsll(1ll << 40));
  put(__clz(0)), put(__clz(1)), put(__clz(-1)), put(__clzll(0)), put(__clzll(1));
  put(__brev(1u)), put(__brev(0x0000F001u));
  put(__byte_perm(0x33221100u, 0x77665544u, 0x7250)), put(__byte_perm(0x80u, 0u, 0x0198));
  put(__funnelshift_l(0x80000001u, 0x2u, 4)), put(__funnelshift_r(0x80000001u, 0x2u, 4));
  put(__funnelshift_l(5u, 6u, 32)), put(__funnelshift_r(5u, 6u, 32));
  put(__umulhi(0x80000000u, 6u)), put(static_cast<long long>(__umul64hi(1ull << 63, 6ull)));
  const float infinity = __int_as_float(0x7F800000), negative_nan = __uint_as_float(0xFFC12345u);
  bits(__fmul_rn(0.0f, infinity)), bits(__fsub_rn(infinity, infinity));
  bits(__fadd_rn(negative_nan, 1.0f)), bits(__fsqrt_rn(-1.0f)), bits(__fdiv_rn(0.0f, 0.0f));
  bits(__fmaf_rn(0.0f, infinity, 1.0f)), bits(__double2float_rn(__dmul_rn(0.0, infinity)));
  bits(fabsf(negative_nan)), bits(__fmul_rn(-0.0f, 1.0f)), bits(__fsqrt_rn(2.0f));
  bits(__fmul_rn(__int_as_float(1), 1.5f)), bits(__fmul_rn(3e38f, 10.0f));
  bits(__fmaf_rn(1.0f + 0x1p-12f, 1.0f + 0x1p-12f, -1.0f - 0x1p-11f)),
      bits(__double2float_rn(1.0 + 0x1p-24));
  put(min(-1, 1u)), put(max(-1, 1u)), put(min(-1, 1)), put(max(-5ll, 3ll));
  bits(min(negative_nan, 2.0f)), bits(max(1.0f, negative_nan));
}

// ---- the table of names

template <typename T>
void say(cudaError_t error, const std::vector<T>& values) {
  if (error != cudaSuccess) printf("%s", cudaGetErrorString(error));
  for (size_t i = 0; error == cudaSuccess && i < values.size(); ++i) {
    printf(i == 0 ? "%lld" : " %lld", static_cast<long long>(values[i]));
  }
  printf("\n");
}

void run(const std::string& name, const std::string& variant) {
  const bool right = variant == "right";
  std::vector<int> out(64, -1);
  const Grid one{1, 64, 0, nullptr};
  if (name == "past static") {
    say(launch(one, write_past_static, right ? 0 : 1, out.data()), out);
  } else if (name == "past dynamic") {
    say(launch({1, 64, 256, nullptr}, write_past_dynamic, right ? 0 : 1, out.data()), out);
  } else if (name == "past global") {
    say(launch(one, write_past_global, right ? 0 : 1, out.data()), out);
  } else if (name == "vector") {
    alignas(16) unsigned from[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    out.resize(1);
    say(launch({1, 1, 0, nullptr}, load_vector, right ? 4 : 1, from, out.data()), out);
  } else if (name == "barrier") {
    say(launch(one, reverse, right, out.data()), out);
  } else if (name == "second barrier") {
    say(launch(one, two_rounds, right, out.data()), out);
  } else if (name == "ties") {
    std::vector<int> keys(64, 3);
    for (int column : {4, 20, 33, 40, 62}) keys[column] = 7;
    say(launch(one, select_last_two, right, keys.data(), out.data()), out);
  } else if (name == "append") {
    out.assign(65, 0);
    say(launch(one, append, out.data()), out);
  } else if (name == "pipeline") {
    alignas(16) uint4 from[64];
    for (unsigned i = 0; i < 64; ++i) from[i] = {0, i / 32, 0, 0};
    out.resize(3);
    say(launch({1, 32, 0, nullptr}, pipeline, right ? 0 : 1, from, out.data()), out);
  } else if (name == "unwritten") {
    out.resize(2);
    say(launch({2, 1, 4, nullptr}, unwritten, out.data()), out);
  } else if (name == "grid") {
    std::vector<int> partial(6, 0);
    out.resize(6);
    say(launch({6, 64, 0, nullptr, true}, sum_of_blocks, right, partial.data(), out.data()), out);
  } else if (name == "fail") {
    out.assign(64, 0);
    const bool grid = variant == "grid, a thread ended";
    cudaError_t error = launch({2, 64, 0, nullptr, grid}, fail_by, &variant, out.data());
    const int left = out[0];
    printf("%s | %d left", error == cudaSuccess ? "fine" : cudaGetErrorString(error), left);
    error = launch(one, reverse, true, out.data());
    printf(" | then %s %d\n", cudaGetErrorString(error), out[0]);
  } else if (name == "refuse") {
    for (const Grid& grid :
         {Grid{1, 1025, 0, nullptr}, Grid{1, 0, 0, nullptr}, Grid{1, 1, 232449, nullptr},
          Grid{1ll << 31, 1, 0, nullptr}, Grid{65, 1, 0, nullptr, true}}) {
      say(launch(grid, reverse, true, out.data()), out);
    }
  } else if (name == "lanes") {
    std::vector<long long> values(32 * 24);
    const cudaError_t error = launch({1, 32, 0, nullptr}, lanes, values.data());
    for (auto row = values.begin(); row != values.end(); row += 32) {
      say(error, std::vector<long long>(row, row + 32));
    }
  } else if (name == "atomics") {
    std::vector<long long> values(24);
    int i;
    unsigned u;
    unsigned long long l;
    say(launch({1, 1, 0, nullptr}, atomics<int>, &i, values.data()), values);
    say(launch({1, 1, 0, nullptr}, atomics<unsigned>, &u, values.data()), values);
    say(launch({1, 1, 0, nullptr}, atomics<unsigned long long>, &l, values.data()), values);
  } else if (name == "numbers") {
    std::vector<long long> values(40);
    say(launch({1, 1, 0, nullptr}, numbers, values.data()), values);
  } else if (name == "two at a time") {
    std::vector<int> sums[2];
    auto work = [](std::vector<int>* sums) {
      for (int i = 0; i < 200; ++i) {
        std::vector<int> out(64);
        launch({1, 64, 0, nullptr}, two_rounds, true, out.data());
        sums->push_back(out[i % 64]);
      }
    };
    std::thread other(work, &sums[1]);
    work(&sums[0]);
    other.join();
    printf("%d\n", sums[0] == std::vector<int>(200, 12) && sums[1] == sums[0]);
  } else {
    printf("no toy %s\n", name.c_str());
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) return 2;
  for (int i = 3; i < count || i == 3; ++i) {
    if (i < count) simt::schedule(strtoull(arguments[i], nullptr, 10));
    run(arguments[1], arguments[2]);
    fflush(stdout);  // before a sanitizer ends the process
  }
}
