#include "threads.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "fibers.h"
#include "simt.h"

namespace antidote::simt {

namespace {

constexpr int kMaxThreads = 1024;                 // of a block
constexpr size_t kMaxShared = 227 * 1024;         // of a block, on sm_90
constexpr size_t kMaxStatic = 48 * 1024;          // what nvcc allows
constexpr int64_t kMaxBlocks = 2147483647;        // of a grid
constexpr int64_t kMaxSideBySide = 64;            // blocks of a cooperative launch,
constexpr int64_t kMaxFibers = 16384;             // and their threads: each takes two memory maps
constexpr int64_t kMaxPauses = int64_t{1} << 24;  // in a row: then the threads wait for nobody

std::atomic<uint64_t> next_order{0};
thread_local std::string message;

class Abandoned {};  // takes a thread of a failed launch off its stack

struct Release {
  void operator()(void* memory) const { free(memory); }
};
using Memory = std::unique_ptr<void, Release>;

// Heap memory, so that the address sanitizer guards both ends.
Memory poisoned(size_t bytes, size_t alignment) {
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment < 16 ? 16 : alignment, bytes) != 0) throw std::bad_alloc();
  memset(memory, kPoison, bytes);
  return Memory(memory);
}

struct Thread;

struct Block {
  unsigned number = 0;
  unsigned first = 0;                     // place of its first thread
  int live = 0;                           // threads that have not ended
  int arrived = 0;                        // of them, at the barrier
  int predicates = 0;                     // of them, with a predicate
  Thread* early = nullptr;                // who came first
  bool differ = false;                    // not all wait at the same place
  uint32_t lanes[kMaxThreads / 32] = {};  // of each warp, those that wait for lanes
  std::vector<std::pair<const void*, Memory>> shared;
  size_t shared_bytes = 0;
  Memory dynamic;
};

struct Wait {
  Op op = Op::kNone;
  const char* name = nullptr;
  uint32_t mask = 0;
  int source = 0;
  uint64_t value = 0;
  Site site{"", 0};

  bool meets(const Wait& other) const {
    if (op != other.op || mask != other.mask) return false;
    if (op == Op::kSyncWarp) return true;  // documented to meet from anywhere
    return site.line == other.site.line &&
           (site.file == other.site.file || strcmp(site.file, other.site.file) == 0);
  }
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes, zeros, group;
};

enum class State { kNew, kStarted, kEnded };

struct Thread : Fiber {
  Block* block = nullptr;
  unsigned place = 0;   // in the launch
  unsigned number = 0;  // in the block
  State state = State::kNew;
  Wait wait;  // op is kNone unless it waits
  uint64_t result = 0;
  unsigned atomics = 0;
  size_t group = 0;  // of copies, the open one
  std::vector<Copy> copies;

  void run() override;
};

// Threads that may run.
struct Ready {
  std::vector<uint64_t> words;
  int count = 0;

  void add(unsigned place) {
    words[place / 64] |= uint64_t{1} << place % 64;
    ++count;
  }
  // The next at or after a place, going round.
  unsigned take_up(unsigned place) {
    size_t word = place / 64;
    uint64_t bits = words[word] & ~uint64_t{0} << place % 64;
    while (bits == 0) {
      word = word + 1 == words.size() ? 0 : word + 1;
      bits = words[word];
    }
    return take(word, __builtin_ctzll(bits));
  }
  unsigned take_last() {
    size_t word = words.size() - 1;
    while (words[word] == 0) --word;
    return take(word, 63 - __builtin_clzll(words[word]));
  }
  unsigned take(size_t word, int bit) {
    words[word] &= ~(uint64_t{1} << bit);
    --count;
    return static_cast<unsigned>(word * 64 + bit);
  }
};

thread_local std::vector<std::unique_ptr<Thread>> pool;

