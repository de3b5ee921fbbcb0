// The words of MSL that C++ lacks, for either dialect: address spaces, half and bfloat.
#pragma once

#ifdef __OPENCL_CPP_VERSION__
#define SIMULATOR_STRICT 1
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable
#define device __global
#define threadgroup __local
#define thread __private
#undef constant
#define constant __constant
// OpenCL reserves these words and predeclares these types, MSL does not.
#define local simulator_local
#define global simulator_global
#define atomic_int simulator_atomic_int
#define atomic_uint simulator_atomic_uint
#else
#define device
#define threadgroup
#define thread
#define constant const
typedef _Float16 half;
#endif

#define METAL_FUNC inline __attribute__((__always_inline__))
#define SIMULATOR_FN inline __attribute__((__always_inline__))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;
typedef __INTPTR_TYPE__ intptr_t;
typedef __UINTPTR_TYPE__ uintptr_t;

#ifndef SIMULATOR_BFLOAT_CLASS
typedef __bf16 bfloat;
#else
// Compiled but never run: clang's __bf16 converts from float silently, MSL's bfloat does not.
struct bfloat {
  __bf16 value;
  bfloat() = default;
  template <typename T, int = sizeof(static_cast<float>(T()))>
  constexpr explicit bfloat(T x) : value(static_cast<__bf16>(static_cast<float>(x))) {
  }
  constexpr operator float() const {
    return static_cast<float>(value);
  }
  constexpr explicit operator half() const {
    return static_cast<half>(static_cast<float>(value));
  }
};
#define SIMULATOR_BFLOAT_OPERATOR(OP)                              \
  constexpr inline bfloat operator OP(bfloat a, bfloat b) {        \
    return bfloat(static_cast<float>(a) OP static_cast<float>(b)); \
  }                                                                \
  inline bfloat& operator OP## = (bfloat & a, bfloat b) {          \
    return a = a OP b;                                             \
  }
SIMULATOR_BFLOAT_OPERATOR(+)
SIMULATOR_BFLOAT_OPERATOR(-)
SIMULATOR_BFLOAT_OPERATOR(*)
SIMULATOR_BFLOAT_OPERATOR(/)
constexpr inline bfloat operator-(bfloat a) {
  return bfloat(-static_cast<float>(a));
}
#endif

#ifndef SIMULATOR_STRICT
// Not in every libgcc. Takes and returns what the ABI has in a vector register.
extern "C" __attribute__((weak, visibility("hidden"))) __bf16 __truncsfbf2(float x) {
  unsigned bits = __builtin_bit_cast(unsigned, x);
  bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  unsigned rounded = is_nan ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return __builtin_bit_cast(__bf16, static_cast<unsigned short>(rounded));
}
#endif
