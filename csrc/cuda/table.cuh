// A list's rows on their way to the device, inside the parameters of a kernel: nothing is copied
// from memory of the host, which would wait, or break in a captured graph once that is freed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "launch.h"

namespace antidote::cuda {

constexpr int kUploadThreads = 64;

// Bytes of entries in a launch: few for short lists, as every launch carries all of them.
#if defined(ANTIDOTE_SIMT)
constexpr size_t kSmallPart = 512, kLargePart = 2048;  // parameters lie on each fiber's stack
#else
constexpr size_t kSmallPart = 3840, kLargePart = 32256;  // of 32764 that parameters may take
#endif

template <typename Entry, size_t BYTES>
struct Part {
  static constexpr int kCapacity = BYTES / sizeof(Entry);
  Entry entries[kCapacity];
};

template <typename Entry, size_t BYTES>
__global__ void __launch_bounds__(kUploadThreads)
    upload_kernel(const __grid_constant__ Part<Entry, BYTES> part, int count, Entry* device) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) device[i] = part.entries[i];
}

template <size_t BYTES, typename Entry>
cudaError_t upload_part(const Entry* entries, int count, Entry* device, cudaStream_t stream) {
  Part<Entry, BYTES> part = {};
  for (int i = 0; i < count; ++i) part.entries[i] = entries[i];
  return launch({1, kUploadThreads, 0, stream}, &upload_kernel<Entry, BYTES>, part, count, device);
}

// Writes a list of plain structs to device memory: one launch for a few, several for many.
template <typename Entry>
cudaError_t upload(const std::vector<Entry>& entries, Entry* device, cudaStream_t stream) {
  constexpr size_t kFew = Part<Entry, kSmallPart>::kCapacity;
  constexpr size_t kMany = Part<Entry, kLargePart>::kCapacity;
  static_assert(kFew > 0, "an entry is larger than the parameters of a launch");
  for (size_t begin = 0; begin < entries.size(); begin += kMany) {
    const Entry* first = entries.data() + begin;
    const int count = static_cast<int>(std::min(kMany, entries.size() - begin));
    ANTIDOTE_TRY(count <= static_cast<int>(kFew)
                     ? upload_part<kSmallPart>(first, count, device + begin, stream)
                     : upload_part<kLargePart>(first, count, device + begin, stream));
  }
  return cudaSuccess;
}

}  // namespace antidote::cuda