// What runs at a time: a block, or all of a cooperative launch.
class Launch {
 public:
  Launch(unsigned threads, size_t shared, bool cooperative, const std::function<void()>& body)
      : body(body), cooperative(cooperative), threads_(threads), shared_(shared) {
    order_ = next_order;
    random_ = order_ * 0x9E3779B97F4A7C15u;
  }

  // False where it failed; `message` says why.
  bool run(int64_t first, int64_t blocks);

  int64_t block_at(int64_t turn, int64_t blocks) {
    if (order_ == 0) return turn;
    if (order_ == 1) return blocks - 1 - turn;
    while (step_ == 0 || std::gcd(step_, blocks) != 1) {
      start_ = static_cast<int64_t>(random() % blocks);
      step_ = static_cast<int64_t>(1 + random() % blocks);
    }
    return (start_ + turn * step_) % blocks;
  }

  void suspend() {
    pauses_ = 0;
    running->leave();
    running->wait.op = Op::kNone;
    if (failed) throw Abandoned();
  }
  void pause() {
    if (++pauses_ > kMaxPauses) fail("threads spin and nobody gets on");
    paused_.add(running->place);
    running->leave();
    if (failed) throw Abandoned();
  }
  bool pauses_at_atomic() {
    if (++running->atomics % 1024 == 0) return true;  // a loop may wait for another thread
    return order_ > 1 && (random() & 1) != 0;
  }
  void wake(Thread& thread, uint64_t result) {
    thread.result = result;
    ready_.add(thread.place);
  }

  void arrive(Thread& self);
  void arrive_at_grid(Thread& self);
  void ended(Thread& self);
  bool exchange(Thread& self);

  void stop(const std::string& why) {
    if (!failed) message = why;
    failed = true;
  }
  Memory& dynamic() {
    Memory& memory = running->block->dynamic;
    if (!memory) memory = poisoned(shared_, 16);
    return memory;
  }
  size_t dynamic_bytes() const { return shared_; }

  const std::function<void()>& body;
  const bool cooperative;
  Thread* running = nullptr;
  bool failed = false;

