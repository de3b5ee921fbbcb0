// The scheduler of a threadgroup's fibers. See threadgroup.h.
#include "threadgroup.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>

// The first byte of this library. Set by the linker.
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start;

Threadgroup* Threadgroup::current = nullptr;

namespace {

enum Scope { THREADGROUP_SCOPE = 0, SIMDGROUP_SCOPE = 1 };
enum MemFlags { MEM_DEVICE = 1, MEM_THREADGROUP = 2 };

// Bytes between threadgroup variables.
constexpr uint32_t kGap = 64;

std::string text(uint64_t number) {
  return std::to_string(number);
}

std::string text(const uint32_t position[3]) {
  return "(" + text(position[0]) + ", " + text(position[1]) + ", " + text(position[2]) + ")";
}

}  // namespace

Threadgroup::Threadgroup(const SimulatorDispatch& dispatch)
    : dispatch_(dispatch), kernel_(simulator_kernels[dispatch.kernel]), random_(dispatch.seed) {
  for (int i = 0; i < 3; ++i) {
    uint32_t size = dispatch.threads_per_threadgroup[i];
    uint32_t grid = dispatch.grid[i];
    groups_[i] = dispatch.grid_is_threads ? (grid + size - 1) / size : grid;
    threads_in_grid_[i] = dispatch.grid_is_threads ? grid : grid * size;
  }
  // The last variable that fits may begin anywhere below the limit, behind many gaps.
  memory_.resize(2 * kThreadgroupMemory / sizeof(Aligned));
  if (dispatch.check_memory) {
    check_ = std::make_unique<MemoryCheck>(dispatch_, kernel_);
    check_->set_threadgroup_memory(memory_.data()->bytes, memory_.size() * sizeof(Aligned));
  }
  current = this;
}

Threadgroup::~Threadgroup() {
  current = nullptr;
  for (Thread& thread : threads_) {
    if (thread.stack) {
      stacks_.give_back(thread.stack);
    }
  }
}

void Threadgroup::start(const uint32_t position[3]) {
  uint32_t count = 1;
  for (int i = 0; i < 3; ++i) {
    uint32_t full = dispatch_.threads_per_threadgroup[i];
    position_[i] = position[i];
    size_[i] = std::min(full, threads_in_grid_[i] - position[i] * full);
    count *= size_[i];
  }
  threads_.assign(count, Thread{});
  order_.resize(count);
  std::iota(order_.begin(), order_.end(), 0u);
  if (dispatch_.order == SIMULATOR_REVERSE) {
    std::reverse(order_.begin(), order_.end());
  } else if (dispatch_.order == SIMULATOR_SHUFFLED) {
    std::shuffle(order_.begin(), order_.end(), random_);
  }
  for (auto& times : simd_barriers_) {
    times.assign((count + kSimdWidth - 1) / kSimdWidth, 0);
  }
  if (check_) {
    check_->clear_threadgroup_blocks();
    leave_time();
    advance_time();
    check_->thread.group_start = check_->thread.now;
  }
  // NaNs, so that a read of what nobody wrote shows even where memory is not checked.
  std::memset(memory_.data()->bytes, 0xff, std::max(memory_placed_, kGap));
  memory_used_ = 0;
  memory_placed_ = 0;
  variables_.clear();
  for (int i = 0; i < SIMULATOR_NUM_SLOTS; ++i) {
    uint32_t length = dispatch_.threadgroup_lengths[i];
    arguments_[i] = length ? reinterpret_cast<uint64_t>(place_block(length, 16)) : 0;
  }
}

void Threadgroup::run(const uint32_t position[3]) {
  start(position);
  for (uint32_t num_returned = run_ready_threads(); num_returned < threads_.size();) {
    release(num_returned);
    num_returned += run_ready_threads();
  }
}

// Returns how many threads returned meanwhile.
uint32_t Threadgroup::run_ready_threads() {
  uint32_t num_returned = 0;
  for (uint32_t id : order_) {
    if (threads_[id].state == READY) {
      resume(id);
      num_returned += threads_[id].state == RETURNED;
    }
  }
  return num_returned;
}

void Threadgroup::resume(uint32_t id) {
  Thread& thread = threads_[id];
  running_ = id;
  if (!thread.stack) {
    thread.stack = stacks_.take();
    thread.stack_pointer = first_stack_pointer(thread.stack, enter_fiber);
  }
  if (check_) {
    check_->thread.id = id;
    check_->thread.stack = thread.stack;
    check_->thread.device_simd_barrier = simd_barriers_[0][id / kSimdWidth];
    check_->thread.threadgroup_simd_barrier = simd_barriers_[1][id / kSimdWidth];
  }
  simulator_switch(&scheduler_, thread.stack_pointer);
  if (failed_) {
    throw KernelFault(problem_);
  }
  if (thread.state == RETURNED) {
    stacks_.give_back(thread.stack);
    thread.stack = nullptr;
  }
}

