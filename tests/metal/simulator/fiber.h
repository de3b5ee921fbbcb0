// Fibers: stacks that one OS thread switches between, for kernels whose threads wait for each
// other. Only what a kernel needs: x86-64 and AArch64 on Linux, no exceptions across a switch.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

// Saves the callee-saved registers on the running stack, whose pointer goes to *from, and goes on
// with the stack `to`. The floating-point control registers are the same for all fibers.
extern "C" __attribute__((visibility("hidden"))) void simulator_switch(void** from, void* to);

constexpr size_t kStackSize = 256 << 10;
constexpr size_t kGuardSize = 64 << 10;  // a multiple of every page size

inline char* make_stack() {
  void* memory = mmap(
      nullptr,
      kStackSize,
      PROT_READ | PROT_WRITE,
      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
      -1,
      0);
  if (memory == MAP_FAILED) {
    throw std::bad_alloc();
  }
  mprotect(memory, kGuardSize, PROT_NONE);
  return static_cast<char*>(memory);
}

// Stacks that are free to use. A thread that never waits gives its own back at once, so that most
// dispatches need one.
class StackPool {
 public:
  ~StackPool() {
    for (char* stack : free_) {
      munmap(stack, kStackSize);
    }
  }
  char* take() {
    if (free_.empty()) {
      return make_stack();
    }
    char* stack = free_.back();
    free_.pop_back();
    return stack;
  }
  void give_back(char* stack) {
    free_.push_back(stack);
  }

 private:
  std::vector<char*> free_;
};

// The stack pointer of a fiber that begins with `entry`, as simulator_switch expects to find it.
inline void* first_stack_pointer(char* stack, void (*entry)()) {
  uint64_t* top = reinterpret_cast<uint64_t*>(stack + kStackSize);
#if defined(__x86_64__)
  *--top = 0;  // the return address of `entry`, which never returns; keeps the stack aligned
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; ++i) {
    *--top = 0;
  }
#elif defined(__aarch64__)
  top -= 20;
  memset(top, 0, 20 * sizeof(uint64_t));
  top[11] = reinterpret_cast<uint64_t>(entry);  // x30, where `ret` goes
#else
#error "The simulator knows x86-64 and AArch64."
#endif
  return top;
}