 private:
  uint64_t random() {
    uint64_t z = random_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  unsigned next();
  void enter(Thread& thread);
  void release(Block& block);
  std::string stuck();

  unsigned threads_;
  size_t shared_;
  uint64_t order_, random_;
  unsigned origin_ = 0;
  int stretch_ = 0;
  int64_t start_ = 0, step_ = 0, pauses_ = 0;
  int live_ = 0, at_grid_ = 0;
  std::vector<Block> blocks_;
  Ready ready_, paused_;
};

thread_local Launch* launch_of_thread = nullptr;

Launch& current() {
  if (launch_of_thread == nullptr) {
    fprintf(stderr, "device code runs outside a launch\n");
    abort();
  }
  return *launch_of_thread;
}

void Thread::run() {
  Launch& launch = current();
  try {
    launch.body();
  } catch (const Abandoned&) {
  } catch (const std::exception& error) {
    launch.stop(std::string("an exception in device code: ") + error.what());
  } catch (...) {
    launch.stop("an exception in device code");
  }
  launch.ended(*this);
}

// A random order keeps its origin for a while, so that at times few threads run far ahead.
unsigned Launch::next() {
  if (ready_.count == 0) std::swap(ready_, paused_);
  if (order_ == 0) return ready_.take_up(0);
  if (order_ == 1) return ready_.take_last();
  if (stretch_-- == 0) {
    origin_ = static_cast<unsigned>(random() % (blocks_.size() * threads_));
    stretch_ = static_cast<int>(random() & random() & 63);
  }
  return ready_.take_up(origin_);
}

void Launch::enter(Thread& thread) {
  running = &thread;
  threadIdx.x = thread.number;
  blockIdx.x = thread.block->number;
  thread.state = State::kStarted;
  thread.enter();
}

bool Launch::run(int64_t first, int64_t blocks) {
  const unsigned total = static_cast<unsigned>(blocks * threads_);
  while (pool.size() < total) pool.push_back(std::make_unique<Thread>());
  blocks_.clear();
  blocks_.resize(blocks);
  for (Ready* set : {&ready_, &paused_}) {
    set->words.assign((total + 63) / 64, 0);
    set->count = 0;
  }
  live_ = static_cast<int>(total);
  for (unsigned place = 0; place < total; ++place) {
    Thread& thread = *pool[place];
    thread.block = &blocks_[place / threads_];
    thread.place = place;
    thread.number = place % threads_;
    thread.state = State::kNew;
    thread.wait = {};
    thread.atomics = 0;
    thread.group = 0;
    thread.copies.clear();
    if (thread.number == 0) {
      thread.block->number = static_cast<unsigned>(first + place / threads_);
      thread.block->first = place;
      thread.block->live = static_cast<int>(threads_);
    }
    ready_.add(place);
  }
  while (live_ > 0 && !failed) {
    if (ready_.count + paused_.count == 0) {
      stop(stuck());
    } else {
      enter(*pool[next()]);
    }
  }
  // Each wait throws now, which takes what is left off the stacks.
  for (unsigned place = 0; failed && place < total; ++place) {
    if (pool[place]->state == State::kStarted) enter(*pool[place]);
  }
  return !failed;
}

void Launch::release(Block& block) {
  if (block.arrived == 0 || block.arrived < block.live || block.differ) return;
  const int predicates = block.predicates;
  block.arrived = block.predicates = 0;
  block.early = nullptr;
  for (unsigned i = 0; i < threads_; ++i) {
    Thread& thread = *pool[block.first + i];
    if (thread.state != State::kEnded) wake(thread, static_cast<uint64_t>(predicates));
  }
}

void Launch::arrive(Thread& self) {
  Block& block = *self.block;
  if (block.early == nullptr) block.early = &self;
  block.differ |= !self.wait.meets(block.early->wait);
  block.predicates += self.wait.value != 0;
  ++block.arrived;
  release(block);
}

void Launch::arrive_at_grid(Thread& self) {
  // No thread may have ended: a GPU's grid would wait for ever.
  const int total = static_cast<int>(blocks_.size() * threads_);
  if (++at_grid_ < total) return;
  for (int place = 0; place < total; ++place) {
    if (!pool[place]->wait.meets(self.wait)) return;
  }
  at_grid_ = 0;
  for (int place = 0; place < total; ++place) wake(*pool[place], 0);
}

void Launch::ended(Thread& self) {
  self.state = State::kEnded;
  pauses_ = 0;
  --live_;
  --self.block->live;
  if (!failed) release(*self.block);
}

template <typename T, typename F>
uint64_t reduce(const std::unique_ptr<Thread>* lanes, uint32_t mask, F&& f) {
  bool first = true;
  T sum{};
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    T value = static_cast<T>(lanes[i]->wait.value);
    sum = first ? value : f(sum, value);
    first = false;
  }
  return static_cast<uint32_t>(sum);
}

