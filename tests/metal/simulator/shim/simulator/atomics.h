// Atomics of 32 bits. They are bounds-checked like other accesses, but never part of a race.
#pragma once

extern "C" void simulator_atomic_access(ulong address, uint size, int is_write);

namespace metal {

// MSL 3.1 has no other.
enum memory_order : int { memory_order_relaxed = 0 };

template <typename T>
struct atomic {
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;

// Not instrumented, and not inlined into what is: a load here would count as an ordinary one.
#define SIMULATOR_ATOMIC __attribute__((noinline, no_sanitize("kernel-address")))

#define SIMULATOR_FETCH(SPACE, NAME, EXPRESSION)                                   \
  template <typename T>                                                            \
  SIMULATOR_ATOMIC T atomic_fetch_##NAME##_explicit(                               \
      volatile SPACE atomic<T>* object, simulator_same<T> operand, memory_order) { \
    simulator_atomic_access((ulong)(uintptr_t)object, sizeof(T), 1);               \
    T old = object->value;                                                         \
    object->value = static_cast<T>(EXPRESSION);                                    \
    return old;                                                                    \
  }

// Threads of a dispatch run on one thread of the machine, so plain loads and stores are atomic.
#define SIMULATOR_ATOMICS(SPACE)                                                                  \
  template <typename T>                                                                           \
  SIMULATOR_ATOMIC T atomic_load_explicit(const volatile SPACE atomic<T>* object, memory_order) { \
    simulator_atomic_access((ulong)(uintptr_t)object, sizeof(T), 0);                              \
    return object->value;                                                                         \
  }                                                                                               \
  template <typename T>                                                                           \
  SIMULATOR_ATOMIC void atomic_store_explicit(                                                    \
      volatile SPACE atomic<T>* object, simulator_same<T> desired, memory_order) {                \
    simulator_atomic_access((ulong)(uintptr_t)object, sizeof(T), 1);                              \
    object->value = desired;                                                                      \
  }                                                                                               \
  template <typename T>                                                                           \
  SIMULATOR_ATOMIC T atomic_exchange_explicit(                                                    \
      volatile SPACE atomic<T>* object, simulator_same<T> desired, memory_order) {                \
    simulator_atomic_access((ulong)(uintptr_t)object, sizeof(T), 1);                              \
    T old = object->value;                                                                        \
    object->value = desired;                                                                      \
    return old;                                                                                   \
  }                                                                                               \
  SIMULATOR_FETCH(SPACE, add, old + operand)                                                      \
  SIMULATOR_FETCH(SPACE, sub, old - operand)                                                      \
  SIMULATOR_FETCH(SPACE, min, operand < old ? operand : old)                                      \
  SIMULATOR_FETCH(SPACE, max, operand > old ? operand : old)                                      \
  SIMULATOR_FETCH(SPACE, or, old | operand)                                                       \
  SIMULATOR_FETCH(SPACE, and, old& operand)
SIMULATOR_ATOMICS(device)
#ifdef SIMULATOR_STRICT
SIMULATOR_ATOMICS(threadgroup)
#endif
#undef SIMULATOR_ATOMICS
#undef SIMULATOR_FETCH

}  // namespace metal
