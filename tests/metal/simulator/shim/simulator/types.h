// Vectors, packed vectors, the type traits that kernels use, and as_type.
#pragma once

namespace metal {

#ifndef SIMULATOR_BFLOAT_CLASS
template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));
template <typename T, int N>
using simulator_vector = vec<T, N>;
#else
// clang has no vectors of classes: bfloat's can be loaded, stored and subscripted. From a `vec` of
// its own a function's template arguments cannot be deduced, so the shim's functions do without.
template <typename T, int N>
using simulator_vector = T __attribute__((ext_vector_type(N)));
template <typename T, int N>
struct simulator_choose {
  using type = simulator_vector<T, N>;
};
template <int N>
struct alignas(2 * N) simulator_bfloats {
  bfloat values[N];
  simulator_bfloats() = default;
  constexpr explicit simulator_bfloats(bfloat x) : values() {
    for (int i = 0; i < N; ++i) {
      values[i] = x;
    }
  }
  constexpr bfloat& operator[](int i) {
    return values[i];
  }
  constexpr const bfloat& operator[](int i) const {
    return values[i];
  }
};
template <int N>
struct simulator_choose<bfloat, N> {
  using type = simulator_bfloats<N>;
};
template <typename T, int N>
using vec = typename simulator_choose<T, N>::type;
#endif

}  // namespace metal

#ifdef SIMULATOR_BFLOAT_CLASS
typedef metal::simulator_bfloats<2> bfloat2;
typedef metal::simulator_bfloats<4> bfloat4;
#endif

// E is what an element is stored as.
#define SIMULATOR_VECTORS(T, E)                                           \
  typedef E T##2 __attribute__((ext_vector_type(2)));                     \
  typedef E T##3 __attribute__((ext_vector_type(3)));                     \
  typedef E T##4 __attribute__((ext_vector_type(4)));                     \
  struct packed_##T##2 {                                                  \
    E x, y;                                                               \
    packed_##T##2() = default;                                            \
    SIMULATOR_FN packed_##T##2(T##2 v) : x(v.x), y(v.y) {                 \
    }                                                                     \
    SIMULATOR_FN operator T##2() const {                                  \
      return T##2 {x, y};                                                 \
    }                                                                     \
  };                                                                      \
  struct packed_##T##3 {                                                  \
    E x, y, z;                                                            \
    packed_##T##3() = default;                                            \
    SIMULATOR_FN packed_##T##3(T##3 v) : x(v.x), y(v.y), z(v.z) {         \
    }                                                                     \
    SIMULATOR_FN operator T##3() const {                                  \
      return T##3 {x, y, z};                                              \
    }                                                                     \
  };                                                                      \
  struct packed_##T##4 {                                                  \
    E x, y, z, w;                                                         \
    packed_##T##4() = default;                                            \
    SIMULATOR_FN packed_##T##4(T##4 v) : x(v.x), y(v.y), z(v.z), w(v.w) { \
    }                                                                     \
    SIMULATOR_FN operator T##4() const {                                  \
      return T##4 {x, y, z, w};                                           \
    }                                                                     \
  };
SIMULATOR_VECTORS(char, char)
SIMULATOR_VECTORS(uchar, uchar)
SIMULATOR_VECTORS(short, short)
SIMULATOR_VECTORS(ushort, ushort)
SIMULATOR_VECTORS(int, int)
SIMULATOR_VECTORS(uint, uint)
SIMULATOR_VECTORS(long, long)
SIMULATOR_VECTORS(ulong, ulong)
SIMULATOR_VECTORS(half, half)
SIMULATOR_VECTORS(float, float)
SIMULATOR_VECTORS(bool, char)
#ifndef SIMULATOR_BFLOAT_CLASS
SIMULATOR_VECTORS(bfloat, bfloat)
#endif
#undef SIMULATOR_VECTORS

