// The words that C++ and Metal spell differently, so that rules, schedules and storages are one
// text for both: no header of the standard library, no double, no exception.
#pragma once

#ifdef __METAL_VERSION__
#include <metal_stdlib>
// The rounding error of a sum is itself computed, which no rearranging or contraction survives.
// Metal before 3.2 has no such pragma: there the option that MLX compiles with turns fast math off.
#if __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
#else
#pragma STDC FP_CONTRACT OFF
#pragma clang fp contract(off)
#endif
using namespace metal;
typedef uint uint32_t;
#define FLATSTEP_CONSTANT constant
#define FLATSTEP_BITS(type, x) as_type<type>(x)
#define FLATSTEP_FMA(a, b, c) fma(a, b, c)
#define FLATSTEP_SQRT(x) precise::sqrt(x)
#else
#include <cstdint>
#define FLATSTEP_CONSTANT const
#define FLATSTEP_BITS(type, x) __builtin_bit_cast(type, x)
// Only ever used where a * b + c is exact or cancels, so a processor without the instruction gets
// the same bits through a double, which holds every product of two floats.
#if defined(__FMA__) || defined(__aarch64__)
#define FLATSTEP_FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FLATSTEP_FMA(a, b, c) float(double(a) * (b) + (c))
#endif
#define FLATSTEP_SQRT(x) __builtin_sqrtf(x)
#endif

#define FLATSTEP_FN static inline

namespace flatstep {

// Narrow: what holds 16 bits. A vector takes twice as many as of 32; a GPU's thread has registers
// of 32, from and to which 16 would be converted.
#ifdef __METAL_VERSION__
typedef ulong Step;
typedef long SignedStep;
typedef uint Narrow;
#else
typedef uint64_t Step;
typedef int64_t SignedStep;
typedef uint16_t Narrow;
#endif

}  // namespace flatstep
