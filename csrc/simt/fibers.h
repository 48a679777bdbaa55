// Functions that can be left in the middle and entered again later, each on a stack of its own:
// what a CUDA thread is made of in a run without a GPU.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(ANTIDOTE_SIMT_UCONTEXT)
#undef ANTIDOTE_SIMT_UCONTEXT
#define ANTIDOTE_SIMT_UCONTEXT 1
#include <ucontext.h>
#endif

namespace antidote::simt {

// Lives on one OS thread. `enter` and `leave` cost some nanoseconds on x86-64.
class Fiber {
 public:
  Fiber();           // throws std::bad_alloc where there is no memory for a stack
  virtual ~Fiber();  // whatever still lies on the stack is forgotten, not destroyed
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void enter();  // runs the fiber until it leaves or its run() ends
  void leave();  // only on the fiber itself: goes back to who entered

 protected:
  virtual void run() = 0;  // what the next enter() starts once the last run() has ended

 private:
  static void begin();
  void loop();

  char* stack_;
#if defined(ANTIDOTE_SIMT_UCONTEXT)
  ucontext_t inside_, outside_;
#else
  void *inside_, *outside_;  // stack pointers, the registers below them
#endif
  // What the address sanitizer keeps of either side.
  void *inside_fake_ = nullptr, *outside_fake_ = nullptr;
  const void* outside_stack_ = nullptr;
  size_t outside_size_ = 0;
};

}  // namespace antidote::simt
