// The C interface of a shared library that `simulator.build` makes out of a .metal file: which
// kernels it holds, what they take, and a dispatch of one of them on the CPU.
//
// Several such libraries may live in one process (load them with RTLD_LOCAL). Every function may be
// called from any thread; dispatches of one library run one after the other.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Changes whenever a struct below does.
#define SIMULATOR_ABI 2
#define SIMULATOR_NUM_SLOTS 31

enum SimulatorKind { SIMULATOR_BUFFER = 0, SIMULATOR_THREADGROUP = 1, SIMULATOR_POSITION = 2 };
enum SimulatorOrder { SIMULATOR_FORWARD = 0, SIMULATOR_REVERSE = 1, SIMULATOR_SHUFFLED = 2 };

// One parameter of a kernel. Size and alignment are those of what is pointed to.
typedef struct SimulatorParameter {
  int32_t kind;
  int32_t index;  // of the buffer or the threadgroup memory
  uint32_t size;
  uint32_t alignment;
  int32_t is_reference;  // a reference needs `size` bytes; of a pointer that cannot be known
  int32_t is_writable;   // points to device memory that is not const
} SimulatorParameter;

typedef struct SimulatorRange {
  uint64_t begin;  // in bytes from the buffer's address
  uint64_t end;
} SimulatorRange;

// A bound buffer: exactly `size` bytes from `address` may be touched. Where `readable` or
// `writable` is not null, only what its ranges cover may be read or written. They count only
// while memory is checked.
typedef struct SimulatorBuffer {
  void* address;  // null: nothing is bound here
  uint64_t size;
  const SimulatorRange* readable;
  uint64_t num_readable;
  const SimulatorRange* writable;
  uint64_t num_writable;
  // Bytes before the address that may be touched as well: of an array that is walked backwards.
  uint64_t before;
} SimulatorBuffer;

typedef struct SimulatorDispatch {
  int32_t kernel;
  int32_t grid_is_threads;  // 1: `grid` counts threads (dispatchThreads), 0: threadgroups
  uint32_t grid[3];
  uint32_t threads_per_threadgroup[3];
  SimulatorBuffer buffers[SIMULATOR_NUM_SLOTS];
  uint32_t threadgroup_lengths[SIMULATOR_NUM_SLOTS];  // in bytes
  int32_t order;                                      // in which threads and threadgroups run
  uint32_t seed;                                      // of the shuffled order
  int32_t flush_to_zero;  // subnormal floats are zero, as on a GPU in its fast modes
  // Every access: inside its buffer, aligned, allowed, free of races and of overlaps.
  int32_t check_memory;
} SimulatorDispatch;

int simulator_abi(void);
int simulator_num_kernels(void);
// The name by which a host asks for the kernel; null past the last one.
const char* simulator_kernel_name(int kernel);
int simulator_num_parameters(int kernel);
const SimulatorParameter* simulator_parameter(int kernel, int parameter);

// Returns 0, or 1 if the kernel or the dispatch was wrong: simulator_error() then says how. What
// the kernel wrote up to there stays written.
int simulator_run(const SimulatorDispatch* dispatch);
// About this thread's latest simulator_run that failed; valid until its next one. `[at 0x...]` is a
// return address in this library's file, which addr2line turns into a line of the source.
const char* simulator_error(void);

#ifdef __cplusplus
}
#endif