void Threadgroup::enter_fiber() {
  current->run_fiber();
}

void Threadgroup::run_fiber() {
  SimulatorCall call = make_call(running_);
  simulator_enter(dispatch_.kernel, &call);
  wait(RETURNED, 0);
  __builtin_unreachable();
}

// In the order of ATTRIBUTES in translate.py.
SimulatorCall Threadgroup::make_call(uint32_t id) const {
  SimulatorCall call;
  for (int i = 0; i < SIMULATOR_NUM_SLOTS; ++i) {
    call.buffers[i] = reinterpret_cast<uint64_t>(dispatch_.buffers[i].address);
    call.threadgroup[i] = arguments_[i];
  }
  uint32_t count = static_cast<uint32_t>(threads_.size());
  uint32_t inside[3] = {id % size_[0], id / size_[0] % size_[1], id / size_[0] / size_[1]};
  for (int i = 0; i < 3; ++i) {
    uint32_t full = dispatch_.threads_per_threadgroup[i];
    call.positions[0][i] = position_[i] * full + inside[i];
    call.positions[1][i] = inside[i];
    call.positions[2][i] = position_[i];
    call.positions[3][i] = threads_in_grid_[i];
    call.positions[4][i] = size_[i];
    call.positions[5][i] = groups_[i];
    call.positions[6][i] = full;
  }
  call.positions[7][0] = id;
  call.positions[8][0] = id % kSimdWidth;
  call.positions[9][0] = id / kSimdWidth;
  call.positions[10][0] = kSimdWidth;
  call.positions[11][0] = (count + kSimdWidth - 1) / kSimdWidth;
  call.positions[12][0] = kSimdWidth;
  return call;
}

// ---- What a running fiber calls ----

void Threadgroup::wait(State state, int line) {
  Thread& thread = threads_[running_];
  thread.state = state;
  thread.line = line;
  simulator_switch(&thread.stack_pointer, scheduler_);
}

void Threadgroup::barrier(int scope, int flags, int line) {
  threads_[running_].flags = flags;
  wait(scope == SIMDGROUP_SCOPE ? AT_SIMD_BARRIER : AT_BARRIER, line);
}

uint64_t Threadgroup::exchange(uint64_t value, uint32_t size, uint64_t lanes, int line) {
  Thread& thread = threads_[running_];
  thread.value = value;
  thread.size = size;
  thread.lanes = lanes;
  wait(AT_SIMD_FUNCTION, line);
  return threads_[running_].result;
}

uint64_t Threadgroup::variable(int which, uint32_t size, uint32_t alignment) {
  auto [found, is_new] = variables_.try_emplace(which, 0);
  if (is_new) {
    char* block = place_block(size, std::max(alignment, 16u));
    if (!block) {
      fail(
          "threadgroup memory: " + text(memory_used_) + " bytes, more than the " +
          text(kThreadgroupMemory) + " that there are");
    }
    found->second = reinterpret_cast<uint64_t>(block);
  }
  return found->second;
}

// Null if there is not so much memory.
char* Threadgroup::place_block(uint32_t size, uint32_t alignment) {
  auto round_up = [&](uint32_t offset) { return (offset + alignment - 1) / alignment * alignment; };
  memory_used_ = round_up(memory_used_) + size;
  uint32_t offset = round_up(memory_placed_);
  memory_placed_ = offset + size + kGap;
  if (memory_used_ > kThreadgroupMemory || memory_placed_ > memory_.size() * sizeof(Aligned)) {
    memory_placed_ = 0;
    return nullptr;
  }
  char* begin = memory_.data()->bytes + offset;
  std::memset(begin, 0xff, size);
  if (check_) {
    check_->add_threadgroup_block(begin, size);
  }
  return begin;
}

void Threadgroup::access(
    uint64_t address, uint64_t size, AccessKind kind, bool is_aligned, bool is_atomic, void* pc) {
  std::string problem = check_->access(address, size, kind, is_aligned, is_atomic);
  if (!problem.empty()) {
    // Where it happened, for whoever has the library's line table.
    char offset[32];
    std::snprintf(offset, sizeof offset, " [at 0x%tx]", static_cast<char*>(pc) - &__ehdr_start);
    fail(problem + offset);
  }
}

void Threadgroup::fail(const std::string& problem) {
  problem_ = name_thread(running_) + " " + problem;
  failed_ = true;
  void* abandoned;
  simulator_switch(&abandoned, scheduler_);
  __builtin_unreachable();
}

std::string Threadgroup::name_thread(uint32_t id) const {
  uint32_t inside[3] = {id % size_[0], id / size_[0] % size_[1], id / size_[0] / size_[1]};
  return std::string("kernel ") + kernel_.name + ", thread " + text(inside) + " of threadgroup " +
         text(position_) + ":";
}

// ---- Letting go of those that wait ----

