// A fiber: a function with a stack of its own, which runs when it is entered and stops where it leaves. The threads of an
// emulated block are fibers, so that one core runs them in an order we choose, and a fault happens the same way each time.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

#include "../../check.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ADRENALINE_ASAN 1
#else
#define ADRENALINE_ASAN 0
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace adrenaline::cuda::emulation {

#if defined(__x86_64__)
// Save what a call must keep, change stacks, restore. swapcontext does the same at fifty times the price: it asks the
// kernel for the signal mask each time, and a product of matrices changes fibers 32 times.
__attribute__((naked, noinline)) inline void change_stack(void** /*left*/, void* /*entered*/) {
  asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}
#endif

class Fiber {
 public:
  static constexpr size_t kStack = ADRENALINE_ASAN ? 512 << 10 : 128 << 10;

  Fiber() {
    void* found = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    ADRENALINE_CHECK(found != MAP_FAILED, "no memory for a fiber");
    stack_ = static_cast<char*>(found);
  }
  ~Fiber() {
#if ADRENALINE_ASAN
    __asan_unpoison_memory_region(stack_, kStack);
#endif
    munmap(stack_, kStack);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Make it ready to run `main(argument)` from the start. That function must never return.
  void prepare(void (*main)(void*), void* argument) {
    main_ = main;
    argument_ = argument;
#if ADRENALINE_ASAN
    fake_ = nullptr;
    __asan_unpoison_memory_region(stack_, kStack);  // frames that were left for good are still marked
#endif
#if defined(__x86_64__)
    // What change_stack finds: six registers, the address it returns to, and a stack aligned as after a call.
    void** top = reinterpret_cast<void**>(stack_ + kStack) - 1;
    *--top = reinterpret_cast<void*>(&Fiber::begin);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    inside_ = top;
#else
    getcontext(&inside_);
    inside_.uc_stack.ss_sp = stack_;
    inside_.uc_stack.ss_size = kStack;
    inside_.uc_link = nullptr;
    makecontext(&inside_, &Fiber::begin, 0);
#endif
  }

  // Run it until it leaves.
  void enter() {
    current_ = this;
#if ADRENALINE_ASAN
    void* fake;
    __sanitizer_start_switch_fiber(&fake, stack_, kStack);
#endif
    change(outside_, inside_);
#if ADRENALINE_ASAN
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  // Stop it, from inside, until it is entered again.
  void leave() {
#if ADRENALINE_ASAN
    __sanitizer_start_switch_fiber(&fake_, outside_stack_, outside_size_);
#endif
    change(inside_, outside_);
#if ADRENALINE_ASAN
    __sanitizer_finish_switch_fiber(fake_, &outside_stack_, &outside_size_);
#endif
  }

 private:
  static void begin() {
    Fiber* self = current_;
#if ADRENALINE_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &self->outside_stack_, &self->outside_size_);
#endif
    self->main_(self->argument_);
  }

#if defined(__x86_64__)
  static void change(void*& left, void* entered) { change_stack(&left, entered); }
  void *inside_ = nullptr, *outside_ = nullptr;
#else
  static void change(ucontext_t& left, ucontext_t& entered) { swapcontext(&left, &entered); }
  ucontext_t inside_, outside_;
#endif
#if ADRENALINE_ASAN
  void* fake_ = nullptr;
  const void* outside_stack_ = nullptr;
  size_t outside_size_ = 0;
#endif
  static inline Fiber* current_ = nullptr;
  char* stack_;
  void (*main_)(void*) = nullptr;
  void* argument_ = nullptr;
};

}  // namespace adrenaline::cuda::emulation
