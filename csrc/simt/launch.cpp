#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <exception>
#include <numeric>

#include "simt.h"
#include "state.h"

namespace antidote::simt {

thread_local std::vector<std::unique_ptr<Thread>> pool;

namespace {

constexpr int64_t kMaxBlocks = 2147483647;       // of a grid
constexpr int64_t kMaxSideBySide = 64;           // blocks of a cooperative launch,
constexpr int64_t kMaxFibers = 16384;            // and their threads: each takes two memory maps
constexpr int64_t kMaxSpins = int64_t{1} << 22;  // atomics and pauses; more, and nobody gets on

std::atomic<uint64_t> next_order{0};
thread_local Launch* launch_here = nullptr;
thread_local int last_error = cudaSuccess;
thread_local std::string message;

int refuse(cudaError_t error, const std::string& why) {
  message = why;
  return last_error = error;
}

}  // namespace

Launch& current_launch() {
  if (launch_here == nullptr) {
    fprintf(stderr, "device code runs outside a launch\n");
    abort();
  }
  return *launch_here;
}

std::string text_of(const Site& site) {
  const char* slash = strrchr(site.file, '/');
  return std::string(slash == nullptr ? site.file : slash + 1) + ":" + std::to_string(site.line);
}

void Thread::run() {
  Launch& launch = current_launch();
  try {
    launch.body();
  } catch (const Abandoned&) {
  } catch (const std::exception& error) {
    launch.stop(std::string("an exception in device code: ") + error.what());
  } catch (...) {
    launch.stop("an exception in device code");
  }
  launch.ended();
}

Launch::Launch(unsigned threads, size_t dynamic_bytes, bool cooperative,
               const std::function<void()>& body)
    : body(body),
      dynamic_bytes(dynamic_bytes),
      cooperative(cooperative),
      threads_(threads),
      order_(next_order),
      random_(order_) {}

// splitmix64
uint64_t Launch::random() {
  uint64_t z = random_ += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

int64_t Launch::block_at(int64_t turn, int64_t blocks) {
  if (order_ == 0) return turn;
  if (order_ == 1) return blocks - 1 - turn;
  while (step_ == 0 || std::gcd(step_, blocks) != 1) {
    start_ = static_cast<int64_t>(random() % blocks);
    step_ = static_cast<int64_t>(1 + random() % blocks);
  }
  return (start_ + turn * step_) % blocks;
}

// The fixed orders let a thread, and with it its warp, go as far as it can. The random ones favour
// the threads from an origin on, which moves after each step or only after some dozens.
unsigned Launch::next() {
  if (ready_.empty()) std::swap(ready_, paused_);
  if (order_ == 0) return ready_.take_from(0);
  if (order_ == 1) return ready_.take_last();
  if (stretch_-- == 0) {
    origin_ = static_cast<unsigned>(random() % (blocks_.size() * threads_));
    stretch_ = static_cast<int>(random() & random() & 63);
  }
  return ready_.take_from(origin_);
}

void Launch::enter(Thread& thread) {
  running = &thread;
  threadIdx.x = thread.number;
  blockIdx.x = thread.block->number;
  thread.state = State::kStarted;
  thread.enter();
}

bool Launch::run(int64_t first, int64_t blocks) {
  const unsigned total = static_cast<unsigned>(blocks) * threads_;
  while (pool.size() < total) pool.push_back(std::make_unique<Thread>());
  blocks_.clear();
  blocks_.resize(blocks);
  ready_.reset(total);
  paused_.reset(total);
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
  while (live_ > 0 && !failed_) {
    if (ready_.empty() && paused_.empty()) {
      stop(deadlock());
    } else {
      enter(*pool[next()]);
    }
  }
  // Each wait throws now, which takes what is left off the stacks.
  for (unsigned place = 0; failed_ && place < total; ++place) {
    if (pool[place]->state == State::kStarted) enter(*pool[place]);
  }
  return !failed_;
}

void Launch::stop(const std::string& why) {
  if (!failed_) refuse(cudaErrorLaunchFailure, why);
  failed_ = true;
}

void Launch::suspend() {
  spins_ = 0;
  running->leave();
  running->wait.op = Op::kNone;
  if (failed_) throw Abandoned();
}

void Launch::spin() {
  if (++spins_ > kMaxSpins) fail("threads spin and nobody gets on");
}

void Launch::pause() {
  paused_.add(running->place);
  running->leave();
  if (failed_) throw Abandoned();
}

void Launch::pause_atomic() {
  spin();
  // Now and then in any order: a loop of atomics may wait for another thread.
  if (++running->atomics % 1024 == 0 || (order_ > 1 && (random() & 1) != 0)) pause();
}

void Launch::wake(Thread& thread, uint64_t result) {
  thread.result = result;
  ready_.add(thread.place);
}

// Opens the block's barrier if all live threads are there.
void Launch::release(Block& block) {
  if (block.arrived == 0 || block.arrived < block.live || block.differ) return;
  const uint64_t predicates = static_cast<uint64_t>(block.predicates);
  block.arrived = block.predicates = 0;
  block.early = nullptr;
  for (unsigned place = block.first; place < block.first + threads_; ++place) {
    if (pool[place]->state != State::kEnded) wake(*pool[place], predicates);
  }
}

void Launch::arrive() {
  Block& block = *running->block;
  if (block.early == nullptr) block.early = running;
  if (!running->wait.meets(block.early->wait)) block.differ = true;
  block.predicates += running->wait.value != 0;
  ++block.arrived;
  release(block);
}

void Launch::arrive_at_grid() {
  // Ended threads count as missing: a GPU's grid would wait for them.
  const int total = static_cast<int>(blocks_.size() * threads_);
  if (++at_grid_ < total) return;
  for (int place = 0; place < total; ++place) {
    if (!pool[place]->wait.meets(running->wait)) return;
  }
  at_grid_ = 0;
  for (int place = 0; place < total; ++place) wake(*pool[place], 0);
}

void Launch::ended() {
  running->state = State::kEnded;
  spins_ = 0;
  --live_;
  --running->block->live;
  if (!failed_) release(*running->block);
}

// Which threads of a block wait where.
std::string Launch::waiting(const Block& block) const {
  struct Group {
    std::string what;
    std::vector<std::pair<unsigned, unsigned>> ranges;
  };
  std::vector<Group> groups;
  for (unsigned number = 0; number < threads_; ++number) {
    const Thread& thread = *pool[block.first + number];
    std::string what = "ended";
    if (thread.state != State::kEnded) {
      char mask[16] = "";
      if (thread.wait.op > Op::kGrid) snprintf(mask, sizeof mask, "(0x%08x)", thread.wait.mask);
      what = std::string("at ") + thread.wait.name + mask + " in " + text_of(thread.wait.site);
    }
    size_t i = 0;
    while (i < groups.size() && groups[i].what != what) ++i;
    if (i == groups.size()) groups.push_back({what, {}});
    auto& ranges = groups[i].ranges;
    if (!ranges.empty() && ranges.back().second + 1 == number) {
      ranges.back().second = number;
    } else {
      ranges.emplace_back(number, number);
    }
  }
  std::string text;
  for (const Group& group : groups) {
    text += text.empty() ? "threads" : "; threads";
    for (size_t i = 0; i < group.ranges.size() && i < 4; ++i) {
      const auto [first, last] = group.ranges[i];
      text += " " + std::to_string(first);
      if (last > first) text += "-" + std::to_string(last);
    }
    text += (group.ranges.size() > 4 ? " ... " : " ") + group.what;
  }
  return text;
}

std::string Launch::deadlock() const {
  std::string text = "deadlock", before;
  for (const Block& block : blocks_) {
    const std::string threads = waiting(block);
    if (threads == before) continue;  // as in the block before
    text += ", block " + std::to_string(block.number) + ": " + threads;
    before = threads;
    if (text.size() > 2000) break;
  }
  return text;
}

int run_launch(int64_t blocks, int threads, size_t shared, bool cooperative,
               const std::function<void()>& body) {
  if (launch_here != nullptr) fail("a launch in device code");
  const std::string shape = std::to_string(blocks) + " blocks of " + std::to_string(threads) +
                            " threads and " + std::to_string(shared) + " bytes";
  if (blocks < 1 || blocks > kMaxBlocks || threads < 1 || threads > kMaxThreads ||
      shared > kMaxShared) {
    return refuse(cudaErrorInvalidConfiguration, "invalid launch: " + shape);
  }
  if (cooperative && (blocks > kMaxSideBySide || blocks * threads > kMaxFibers)) {
    return refuse(cudaErrorCooperativeLaunchTooLarge, "too large to be cooperative: " + shape);
  }
  Launch launch(static_cast<unsigned>(threads), shared, cooperative, body);
  launch_here = &launch;
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
    launch_here = nullptr;
    return refuse(cudaErrorMemoryAllocation, "no memory for the stacks of " + shape);
  }
  launch_here = nullptr;
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}

const char* message_of(int error) {
  return error != cudaSuccess && error == last_error ? message.c_str() : nullptr;
}

void schedule(uint64_t seed) { next_order = seed; }

void fail(const char* format, ...) {
  char text[256];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  Launch& launch = current_launch();
  launch.stop("block " + std::to_string(launch.running->block->number) + ", thread " +
              std::to_string(launch.running->number) + ": " + text);
  throw Abandoned();
}

uint64_t barrier(Op op, const char* name, bool predicate, Site site) {
  Launch& launch = current_launch();
  Thread& self = *launch.running;
  if (op == Op::kGrid && !launch.cooperative) fail("%s in a launch that is not cooperative", name);
  self.wait = {op, name, 0, 0, predicate, site};
  if (op == Op::kGrid) {
    launch.arrive_at_grid();
  } else {
    launch.arrive();
  }
  launch.suspend();
  return self.result;
}

void pause() {
  current_launch().spin();
  current_launch().pause();
}

void pause_atomic() { current_launch().pause_atomic(); }

}  // namespace antidote::simt
