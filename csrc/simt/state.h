// What a launch without a GPU keeps: its blocks, its threads, and who may run.
#pragma once

#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "fibers.h"
#include "threads.h"

namespace antidote::simt {

constexpr int kMaxThreads = 1024;          // of a block
constexpr size_t kMaxShared = 227 * 1024;  // of a block, on sm_90
constexpr size_t kMaxStatic = 48 * 1024;   // of it, what nvcc lets a kernel declare

class Abandoned {};  // takes a thread of a failed launch off its stack

// Heap memory, so that the address sanitizer guards both ends; poisoned at first.
class Memory {
 public:
  Memory(const void* key, size_t bytes, size_t alignment) : key(key), bytes(bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, alignment < 16 ? 16 : alignment, bytes) != 0)
      throw std::bad_alloc();
    memset(memory, kPoison, bytes);
    data_.reset(static_cast<char*>(memory));
  }
  char* data() const { return data_.get(); }
  bool holds(const void* address) const {
    const char* place = static_cast<const char*>(address);
    return place >= data() && place < data() + bytes;
  }

  const void* key;
  size_t bytes;

 private:
  struct Free {
    void operator()(char* memory) const { free(memory); }
  };
  std::unique_ptr<char, Free> data_;
};

// What a thread waits for.
struct Wait {
  Op op = Op::kNone;
  const char* name = nullptr;
  uint32_t mask = 0;
  int source = 0;
  uint64_t value = 0;
  Site site{"", 0};

  // Whether two threads wait for each other. CUDA may let more of them meet than those at the same
  // place in the source, but only __syncwarp is documented to.
  bool meets(const Wait& other) const {
    if (op != other.op || mask != other.mask) return false;
    if (op == Op::kSyncWarp) return true;
    return site.line == other.site.line &&
           (site.file == other.site.file || strcmp(site.file, other.site.file) == 0);
  }
};

struct Thread;

struct Block {
  unsigned number = 0;
  unsigned first = 0;                     // place of its first thread
  int live = 0;                           // threads that have not ended,
  int arrived = 0;                        // of them, at the barrier,
  int predicates = 0;                     // of them, with a predicate
  Thread* early = nullptr;                // who came to the barrier first
  bool differ = false;                    // not all came to the same one
  uint32_t lanes[kMaxThreads / 32] = {};  // of each warp, those that wait for lanes
  std::vector<Memory> shared;             // static, and dynamic with a null key
  size_t static_bytes = 0;
};

// A copy under way; its bytes arrive when its thread waits for its group.
struct Copy {
  void* to;
  const void* from;
  size_t bytes, zeros, group;
};

enum class State { kNew, kStarted, kEnded };

struct Thread : Fiber {
  Block* block = nullptr;
  unsigned place = 0;   // in what runs at a time
  unsigned number = 0;  // in the block
  State state = State::kNew;
  Wait wait;  // op is kNone where it waits for nothing
  uint64_t result = 0;
  unsigned atomics = 0;
  size_t group = 0;  // of copies, the open one
  std::vector<Copy> copies;

  void run() override;
};

// A set of threads by place.
class Places {
 public:
  void reset(unsigned size) {
    words_.assign((size + 63) / 64, 0);
    count_ = 0;
  }
  bool empty() const { return count_ == 0; }
  void add(unsigned place) {
    words_[place / 64] |= uint64_t{1} << place % 64;
    ++count_;
  }
  // The next at or after a place, going round.
  unsigned take_from(unsigned place) {
    size_t word = place / 64;
    uint64_t bits = words_[word] & ~uint64_t{0} << place % 64;
    while (bits == 0) {
      word = word + 1 == words_.size() ? 0 : word + 1;
      bits = words_[word];
    }
    return take(word, __builtin_ctzll(bits));
  }
  unsigned take_last() {
    size_t word = words_.size() - 1;
    while (words_[word] == 0) --word;
    return take(word, 63 - __builtin_clzll(words_[word]));
  }

 private:
  unsigned take(size_t word, int bit) {
    words_[word] &= ~(uint64_t{1} << bit);
    --count_;
    return static_cast<unsigned>(word * 64 + bit);
  }

  std::vector<uint64_t> words_;
  int count_ = 0;
};

class Launch {
 public:
  Launch(unsigned threads, size_t dynamic_bytes, bool cooperative,
         const std::function<void()>& body);

  // Runs blocks side by side until all have ended; false where they failed.
  bool run(int64_t first, int64_t blocks);
  // The block that is due after `turn` others.
  int64_t block_at(int64_t turn, int64_t blocks);

  // Of the running thread: until somebody wakes it, until the others had their turn, the same at
  // an atomic where the order says so, at its end. `spin` counts what may go on for ever.
  void suspend();
  void pause();
  void pause_atomic();
  void spin();
  void ended();

  // The running thread is at a barrier, at the grid's, at an operation of its warp.
  void arrive();
  void arrive_at_grid();
  void exchange();

  // The first reason counts.
  void stop(const std::string& why);

  const std::function<void()>& body;
  const size_t dynamic_bytes;
  const bool cooperative;
  Thread* running = nullptr;

 private:
  uint64_t random();
  unsigned next();
  void enter(Thread& thread);
  void wake(Thread& thread, uint64_t result);
  void release(Block& block);
  std::string waiting(const Block& block) const;
  std::string deadlock() const;

  const unsigned threads_;  // of a block
  uint64_t order_, random_;
  unsigned origin_ = 0;  // of a random order, see next()
  int stretch_ = 0;
  int64_t start_ = 0, step_ = 0;  // of the blocks
  int64_t spins_ = 0;             // atomics and pauses since a thread waited or ended
  int live_ = 0, at_grid_ = 0;
  bool failed_ = false;
  std::vector<Block> blocks_;
  Places ready_, paused_;
};

// Of this OS thread: the launch that runs, and fibers to reuse, as many as ever ran at a time.
Launch& current_launch();
extern thread_local std::vector<std::unique_ptr<Thread>> pool;

std::string text_of(const Site& site);

}  // namespace antidote::simt
