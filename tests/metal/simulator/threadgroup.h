// Runs the threads of one threadgroup after another, each as a fiber, so that barriers and
// SIMD-group functions really meet. A thread runs until it waits or returns; when no thread can
// run, whoever waits for the same thing is let go, and anything else is an error.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"
#include "kernel_side.h"
#include "memory_check.h"

constexpr uint32_t kSimdWidth = 32;
constexpr uint32_t kThreadgroupMemory = 32768;  // what every Apple GPU has
constexpr uint32_t kMaxThreads = 1024;

struct KernelFault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Threadgroup {
 public:
  explicit Threadgroup(const SimulatorDispatch& dispatch);
  ~Threadgroup();
  Threadgroup(const Threadgroup&) = delete;
  Threadgroup& operator=(const Threadgroup&) = delete;

  // A library runs one dispatch at a time.
  static Threadgroup* current;

  // Runs the whole threadgroup at this position of the grid. Throws KernelFault.
  void run(const uint32_t position[3]);

  // What the fibers call. `fail` never returns: the fiber that called it is not resumed.
  void barrier(int scope, int flags, int line);
  uint64_t exchange(uint64_t value, uint32_t size, uint64_t lanes, int line);
  uint64_t variable(int which, uint32_t size, uint32_t alignment);
  void access(
      uint64_t address, uint64_t size, AccessKind kind, bool is_aligned, bool is_atomic, void* pc);
  [[noreturn]] void fail(const std::string& problem);
  bool checks_memory() const {
    return check_ != nullptr;
  }

 private:
  enum State { READY, AT_BARRIER, AT_SIMD_BARRIER, AT_SIMD_FUNCTION, RETURNED };
  struct Thread {
    State state;
    int line;     // of what it waits at
    int flags;    // of the barrier
    char* stack;  // null: not begun, or returned
    void* stack_pointer;
    uint64_t value;  // of a SIMD-group function: where it lies, and where those of all lanes go
    uint64_t lanes;
    uint32_t size;
    uint64_t result;
  };

  static void enter_fiber();
  void start(const uint32_t position[3]);
  void run_fiber();
  void resume(uint32_t id);
  void wait(State state, int line);
  uint32_t run_ready_threads();
  void release(uint32_t num_returned);
  bool release_simdgroup(uint32_t first);
  void exchange_values(uint32_t first, uint32_t end);
  void let_go(uint32_t first, uint32_t end, bool is_simd);
  void leave_time();
  void advance_time();
  SimulatorCall make_call(uint32_t id) const;
  char* place_block(uint32_t size, uint32_t alignment);
  std::string name_thread(uint32_t id) const;

  SimulatorDispatch dispatch_;
  const SimulatorKernel& kernel_;
  std::unique_ptr<MemoryCheck> check_;
  StackPool stacks_;
  std::vector<Thread> threads_;
  std::vector<uint32_t> order_;
  std::vector<uint32_t> simd_barriers_[2];  // by SIMD-group: times for device, threadgroup memory
  std::mt19937 random_;
  void* scheduler_ = nullptr;
  uint32_t running_ = 0;
  bool failed_ = false;
  std::string problem_;

  uint32_t position_[3];
  uint32_t size_[3];    // threads of this threadgroup; less at the grid's edge
  uint32_t groups_[3];  // threadgroups of the grid
  uint32_t threads_in_grid_[3];

  struct alignas(64) Aligned {
    char bytes[64];
  };
  std::vector<Aligned> memory_;
  uint32_t memory_used_ = 0;    // as Metal counts it
  uint32_t memory_placed_ = 0;  // with gaps in between, so that an overrun hits nothing
  std::map<int, uint64_t> variables_;
  uint64_t arguments_[SIMULATOR_NUM_SLOTS] = {};
};
