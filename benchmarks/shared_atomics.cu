// Clock cycles of one warp instruction that adds to shared memory, by pattern of addresses and by
// how many warps a multiprocessor holds. A program of its own: prints lines of JSON, and exits with
// 2 where there is no GPU, with 1 where a count came out wrong.
//
//   nvcc -O3 -arch=sm_90 shared_atomics.cu -o shared_atomics && ./shared_atomics
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace {

constexpr int kBins = 512;
constexpr int kUnrolled = 16;  // instructions of a turn: their addresses wait in registers
constexpr int kTurns = 128;
constexpr int kMostWarps = 32;
constexpr int kLaunches = 5;
constexpr int kNone = -1;  // the address of a lane that takes no part

enum Operation { kIncrement, kAdd, kAppend, kStore };
const char* const kOperations[] = {"increment", "add", "append", "store"};

// The bins and the clocks of every block. `addresses` has kUnrolled for each thread of a block.
template <Operation OPERATION, bool PREDICATED>
__global__ void __launch_bounds__(32 * kMostWarps)
    measure(const int* addresses, unsigned value, unsigned* counts, long long* clocks) {
  __shared__ unsigned bins[kBins];
  __shared__ unsigned counter;
  for (int i = threadIdx.x; i < kBins; i += blockDim.x) bins[i] = 0;
  if (threadIdx.x == 0) counter = 0;
  int address[kUnrolled];
#pragma unroll
  for (int i = 0; i < kUnrolled; ++i) address[i] = addresses[threadIdx.x * kUnrolled + i];
  __syncthreads();
  const long long begin = clock64();
  unsigned places = 0;
#pragma unroll 1
  for (int turn = 0; turn < kTurns; ++turn) {
#pragma unroll
    for (int i = 0; i < kUnrolled; ++i) {
      if (PREDICATED && address[i] == kNone) continue;
      if (OPERATION == kIncrement) atomicAdd(&bins[address[i]], 1u);
      if (OPERATION == kAdd) atomicAdd(&bins[address[i]], value);
      if (OPERATION == kAppend) places += atomicAdd(&counter, 1u);
      if (OPERATION == kStore) *const_cast<volatile unsigned*>(&bins[address[i]]) = turn;
    }
  }
  __syncthreads();
  const long long end = clock64();
  if (threadIdx.x == 0) {
    clocks[blockIdx.x] = end - begin;
    counts[blockIdx.x * (kBins + 2) + kBins] = counter;
  }
  for (int i = threadIdx.x; i < kBins; i += blockDim.x) {
    counts[blockIdx.x * (kBins + 2) + i] = bins[i];
  }
  if (OPERATION == kAppend) atomicAdd(&counts[blockIdx.x * (kBins + 2) + kBins + 1], places);
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK(call) check((call), #call)

using Addresses = std::vector<int>;  // of a thread, then of its instructions

// Lanes of one instruction of one warp, from `draw(instruction's number, lane)`.
template <typename Draw>
Addresses make(Draw draw) {
  Addresses result(32 * kMostWarps * kUnrolled);
  for (int warp = 0; warp < kMostWarps; ++warp) {
    for (int i = 0; i < kUnrolled; ++i) {
      for (int lane = 0; lane < 32; ++lane) {
        result[(warp * 32 + lane) * kUnrolled + i] = draw(warp * kUnrolled + i, lane);
      }
    }
  }
  return result;
}

// What the instructions have in common, on average: lanes that take part, the most of them on one
// address, the most of different addresses in one bank.
std::string described(const Addresses& addresses) {
  double lanes = 0, alike = 0, banked = 0;
  std::set<int> filled;
  for (int number = 0; number < kMostWarps * kUnrolled; ++number) {
    int count[kBins] = {}, in_bank[32] = {};
    for (int lane = 0; lane < 32; ++lane) {
      const int thread = number / kUnrolled * 32 + lane;
      const int address = addresses[thread * kUnrolled + number % kUnrolled];
      if (address == kNone) continue;
      ++lanes;
      if (count[address]++ == 0) ++in_bank[address % 32];
      filled.insert(address);
    }
    alike += *std::max_element(count, count + kBins);
    banked += *std::max_element(in_bank, in_bank + 32);
  }
  const double all = kMostWarps * kUnrolled;
  char text[160];
  std::snprintf(text, sizeof(text),
                "\"lanes\": %.2f, \"same_address\": %.2f, \"same_bank\": %.2f, \"bins\": %d",
                lanes / all, alike / all, banked / all, static_cast<int>(filled.size()));
  return text;
}

template <Operation OPERATION, bool PREDICATED>
void run(const char* pattern, const Addresses& addresses, int processors) {
  int* device_addresses;
  unsigned* device_counts;
  long long* device_clocks;
  const size_t size = addresses.size() * sizeof(int);
  std::vector<unsigned> counts(static_cast<size_t>(processors) * (kBins + 2));
  std::vector<long long> clocks(processors);
  CHECK(cudaMalloc(&device_addresses, size));
  CHECK(cudaMalloc(&device_counts, counts.size() * sizeof(unsigned)));
  CHECK(cudaMalloc(&device_clocks, clocks.size() * sizeof(long long)));
  CHECK(cudaMemcpy(device_addresses, addresses.data(), size, cudaMemcpyHostToDevice));
  for (int warps = 1; warps <= kMostWarps; warps *= 2) {
    double best = 0;
    for (int launch = 0; launch < kLaunches; ++launch) {
      CHECK(cudaMemset(device_counts, 0, counts.size() * sizeof(unsigned)));
      measure<OPERATION, PREDICATED>
          <<<processors, 32 * warps>>>(device_addresses, 3, device_counts, device_clocks);
      CHECK(cudaGetLastError());
      CHECK(cudaMemcpy(clocks.data(), device_clocks, clocks.size() * sizeof(long long),
                       cudaMemcpyDeviceToHost));
      std::nth_element(clocks.begin(), clocks.begin() + processors / 2, clocks.end());
      const double median = static_cast<double>(clocks[processors / 2]);
      if (launch == 0 || median < best) best = median;
    }
    CHECK(cudaMemcpy(counts.data(), device_counts, counts.size() * sizeof(unsigned),
                     cudaMemcpyDeviceToHost));
    const int used = 32 * warps * kUnrolled;
    const unsigned active = used - static_cast<unsigned>(std::count(
                                       addresses.begin(), addresses.begin() + used, kNone));
    unsigned expected = active * kTurns, found = 0;
    if (OPERATION == kAppend) {
      found = counts[kBins];
      // Every place was given once: their sum says so, modulo 2^32.
      const unsigned long long all = expected;
      if (counts[kBins + 1] != static_cast<unsigned>(all * (all - 1) / 2)) found = 0;
    } else if (OPERATION == kStore) {
      found = expected;
    } else {
      for (int i = 0; i < kBins; ++i) found += counts[i];
      expected *= OPERATION == kAdd ? 3 : 1;
    }
    if (found != expected) {
      std::fprintf(stderr, "%s, %s: counted %u of %u\n", kOperations[OPERATION], pattern, found,
                   expected);
      std::exit(1);
    }
    std::printf(
        "{\"operation\": \"%s\", \"pattern\": \"%s\", \"warps\": %d, "
        "\"cycles\": %.2f, %s}\n",
        kOperations[OPERATION], pattern, warps, best / (warps * kUnrolled * kTurns),
        described(addresses).c_str());
    std::fflush(stdout);
  }
  CHECK(cudaFree(device_addresses));
  CHECK(cudaFree(device_counts));
  CHECK(cudaFree(device_clocks));
}

template <bool PREDICATED>
void all_counting(const char* pattern, const Addresses& addresses, int processors) {
  run<kIncrement, PREDICATED>(pattern, addresses, processors);
  run<kAdd, PREDICATED>(pattern, addresses, processors);
}

}  // namespace

int main() {
  int devices = 0, processors = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "there is no GPU here\n");
    return 2;
  }
  CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));
  std::mt19937 random(0);
  std::normal_distribution<float> weight;
  std::uniform_real_distribution<float> unit(0, 1);

  // Without conflicts; then so many lanes share an address and the others have a bank each.
  const Addresses apart = make([](int number, int lane) { return (number * 32 + lane) % kBins; });
  run<kStore, false>("apart", apart, processors);
  for (int lanes = 1; lanes <= 32; lanes *= 2) {
    const Addresses same = make([lanes](int number, int lane) {
      return (number * 32 + (lane < lanes ? 0 : lane)) % kBins;
    });
    const std::string name = std::to_string(lanes) + " on one address";
    all_counting<false>(name.c_str(), same, processors);
  }
  // So many lanes have addresses of their own in one bank.
  for (int lanes = 2; lanes <= 8; lanes *= 2) {
    const Addresses banked =
        make([lanes](int, int lane) { return lane < lanes ? 32 * lane : lane; });
    const std::string name = std::to_string(lanes) + " in one bank";
    all_counting<false>(name.c_str(), banked, processors);
  }
  // The sixteenth of an octave that a score is in, as the row kernel counts it.
  const Addresses coarse = make([&](int, int) {
    const float score = std::abs(weight(random)) * (0.5f + unit(random));
    unsigned key;
    std::memcpy(&key, &score, sizeof(key));
    return static_cast<int>((key >> 19) % kBins);
  });
  all_counting<false>("bins of scores", coarse, processors);
  auto sparse = [&](double share) {
    return make([&, share](int, int) {
      const bool active = unit(random) < share;
      const int bin = static_cast<int>(unit(random) * (kBins - 1));
      return active ? bin : kNone;
    });
  };
  all_counting<true>("any bin, all lanes", sparse(1), processors);
  all_counting<true>("any bin, 5 % of lanes", sparse(0.05), processors);
  run<kAppend, false>("one counter, all lanes", apart, processors);
  run<kAppend, true>("one counter, 5 % of lanes", sparse(0.05), processors);
  return 0;
}