namespace metal {

// The names that a kernel may write with `metal::`.
#define SIMULATOR_USE(T) \
  using ::T##2;          \
  using ::T##3;          \
  using ::T##4;          \
  using ::packed_##T##2; \
  using ::packed_##T##3; \
  using ::packed_##T##4;
SIMULATOR_USE(char)
SIMULATOR_USE(uchar)
SIMULATOR_USE(short)
SIMULATOR_USE(ushort)
SIMULATOR_USE(int)
SIMULATOR_USE(uint)
SIMULATOR_USE(long)
SIMULATOR_USE(ulong)
SIMULATOR_USE(half)
SIMULATOR_USE(float)
SIMULATOR_USE(bool)
#ifndef SIMULATOR_BFLOAT_CLASS
SIMULATOR_USE(bfloat)
#endif
#undef SIMULATOR_USE
using ::int16_t;
using ::int32_t;
using ::int64_t;
using ::int8_t;
using ::ptrdiff_t;
using ::size_t;
using ::uchar;
using ::uint;
using ::uint16_t;
using ::uint32_t;
using ::uint64_t;
using ::uint8_t;
using ::ulong;
using ::ushort;

template <typename T, T VALUE>
struct integral_constant {
  static constexpr constant T value = VALUE;
  using value_type = T;
  constexpr operator T() const {
    return VALUE;
  }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <bool B, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
  using type = T;
};
template <bool B, typename T = void>
using enable_if_t = typename enable_if<B, T>::type;

template <bool B, typename T, typename F>
struct conditional {
  using type = T;
};
template <typename T, typename F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool B, typename T, typename F>
using conditional_t = typename conditional<B, T, F>::type;

template <typename T, typename U>
struct is_same : false_type {};
template <typename T>
struct is_same<T, T> : true_type {};
template <typename T, typename U>
static constexpr constant bool is_same_v = is_same<T, U>::value;

template <typename T>
struct remove_const {
  using type = T;
};
template <typename T>
struct remove_const<const T> {
  using type = T;
};

template <typename T>
struct is_floating_point
    : bool_constant<is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>> {};
template <typename T>
struct is_integral : bool_constant<__is_integral(T)> {};
template <typename T>
static constexpr constant bool is_floating_point_v = is_floating_point<T>::value;
template <typename T>
static constexpr constant bool is_integral_v = is_integral<T>::value;

// Not MSL's own: the element and the width of a vector, a scalar being one of width 1.
template <typename T>
struct simulator_shape {
  using element = T;
  static constexpr constant int width = 1;
};
template <typename T, int N>
struct simulator_shape<simulator_vector<T, N>> {
  using element = T;
  static constexpr constant int width = N;
};

// Of what a function's other arguments decide, so that it converts.
template <typename T>
struct simulator_identity {
  using type = T;
};
template <typename T>
using simulator_same = typename simulator_identity<T>::type;

template <typename T, typename U>
SIMULATOR_FN constexpr T as_type(U x) {
  static_assert(sizeof(T) == sizeof(U), "as_type: the sizes differ");
  return __builtin_bit_cast(T, x);
}

// `float4(a, b.xy, c)`, which the translation spells `simulator_make<float4>(a, b.xy, c)`.
template <typename V, typename A>
SIMULATOR_FN void simulator_append(thread V& v, thread int& next, A a) {
  using Element = typename simulator_shape<V>::element;
  if constexpr (simulator_shape<A>::width == 1) {
    v[next++] = static_cast<Element>(a);
  } else {
    for (int i = 0; i < simulator_shape<A>::width; ++i) {
      v[next++] = static_cast<Element>(a[i]);
    }
  }
}

template <typename V>
SIMULATOR_FN V simulator_make() {
  return V(0);
}

template <typename V, typename A>
SIMULATOR_FN V simulator_make(A a) {
  if constexpr (__is_class(A) && __is_convertible(A, V)) {
    return a;  // a packed vector
  } else if constexpr (simulator_shape<A>::width == 1) {
    return static_cast<V>(static_cast<typename simulator_shape<V>::element>(a));
  } else {
    static_assert(
        simulator_shape<A>::width == simulator_shape<V>::width, "the widths of the vectors differ");
    return __builtin_convertvector(a, V);
  }
}

template <typename V, typename A, typename B, typename... More>
SIMULATOR_FN V simulator_make(A a, B b, More... more) {
  constexpr int components = simulator_shape<A>::width + simulator_shape<B>::width +
                             (0 + ... + simulator_shape<More>::width);
  static_assert(components == simulator_shape<V>::width, "wrong number of components of a vector");
  V v;
  int next = 0;
  simulator_append(v, next, a);
  simulator_append(v, next, b);
  (simulator_append(v, next, more), ...);
  return v;
}

}  // namespace metal

using metal::as_type;
