// From what a host binds to the arguments of a kernel. The translation writes one entry function
// for each kernel; the types of its arguments are taken from the kernel's own type.
#pragma once

struct simulator_call {
  ulong buffers[31];
  ulong threadgroup_memory[31];
  uint positions[13][4];
};

namespace metal {

template <int I, typename First, typename... Rest>
struct simulator_nth {
  using type = typename simulator_nth<I - 1, Rest...>::type;
};
template <typename First, typename... Rest>
struct simulator_nth<0, First, Rest...> {
  using type = First;
};

template <typename Function>
struct simulator_signature;
template <typename... Arguments>
struct simulator_signature<void(Arguments...)> {
  template <int I>
  using argument = typename simulator_nth<I, Arguments...>::type;
};

// A position in the grid: ushort, uint, or a vector of them.
template <typename T>
struct simulator_argument {
  using Element = typename simulator_shape<T>::element;
  static_assert(
      is_same_v<Element, uint> || is_same_v<Element, ushort>,
      "an argument of a kernel is a device or constant pointer or reference, threadgroup memory, "
      "or a position of ushort, uint or their vectors");
  static constexpr constant uint size = 0;
  static constexpr constant uint alignment = 1;
  static constexpr constant bool is_reference = false;
  static constexpr constant bool is_writable = false;
  static SIMULATOR_FN T position(const thread uint* values) {
    T result;
    simulator_set(result, values);
    return result;
  }
  template <typename U>
  static SIMULATOR_FN void simulator_set(thread U& result, const thread uint* values) {
    result = static_cast<U>(values[0]);
  }
  template <typename U, int N>
  static SIMULATOR_FN void simulator_set(
      thread simulator_vector<U, N>& result, const thread uint* values) {
    for (int i = 0; i < N; ++i) {
      result[i] = static_cast<U>(values[i]);
    }
  }
};

template <typename T>
struct simulator_is_const : false_type {};
template <typename T>
struct simulator_is_const<const T> : true_type {};

#define SIMULATOR_MEMORY_ARGUMENT(SPACE, WRITABLE)                                          \
  template <typename T>                                                                     \
  struct simulator_argument<SPACE T*> {                                                     \
    static constexpr constant uint size = sizeof(T);                                        \
    static constexpr constant uint alignment = alignof(T);                                  \
    static constexpr constant bool is_reference = false;                                    \
    static constexpr constant bool is_writable = WRITABLE && !simulator_is_const<T>::value; \
    static SIMULATOR_FN SPACE T* memory(ulong address) {                                    \
      return (SPACE T*)(uintptr_t)address;                                                  \
    }                                                                                       \
  };                                                                                        \
  template <typename T>                                                                     \
  struct simulator_argument<SPACE T&> {                                                     \
    static constexpr constant uint size = sizeof(T);                                        \
    static constexpr constant uint alignment = alignof(T);                                  \
    static constexpr constant bool is_reference = true;                                     \
    static constexpr constant bool is_writable = WRITABLE && !simulator_is_const<T>::value; \
    static SIMULATOR_FN SPACE T& memory(ulong address) {                                    \
      return *(SPACE T*)(uintptr_t)address;                                                 \
    }                                                                                       \
  };
SIMULATOR_MEMORY_ARGUMENT(device, true)
#ifdef SIMULATOR_STRICT
SIMULATOR_MEMORY_ARGUMENT(constant, false)
SIMULATOR_MEMORY_ARGUMENT(threadgroup, true)
#endif
#undef SIMULATOR_MEMORY_ARGUMENT

}  // namespace metal