// Serves the lanes of self's mask if all are here.
bool Launch::exchange(Thread& self) {
  uint32_t& here = self.block->lanes[self.number / 32];
  const uint32_t mask = self.wait.mask;
  here |= 1u << self.number % 32;
  if ((here & mask) != mask) return false;
  const std::unique_ptr<Thread>* lanes = &pool[self.place - self.number % 32];
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) && !lanes[i]->wait.meets(self.wait)) return false;
  }
  here &= ~mask;
  using U = uint32_t;
  using S = int32_t;
  uint64_t all = 0;
  switch (self.wait.op) {
    case Op::kAdd:
      all = reduce<U>(lanes, mask, [](U a, U b) { return a + b; });
      break;
    case Op::kMin:
      all = reduce<U>(lanes, mask, [](U a, U b) { return a < b ? a : b; });
      break;
    case Op::kMax:
      all = reduce<U>(lanes, mask, [](U a, U b) { return a < b ? b : a; });
      break;
    case Op::kMinSigned:
      all = reduce<S>(lanes, mask, [](S a, S b) { return a < b ? a : b; });
      break;
    case Op::kMaxSigned:
      all = reduce<S>(lanes, mask, [](S a, S b) { return a < b ? b : a; });
      break;
    case Op::kAnd:
      all = reduce<U>(lanes, mask, [](U a, U b) { return a & b; });
      break;
    case Op::kOr:
      all = reduce<U>(lanes, mask, [](U a, U b) { return a | b; });
      break;
    case Op::kXor:
      all = reduce<U>(lanes, mask, [](U a, U b) { return a ^ b; });
      break;
    case Op::kBallot:
      for (int i = 0; i < 32; ++i) {
        if (mask >> i & 1) all |= static_cast<uint64_t>(lanes[i]->wait.value) << i;
      }
      break;
    default:
      break;
  }
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    const Wait& wait = lanes[i]->wait;
    uint64_t result = all;
    if (wait.op == Op::kShuffle) {
      if (mask >> wait.source & 1) {
        result = lanes[wait.source]->wait.value;
      } else {
        memset(&result, kPoison, sizeof result);  // undefined on a GPU
      }
    } else if (wait.op == Op::kMatch) {
      for (int j = 0; j < 32; ++j) {
        if ((mask >> j & 1) && lanes[j]->wait.value == wait.value) result |= uint64_t{1} << j;
      }
    }
    wake(*lanes[i], result);
  }
  return true;
}

std::string place_of(const Site& site) {
  const char* slash = strrchr(site.file, '/');
  return std::string(slash == nullptr ? site.file : slash + 1) + ":" + std::to_string(site.line);
}

// Who waits where, of the first block that cannot go on.
std::string Launch::stuck() {
  const Block* block = nullptr;
  for (const Block& each : blocks_) {
    if (block == nullptr && each.live > 0) block = &each;
  }
  std::string text = "deadlock in block " + std::to_string(block->number) + ": ";
  std::string before;
  int groups = 0;
  for (unsigned i = 0, next; i < threads_; i = next) {
    auto doing = [&](unsigned number) {
      const Thread& thread = *pool[block->first + number];
      if (thread.state == State::kEnded) return std::string("ended");
      const Wait& wait = thread.wait;
      std::string where = std::string("at ") + wait.name;
      if (wait.op > Op::kGrid) {
        char mask[16];
        snprintf(mask, sizeof mask, "(0x%08x)", wait.mask);
        where += mask;
      }
      return where + " in " + place_of(wait.site);
    };
    const std::string what = doing(i);
    next = i + 1;
    while (next < threads_ && doing(next) == what) ++next;
    if (++groups > 8) return text + "; ...";
    text += (groups > 1 ? "; " : "") + std::string(next - i > 1 ? "threads " : "thread ") +
            std::to_string(i) + (next - i > 1 ? "-" + std::to_string(next - 1) : "") + " " + what;
  }
  return text;
}

int refuse(cudaError_t error, const std::string& why) {
  message = why;
  return error;
}

}  // namespace

int run_launch(int64_t blocks, int threads, size_t shared, bool cooperative,
               const std::function<void()>& body) {
  if (launch_of_thread != nullptr) fail("a launch in device code");
  const std::string shape = std::to_string(blocks) + " blocks of " + std::to_string(threads) +
                            " threads and " + std::to_string(shared) + " bytes";
  if (blocks < 1 || blocks > kMaxBlocks || threads < 1 || threads > kMaxThreads ||
      shared > kMaxShared) {
    return refuse(cudaErrorInvalidConfiguration, "invalid launch: " + shape);
  }
  if (cooperative && (blocks > kMaxSideBySide || blocks * threads > kMaxFibers)) {
    return refuse(cudaErrorCooperativeLaunchTooLarge, "too large to be cooperative: " + shape);
  }
  message.clear();
  Launch launch(static_cast<unsigned>(threads), shared, cooperative, body);
  launch_of_thread = &launch;
  gridDim = dim3(static_cast<unsigned>(blocks));
  blockDim = dim3(static_cast<unsigned>(threads));
  bool done = true;
  try {
    if (cooperative) {
      done = launch.run(0, blocks);
    } else {
      for (int64_t i = 0; done && i < blocks; ++i) done = launch.run(launch.block_at(i, blocks), 1);
    }
  } catch (const std::bad_alloc&) {
    done = false;
    message = "no memory for the stacks of " + shape;
  }
  launch_of_thread = nullptr;
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}

