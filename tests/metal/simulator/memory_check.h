// Is an access of a kernel to memory allowed? The compiler puts a call before every load and store
// of the kernel (the instrumentation of Linux's KernelAddressSanitizer, whose runtime this is); the
// answer is exact to the byte.
//
// Races are found by when bytes were last touched, not by what order the threads happened to run
// in. Time counts barriers: it advances whenever one lets threads go. Two accesses to a byte by
// different threads, one a write, must have a barrier between them that both threads took part in.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

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

// Who touched a byte last: a time, a thread of the threadgroup that ran then, and for readers
// whether there were several, of one SIMD-group or of more.
struct LastTouch {
  uint32_t write;
  uint32_t read;
};

enum AccessKind { ACCESS_READ, ACCESS_WRITE };

class MemoryCheck {
 public:
  static constexpr uint32_t kMaxTime = (1u << 20) - 1;

  MemoryCheck(const SimulatorDispatch& dispatch, const SimulatorKernel& kernel);
  ~MemoryCheck();
  MemoryCheck(const MemoryCheck&) = delete;
  MemoryCheck& operator=(const MemoryCheck&) = delete;

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
  struct Range {
    uint64_t begin;
    uint64_t end;
  };
  // Bound buffers that overlap are one area.
  struct Area {
    uint64_t begin;
    uint64_t end;
    std::vector<Range> readable;
    std::vector<Range> writable;
    LastTouch* touches;
  };

  void add_buffer(const SimulatorDispatch& dispatch, const SimulatorParameter& parameter);
  void merge_areas();
  Area* find_area(uint64_t address);
  std::string where(uint64_t address) const;
  std::string in_device(
      Area& area, uint64_t address, uint64_t size, AccessKind kind, bool is_atomic);
  std::string in_threadgroup(
      uint64_t address, uint64_t size, AccessKind kind, bool is_aligned_access);
  bool race(LastTouch* touches, uint64_t size, AccessKind kind, bool is_device);
  bool is_ordered(uint32_t touch, bool is_device) const;
  void note_read(LastTouch& touch, bool is_device) const;

  const SimulatorDispatch& dispatch_;
  std::vector<Area> areas_;
  Area* latest_ = nullptr;
  uint64_t threadgroup_begin_ = 0;
  uint64_t threadgroup_end_ = 0;
  std::vector<Range> threadgroup_blocks_;
  std::vector<LastTouch> threadgroup_touches_;
};