void Threadgroup::release(uint32_t num_returned) {
  bool any_simd = false;
  for (uint32_t first = 0; first < threads_.size(); first += kSimdWidth) {
    any_simd |= release_simdgroup(first);
  }
  if (any_simd) {
    return;
  }
  const Thread* waiting = nullptr;
  for (uint32_t id = 0; id < threads_.size(); ++id) {
    const Thread& thread = threads_[id];
    if (thread.state == RETURNED) {
      continue;
    }
    if (waiting && (thread.line != waiting->line || thread.flags != waiting->flags)) {
      throw KernelFault(
          name_thread(id) + " waits at the threadgroup_barrier of line " + text(thread.line) +
          ", others at that of line " + text(waiting->line));
    }
    waiting = &thread;
  }
  if (num_returned) {
    throw KernelFault(
        std::string("kernel ") + kernel_.name + ": " + text(num_returned) + " of " +
        text(threads_.size()) + " threads returned before the threadgroup_barrier of line " +
        text(waiting->line) + ", at which the others wait for them");
  }
  let_go(0, static_cast<uint32_t>(threads_.size()), false);
}

// Whether its threads waited for each other, and no longer do.
bool Threadgroup::release_simdgroup(uint32_t first) {
  uint32_t end = std::min<uint32_t>(first + kSimdWidth, static_cast<uint32_t>(threads_.size()));
  auto waits_for_simdgroup = [](const Thread& thread) {
    return thread.state == AT_SIMD_BARRIER || thread.state == AT_SIMD_FUNCTION;
  };
  auto begin_thread = threads_.begin() + first;
  auto end_thread = threads_.begin() + end;
  auto one = std::find_if(begin_thread, end_thread, waits_for_simdgroup);
  if (one == end_thread) {
    return false;
  }
  bool is_function = one->state == AT_SIMD_FUNCTION;
  for (uint32_t id = first; id < end; ++id) {
    const Thread& other = threads_[id];
    if (other.state != RETURNED && (other.state != one->state || other.line != one->line)) {
      throw KernelFault(
          name_thread(id) + " waits at line " + text(other.line) +
          ", while others of its SIMD-group wait for it in the " +
          (is_function ? "SIMD-group function" : "simdgroup_barrier") + " of line " +
          text(one->line));
    }
  }
  if (is_function) {
    exchange_values(first, end);
  }
  let_go(first, end, true);
  return true;
}

void Threadgroup::exchange_values(uint32_t first, uint32_t end) {
  uint32_t active = 0;
  for (uint32_t id = first; id < end; ++id) {
    active |= threads_[id].state == AT_SIMD_FUNCTION ? 1u << (id - first) : 0u;
  }
  // To each lane the values of all; for those that are not active NaNs.
  for (uint32_t to = first; to < end; ++to) {
    Thread& reader = threads_[to];
    if (reader.state != AT_SIMD_FUNCTION) {
      continue;
    }
    char* lanes = reinterpret_cast<char*>(reader.lanes);
    std::memset(lanes, 0xff, kSimdWidth * reader.size);
    for (uint32_t from = first; from < end; ++from) {
      const Thread& lane = threads_[from];
      if (lane.state == AT_SIMD_FUNCTION) {
        std::memcpy(
            lanes + (from - first) * reader.size,
            reinterpret_cast<const char*>(lane.value),
            reader.size);
      }
    }
    reader.result = active | static_cast<uint64_t>(to - first) << 32;
  }
}

void Threadgroup::let_go(uint32_t first, uint32_t end, bool is_simd) {
  State waited = READY;
  int flags = 0;
  for (uint32_t id = first; id < end; ++id) {
    if (threads_[id].state != RETURNED) {
      waited = threads_[id].state;
      flags = threads_[id].flags;
      threads_[id].state = READY;
    }
  }
  if (!check_ || waited == AT_SIMD_FUNCTION) {
    return;  // a SIMD-group function orders no memory
  }
  advance_time();
  RunningThread& thread = check_->thread;
  if (is_simd) {
    uint32_t simdgroup = first / kSimdWidth;
    simd_barriers_[0][simdgroup] = flags & MEM_DEVICE ? thread.now : simd_barriers_[0][simdgroup];
    simd_barriers_[1][simdgroup] =
        flags & MEM_THREADGROUP ? thread.now : simd_barriers_[1][simdgroup];
  } else {
    thread.device_barrier = flags & MEM_DEVICE ? thread.now : thread.device_barrier;
    thread.threadgroup_barrier = flags & MEM_THREADGROUP ? thread.now : thread.threadgroup_barrier;
  }
}

// Begins time anew when half of it is gone. A race with a threadgroup before that goes unseen.
void Threadgroup::leave_time() {
  if (check_->thread.now > MemoryCheck::kMaxTime / 2) {
    check_->restart_time();
    check_->thread = RunningThread();
  }
}

void Threadgroup::advance_time() {
  if (check_->thread.now == MemoryCheck::kMaxTime) {
    throw KernelFault(std::string("kernel ") + kernel_.name + ": too many barriers to check");
  }
  ++check_->thread.now;
}