const char* last_message() { return message.c_str(); }

void schedule(uint64_t seed) { next_order = seed; }

void fail(const char* format, ...) {
  char text[256];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  Launch& launch = current();
  launch.stop("block " + std::to_string(launch.running->block->number) + ", thread " +
              std::to_string(launch.running->number) + ": " + text);
  throw Abandoned();
}

uint64_t barrier(Op op, const char* name, bool predicate, Site site) {
  Launch& launch = current();
  Thread& self = *launch.running;
  if (op == Op::kGrid && !launch.cooperative) fail("%s in a launch that is not cooperative", name);
  self.wait = {op, name, 0, 0, predicate, site};
  if (op == Op::kGrid) {
    launch.arrive_at_grid(self);
  } else {
    launch.arrive(self);
  }
  launch.suspend();
  return self.result;
}

uint64_t warp(Op op, const char* name, uint32_t mask, uint64_t value, int source, Site site) {
  Launch& launch = current();
  Thread& self = *launch.running;
  if (!(mask >> self.number % 32 & 1)) {
    fail("%s in %s: lane %u is not in its mask 0x%08x", name, place_of(site).c_str(),
         self.number % 32, mask);
  }
  self.wait = {op, name, mask, source, value, site};
  launch.exchange(self);
  launch.suspend();
  return self.result;
}

void pause() { current().pause(); }

void pause_atomic() {
  if (current().pauses_at_atomic()) pause();
}

void* shared_memory(const void* key, size_t bytes, size_t alignment) {
  Launch& launch = current();
  Block& block = *launch.running->block;
  for (auto& piece : block.shared) {
    if (piece.first == key) return piece.second.get();
  }
  block.shared_bytes += bytes;
  if (block.shared_bytes > kMaxStatic || block.shared_bytes + launch.dynamic_bytes() > kMaxShared) {
    fail("%zu bytes of static and %zu of dynamic shared memory", block.shared_bytes,
         launch.dynamic_bytes());
  }
  block.shared.emplace_back(key, poisoned(bytes, alignment));
  return block.shared.back().second.get();
}

void* dynamic_memory() { return current().dynamic().get(); }

void copy_async(void* to, const void* from, size_t bytes, size_t zeros) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("an asynchronous copy of %zu bytes", bytes);
  if (zeros > bytes) fail("an asynchronous copy with %zu of %zu bytes zero", zeros, bytes);
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 ||
      reinterpret_cast<uintptr_t>(from) % bytes != 0) {
    fail("an asynchronous copy of %zu bytes from or to an address that is no multiple of it",
         bytes);
  }
  Thread& self = *current().running;
  memset(to, kPoison, bytes);
  self.copies.push_back({to, from, bytes, zeros, self.group});
}

void copy_commit() { ++current().running->group; }

void copy_wait(size_t groups_left) {
  Thread& self = *current().running;
  size_t done = 0;
  for (; done < self.copies.size(); ++done) {
    const Copy& copy = self.copies[done];
    if (copy.group + groups_left >= self.group) break;
    memcpy(copy.to, copy.from, copy.bytes - copy.zeros);
    memset(static_cast<char*>(copy.to) + copy.bytes - copy.zeros, 0, copy.zeros);
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<int64_t>(done));
}

}  // namespace antidote::simt
