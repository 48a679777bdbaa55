#include "fibers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ANTIDOTE_SIMT_ASAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define ANTIDOTE_SIMT_ASAN 1
#endif
#if defined(ANTIDOTE_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(ANTIDOTE_SIMT_UCONTEXT)
// antidote_simt_switch(void** from, void* to): keeps the registers that a call must preserve on the
// stack, leaves its pointer in *from and goes on where `to` was left. swapcontext would make a
// system call for the signal mask each time. A `ret` would be predicted to go to the caller.
asm(R"(
.text
.p2align 4
.globl antidote_simt_switch
.hidden antidote_simt_switch
.type antidote_simt_switch, @function
antidote_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size antidote_simt_switch, .-antidote_simt_switch
)");
extern "C" void antidote_simt_switch(void** from, void* to);
#endif

namespace antidote::simt {

namespace {

#if defined(ANTIDOTE_SIMT_ASAN)
constexpr size_t kStack = 256 * 1024;  // redzones, and the sanitizer's own reports

void start_switch(void** fake, const void* stack, size_t size) {
  __sanitizer_start_switch_fiber(fake, stack, size);
}
void finish_switch(void* fake, const void** stack, size_t* size) {
  __sanitizer_finish_switch_fiber(fake, stack, size);
}
void forget(void* stack) { __asan_unpoison_memory_region(stack, kStack); }
#else
constexpr size_t kStack = 64 * 1024;

void start_switch(void**, const void*, size_t) {}
void finish_switch(void*, const void**, size_t*) {}
void forget(void*) {}
#endif

size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

[[maybe_unused]] thread_local size_t made = 0;  // fibers
thread_local Fiber* beginning;                  // the fiber that is entered for the first time

}  // namespace

Fiber::Fiber() {
  // A page without access below the stack: an overflow ends the process instead of other data.
  void* memory = mmap(nullptr, kStack + page(), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  if (mprotect(memory, page(), PROT_NONE) != 0) {
    munmap(memory, kStack + page());
    throw std::bad_alloc();
  }
  stack_ = static_cast<char*>(memory) + page();
#if defined(ANTIDOTE_SIMT_UCONTEXT)
  getcontext(&inside_);
  inside_.uc_stack.ss_sp = stack_;
  inside_.uc_stack.ss_size = kStack;
  inside_.uc_link = nullptr;
  makecontext(&inside_, &Fiber::begin, 0);
#else
  // Six registers, the address to go to, and a null one where stack traces end. The stack is then
  // as it is behind a call: 8 below a multiple of 16. Tops at the same place of all pages would
  // share few lines of the cache.
  void** top = reinterpret_cast<void**>(stack_ + kStack - made++ % 32 * 128);
  for (int i = 1; i <= 8; ++i) top[-i] = nullptr;
  top[-2] = reinterpret_cast<void*>(&Fiber::begin);
  inside_ = top - 8;
#endif
}

Fiber::~Fiber() {
  forget(stack_);
  munmap(stack_ - page(), kStack + page());
}

void Fiber::begin() { beginning->loop(); }

void Fiber::loop() {
  finish_switch(nullptr, &outside_stack_, &outside_size_);
  for (;;) {
    run();
    leave();
  }
}

void Fiber::enter() {
  beginning = this;
  start_switch(&outside_fake_, stack_, kStack);
#if defined(ANTIDOTE_SIMT_UCONTEXT)
  swapcontext(&outside_, &inside_);
#else
  antidote_simt_switch(&outside_, inside_);
#endif
  finish_switch(outside_fake_, nullptr, nullptr);
}

void Fiber::leave() {
  start_switch(&inside_fake_, outside_stack_, outside_size_);
#if defined(ANTIDOTE_SIMT_UCONTEXT)
  swapcontext(&inside_, &outside_);
#else
  antidote_simt_switch(&inside_, outside_);
#endif
  finish_switch(inside_fake_, &outside_stack_, &outside_size_);
}

}  // namespace antidote::simt
