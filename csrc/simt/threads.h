// What the words of CUDA in simt.h stand on: threads that wait for each other, shared memory, and
// failures. Everything here but `launch` and `schedule` is for code that runs inside a launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace antidote::simt {

// Runs body() for every thread of every block, on this OS thread; returns a cudaError_t's number.
// Blocks run one at a time, in cooperative launches side by side.
int run_launch(int64_t blocks, int threads, size_t shared, bool cooperative,
               const std::function<void()>& body);
// What was wrong with this OS thread's last failed launch, if that gave this error, else null.
const char* message_of(int error);

// The order in which threads run, from the next launch on: 0 ascending, 1 descending, else a random
// one that the number determines, with switches at atomics too.
void schedule(uint64_t seed);

// Where in the source a call stands; waiting threads only meet where they stand at the same place.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// Ends the launch with a message.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

enum class Op : int {
  kNone,
  kBarrier,  // of a block; `value` is the predicate, the result how many were not 0
  kGrid,
  kSyncWarp,
  kShuffle,  // `source` is a lane
  kBallot,
  kMatch,
  kAdd,
  kMin,
  kMax,
  kMinSigned,
  kMaxSigned,
  kAnd,
  kOr,
  kXor,
};

// Waits until all live threads of the block, or of the grid, are here.
uint64_t barrier(Op op, const char* name, bool predicate, Site site);
// Waits until all lanes of the mask are here, and gives this lane's result.
uint64_t warp(Op op, const char* name, uint32_t mask, uint64_t value, int source, Site site);
void pause();         // lets others run
void pause_atomic();  // the same now and then, as the schedule says

// One block of memory for each block of threads and `key`, with the sanitizer's guards around it;
// poisoned at first.
void* shared_memory(const void* key, size_t bytes, size_t alignment);
void* dynamic_memory();

// Copies that this thread has under way; the destination is poison until they are waited for.
void copy_async(void* to, const void* from, size_t bytes, size_t zeros);
void copy_commit();
void copy_wait(size_t groups_left);

constexpr int kPoison = 0xCB;  // large and negative as an integer, -2.7e7 as fp32

}  // namespace antidote::simt
