// What the compiled kernels and the runtime ask of each other. The shim's headers declare the same
// functions in their own words, because the strict dialect cannot include this file.
#pragma once

#include <cstdint>

#include "runtime.h"

// Positions in the order of ATTRIBUTES in translate.py.
constexpr int kNumPositions = 13;

struct SimulatorCall {
  uint64_t buffers[SIMULATOR_NUM_SLOTS];
  uint64_t threadgroup[SIMULATOR_NUM_SLOTS];
  uint32_t positions[kNumPositions][4];
};

#pragma GCC visibility push(hidden)
extern "C" {

// Defined by the generated code.
struct SimulatorKernel {
  const char* name;
  const SimulatorParameter* parameters;
  int num_parameters;
};
extern const SimulatorKernel simulator_kernels[];
extern const int simulator_kernel_count;
void simulator_enter(int kernel, const SimulatorCall* call);

// Defined by the runtime.
void simulator_barrier(int scope, int flags, int line);
uint64_t simulator_exchange(uint64_t value, uint32_t size, uint64_t lanes, int line);
uint64_t simulator_threadgroup_variable(int which, uint32_t size, uint32_t alignment);
void simulator_inactive_lane(int line);
void simulator_atomic_access(uint64_t address, uint32_t size, int is_write);

}  // extern "C"
#pragma GCC visibility pop
