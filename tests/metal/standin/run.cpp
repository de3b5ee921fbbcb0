// Runs what was encoded, and keeps what the tests ask for.
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "mlx/scheduler.h"
#include "mlx/stream.h"
#include "runtime.h"
#include "settings.h"
#include "standin.h"

namespace flatstep::standin {

namespace {

// Checking each access is slow: large dispatches, which do as small ones do, go without.
constexpr size_t kMaxCheckedGroups = 100;

struct Records {
  std::mutex mutex;
  std::string log;
  std::string error;
  std::string taken_log;
  std::string taken_error;
};

Records& records() {
  static auto* instance = new Records();
  return *instance;
}

void record_error(const std::string& message) {
  auto& r = records();
  std::lock_guard lock(r.mutex);
  if (r.error.empty()) {
    r.error = message;
  }
}

void record(const MTL::Command& command) {
  auto& r = records();
  std::lock_guard lock(r.mutex);
  r.log += command.kernel->library->name + "; groups=" + std::to_string(command.grid.width) +
           " threads=" + std::to_string(command.threads_per_group.width) +
           " barrier=" + (command.after_barrier ? "1" : "0") + "\n";
}

// Memory as a GPU has it, where every buffer starts on a page; MLX's CPU allocator aligns to 8
// bytes.
class PageAlignedCopies {
 public:
  ~PageAlignedCopies() {
    for (auto& [start, copy] : copies_) {
      std::memcpy(start, copy.data.get(), copy.size);
    }
  }

  // Where what is bound lies in the copy of its buffer.
  char* address(const MTL::Binding& binding) {
    char* start = binding.address - binding.before;
    Copy& copy = copies_[start];
    if (!copy.data) {
      copy.size = binding.before + binding.size;
      copy.data.reset(
          static_cast<char*>(std::aligned_alloc(4096, (copy.size + 4095) / 4096 * 4096)));
      std::memcpy(copy.data.get(), start, copy.size);
    }
    return copy.data.get() + binding.before;
  }

 private:
  struct Free {
    void operator()(char* p) const {
      std::free(p);
    }
  };
  struct Copy {
    std::unique_ptr<char, Free> data;
    size_t size{0};
  };
  std::map<char*, Copy> copies_;
};

void run_one(const MTL::Command& command, uint32_t seed) {
  SimulatorDispatch dispatch{};
  dispatch.kernel = command.kernel->kernel;
  dispatch.grid_is_threads = command.grid_is_threads;
  const MTL::Size* sizes[] = {&command.grid, &command.threads_per_group};
  uint32_t* targets[] = {dispatch.grid, dispatch.threads_per_threadgroup};
  for (int k = 0; k < 2; ++k) {
    targets[k][0] = static_cast<uint32_t>(sizes[k]->width);
    targets[k][1] = static_cast<uint32_t>(sizes[k]->height);
    targets[k][2] = static_cast<uint32_t>(sizes[k]->depth);
  }
  PageAlignedCopies copies;
  for (size_t i = 0; i < command.bindings.size(); ++i) {
    const MTL::Binding& binding = command.bindings[i];
    SimulatorBuffer& buffer = dispatch.buffers[i];
    if (binding.bytes.empty()) {
      buffer.address = copies.address(binding);
      buffer.size = binding.size;
      buffer.before = binding.before;
    } else {
      buffer.address = const_cast<char*>(binding.bytes.data());
      buffer.size = binding.bytes.size();
    }
  }
  dispatch.order = SIMULATOR_SHUFFLED;
  dispatch.seed = seed;
  dispatch.check_memory = command.grid.width <= kMaxCheckedGroups;
  const MTL::Library& library = *command.kernel->library;
  auto* run = reinterpret_cast<decltype(&simulator_run)>(library.symbol("simulator_run"));
  auto* error = reinterpret_cast<decltype(&simulator_error)>(library.symbol("simulator_error"));
  if (run(&dispatch) != 0) {
    record_error(command.kernel->name + ": " + error());
  }
}

}  // namespace

Settings& settings() {
  static auto* instance = new Settings();
  return *instance;
}

void run(const MTL::Commands& commands) {
  static std::mutex mutex;
  static std::mt19937 random(7);
  std::lock_guard lock(mutex);
  std::vector<const MTL::Command*> block;
  auto run_block = [&] {
    std::shuffle(block.begin(), block.end(), random);
    for (const auto* command : block) {
      run_one(*command, random());
    }
    block.clear();
  };
  for (const auto& command : commands.list) {
    record(command);
    if (command.after_barrier) {
      run_block();
    }
    block.push_back(&command);
  }
  run_block();
}

}  // namespace flatstep::standin

NS::UInteger MTL::ComputePipelineState::maxTotalThreadsPerThreadgroup() const {
  return flatstep::standin::settings().max_threads;
}

using flatstep::standin::records;
using flatstep::standin::settings;

void standin_use_gpu(int use) {
  settings().use_gpu = use != 0;
}

int standin_hold_stream(int hold) {
  static std::mutex mutex;
  static std::condition_variable released;
  static bool is_held = false;
  static bool was_too_long = false;
  std::lock_guard lock(mutex);
  settings().has_pending_gpu = hold != 0;
  is_held = hold != 0;
  if (is_held) {
    was_too_long = false;
    namespace mx = mlx::core;
    mx::scheduler::enqueue(mx::default_stream(mx::Device::cpu), [] {
      std::unique_lock lock(mutex);
      was_too_long = !released.wait_for(lock, std::chrono::seconds(10), [] { return !is_held; });
    });
  }
  released.notify_all();
  return was_too_long;
}

void standin_let_go_late(int microseconds) {
  settings().late = microseconds;
}

void standin_set_compiler(const char* command, const char* folder) {
  settings().compiler = command;
  settings().folder = folder;
}

void standin_set_max_threads(int most) {
  settings().max_threads = most;
}

const char* standin_take_log() {
  auto& r = records();
  std::lock_guard lock(r.mutex);
  r.taken_log = std::exchange(r.log, {});
  return r.taken_log.c_str();
}

const char* standin_take_error() {
  auto& r = records();
  std::lock_guard lock(r.mutex);
  r.taken_error = std::exchange(r.error, {});
  return r.taken_error.c_str();
}
