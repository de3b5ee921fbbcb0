// What a kernel calls while it runs: the shim's functions, and those that the compiler puts before
// loads and stores (the names are of Linux's KernelAddressSanitizer, which leaves them to its
// user).
#include <cstring>
#include <string>

#include "kernel_side.h"
#include "threadgroup.h"

extern "C" {

void simulator_barrier(int scope, int flags, int line) {
  Threadgroup::current->barrier(scope, flags, line);
}

uint64_t simulator_exchange(uint64_t value, uint32_t size, uint64_t lanes, int line) {
  return Threadgroup::current->exchange(value, size, lanes, line);
}

uint64_t simulator_threadgroup_variable(int which, uint32_t size, uint32_t alignment) {
  return Threadgroup::current->variable(which, size, alignment);
}

void simulator_inactive_lane(int line) {
  Threadgroup::current->fail(
      "line " + std::to_string(line) + ": a shuffle reads a lane that is not active");
}

void simulator_atomic_access(uint64_t address, uint32_t size, int is_write) {
  if (Threadgroup::current->checks_memory()) {
    AccessKind kind = is_write ? ACCESS_WRITE : ACCESS_READ;
    Threadgroup::current->access(address, size, kind, true, true, __builtin_return_address(0));
  }
}

// The instrumentation's calls. Those that end in N are less aligned than they are long.
#define INSTRUMENTED(NAME, KIND, SIZE)                                                             \
  __attribute__((visibility("hidden"))) void __asan_##NAME##SIZE##_noabort(uint64_t address) {     \
    if (Threadgroup::current->checks_memory()) {                                                   \
      Threadgroup::current->access(address, SIZE, KIND, true, false, __builtin_return_address(0)); \
    }                                                                                              \
  }
#define INSTRUMENTED_ALL(NAME, KIND)                                       \
  INSTRUMENTED(NAME, KIND, 1)                                              \
  INSTRUMENTED(NAME, KIND, 2)                                              \
  INSTRUMENTED(NAME, KIND, 4)                                              \
  INSTRUMENTED(NAME, KIND, 8)                                              \
  INSTRUMENTED(NAME, KIND, 16)                                             \
  __attribute__((visibility("hidden"))) void __asan_##NAME##N_noabort(     \
      uint64_t address, uint64_t size) {                                   \
    if (Threadgroup::current->checks_memory()) {                           \
      Threadgroup::current->access(                                        \
          address, size, KIND, false, false, __builtin_return_address(0)); \
    }                                                                      \
  }
INSTRUMENTED_ALL(load, ACCESS_READ)
INSTRUMENTED_ALL(store, ACCESS_WRITE)

__attribute__((visibility("hidden"))) void* __asan_memcpy(
    void* to, const void* from, uint64_t size) {
  if (Threadgroup::current->checks_memory()) {
    void* pc = __builtin_return_address(0);
    Threadgroup::current->access(
        reinterpret_cast<uint64_t>(from), size, ACCESS_READ, false, false, pc);
    Threadgroup::current->access(
        reinterpret_cast<uint64_t>(to), size, ACCESS_WRITE, false, false, pc);
  }
  return std::memmove(to, from, size);
}

__attribute__((visibility("hidden"))) void* __asan_memmove(
    void* to, const void* from, uint64_t size) {
  return __asan_memcpy(to, from, size);
}

__attribute__((visibility("hidden"))) void* __asan_memset(void* to, int value, uint64_t size) {
  if (Threadgroup::current->checks_memory()) {
    void* pc = __builtin_return_address(0);
    Threadgroup::current->access(
        reinterpret_cast<uint64_t>(to), size, ACCESS_WRITE, false, false, pc);
  }
  return std::memset(to, value, size);
}

__attribute__((visibility("hidden"))) void __asan_handle_no_return() {
}

// What each of UndefinedBehaviorSanitizer's descriptions begins with.
struct SourceLocation {
  const char* file;
  uint32_t line;
  uint32_t column;
};

#define UNDEFINED(NAME, WHAT)                                            \
  __attribute__((visibility("hidden"))) void __ubsan_handle_##NAME(      \
      const SourceLocation* at, uint64_t, uint64_t) {                    \
    Threadgroup::current->fail(                                          \
        std::string(WHAT) + "\n  " + (at->file ? at->file : "?") + ":" + \
        std::to_string(at->line));                                       \
  }
UNDEFINED(out_of_bounds, "an index is outside of its array")
UNDEFINED(divrem_overflow, "an integer is divided by zero, or the quotient overflows")
UNDEFINED(add_overflow, "a sum of signed integers overflows")
UNDEFINED(sub_overflow, "a difference of signed integers overflows")
UNDEFINED(mul_overflow, "a product of signed integers overflows")
UNDEFINED(negate_overflow, "the negative of a signed integer overflows")

}  // extern "C"
