// Is an access of a kernel to memory allowed? The compiler puts a call before every load and store
// of the kernel (the instrumentation of Linux's KernelAddressSanitizer, whose runtime this is); the
// answer is exact to the byte.
//
// Races are found by when bytes were last touched, not by what order the threads happened to run
// in. Time counts barriers: it advances whenever one lets threads go. Two accesses to a byte by
// different threads, one a write, must have a barrier between them that both threads took part in.
//
// Metal's compiler takes it that buffers do not overlap. What is written through one must not be
// touched through another in the same dispatch, whichever is first and whatever lies in between.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bindings.h"
#include "kernel_side.h"

// What the scheduler knows about the thread that runs. Times are those at which the latest barrier
// that orders such memory let the thread go.
struct RunningThread {
  uint32_t id = 0;  // within its threadgroup
  const char* stack = nullptr;
  uint32_t now = 1;
  uint32_t group_start = 1;
  uint32_t device_barrier = 0;
  uint32_t threadgroup_barrier = 0;
  uint32_t device_simd_barrier = 0;
  uint32_t threadgroup_simd_barrier = 0;
};

enum AccessKind { ACCESS_READ, ACCESS_WRITE };

class MemoryCheck {
 public:
  static constexpr uint32_t kMaxTime = (1u << 20) - 1;

  // Changes the addresses of buffers that overlap while it lives.
  MemoryCheck(SimulatorDispatch& dispatch, const SimulatorKernel& kernel);

  void set_threadgroup_memory(const char* begin, uint64_t size);
  void clear_threadgroup_blocks();
  void add_threadgroup_block(const char* begin, uint64_t size);
  // Forgets all touches: time begins anew.
  void restart_time();

  // `is_aligned_access` is false for copies of structs and the like, which the compiler knows to
  // be less aligned than they are long. Returns an empty string if the access is allowed.
  std::string access(
      uint64_t address, uint64_t size, AccessKind kind, bool is_aligned_access, bool is_atomic);

  RunningThread thread;

 private:
  std::string where(uint64_t address) const;
  std::string in_device(
      const Binding& binding, uint64_t address, uint64_t size, AccessKind kind, bool is_atomic);
  std::string in_threadgroup(
      uint64_t address, uint64_t size, AccessKind kind, bool is_aligned_access);
  static std::string overlap(
      const Binding& binding, uint64_t offset, uint64_t size, AccessKind kind);
  bool race(LastTouch* touches, uint64_t size, AccessKind kind, bool is_device);
  bool is_ordered(uint32_t touch, bool is_device) const;
  void note_read(LastTouch& touch, bool is_device) const;

  const SimulatorDispatch& dispatch_;
  Bindings bindings_;
  uint64_t threadgroup_begin_ = 0;
  uint64_t threadgroup_end_ = 0;
  std::vector<Range> threadgroup_blocks_;
  std::vector<LastTouch> threadgroup_touches_;
};
