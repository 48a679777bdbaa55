// Work shared out over the OpenMP pool, which is torch's own where both link the same libgomp.
#pragma once

#include <atomic>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace antidote::cpu {

// Denormals count, whatever the thread was set to: flush-to-zero is off while this lives.
class DefaultFloatMode {
 public:
#if defined(__x86_64__)
  DefaultFloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~DefaultFloatMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

// Calls body(thread, item) for every item in [0, items), in any order, on up to `threads` threads.
// The body must not throw.
template <typename Body>
void parallel_for(int64_t items, int threads, Body body) {
  if (threads > items) threads = static_cast<int>(items);
  if (threads <= 1) {
    DefaultFloatMode mode;
    for (int64_t item = 0; item < items; ++item) body(0, item);
    return;
  }
#ifdef _OPENMP
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
  {
    DefaultFloatMode mode;
    for (int64_t item = next++; item < items; item = next++) body(omp_get_thread_num(), item);
  }
#else
  parallel_for(items, 1, body);
#endif
}

}  // namespace antidote::cpu
