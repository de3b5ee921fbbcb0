// The C interface of runtime.h: what is in the library, and a dispatch with everything that Metal's
// validation layer would say about its arguments.
#include "runtime.h"

#include <algorithm>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "threadgroup.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace {

std::mutex one_dispatch_at_a_time;

std::string& last_error() {
  static thread_local std::string error;
  return error;
}

// Subnormal operands and results count as zero while one lives.
class FlushToZero {
 public:
  explicit FlushToZero(bool on) {
#if defined(__x86_64__)
    saved_ = _mm_getcsr();
    _mm_setcsr((saved_ & ~0x8040u) | (on ? 0x8040u : 0));
#elif defined(__aarch64__)
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    uint64_t wanted = (saved_ & ~(1ull << 24)) | (on ? 1ull << 24 : 0);
    asm volatile("msr fpcr, %0" : : "r"(wanted));
#endif
  }
  ~FlushToZero() {
#if defined(__x86_64__)
    _mm_setcsr(static_cast<unsigned>(saved_));
#elif defined(__aarch64__)
    asm volatile("msr fpcr, %0" : : "r"(saved_));
#endif
  }

 private:
  uint64_t saved_ = 0;
};

std::string text(uint64_t number) {
  return std::to_string(number);
}

void check_parameter(const SimulatorDispatch& dispatch, const SimulatorParameter& parameter) {
  std::string index = text(static_cast<uint64_t>(parameter.index));
  if (parameter.kind == SIMULATOR_THREADGROUP) {
    if (dispatch.threadgroup_lengths[parameter.index] == 0) {
      throw KernelFault("threadgroup memory " + index + " has no length");
    }
    return;
  }
  if (parameter.kind != SIMULATOR_BUFFER) {
    return;
  }
  const SimulatorBuffer& buffer = dispatch.buffers[parameter.index];
  if (!buffer.address) {
    throw KernelFault("buffer " + index + " is not bound");
  }
  if (parameter.is_reference && buffer.size < parameter.size) {
    throw KernelFault(
        "buffer " + index + " has " + text(buffer.size) + " bytes, and the kernel takes a " +
        "reference to " + text(parameter.size));
  }
  if (reinterpret_cast<uint64_t>(buffer.address) % parameter.alignment != 0) {
    throw KernelFault(
        "buffer " + index + " is not aligned to the " + text(parameter.alignment) +
        " bytes that its type needs");
  }
}

void check_dispatch(const SimulatorDispatch& dispatch) {
  uint64_t threads = 1;
  for (uint32_t size : dispatch.threads_per_threadgroup) {
    threads *= size;
  }
  if (threads == 0 || threads > kMaxThreads) {
    throw KernelFault(
        "a threadgroup has 1 to " + text(kMaxThreads) + " threads, not " + text(threads));
  }
  uint64_t threadgroup_memory = 0;
  for (uint32_t length : dispatch.threadgroup_lengths) {
    if (length % 16 != 0) {
      throw KernelFault("a threadgroup memory length of " + text(length) + " is no multiple of 16");
    }
    threadgroup_memory += length;
  }
  if (threadgroup_memory > kThreadgroupMemory) {
    throw KernelFault(
        "threadgroup memory: " + text(threadgroup_memory) + " bytes, more than the " +
        text(kThreadgroupMemory) + " that there are");
  }
  const SimulatorKernel& kernel = simulator_kernels[dispatch.kernel];
  for (int i = 0; i < kernel.num_parameters; ++i) {
    check_parameter(dispatch, kernel.parameters[i]);
  }
}

void run_grid(const SimulatorDispatch& dispatch) {
  uint64_t groups[3];
  for (int i = 0; i < 3; ++i) {
    uint64_t size = dispatch.grid_is_threads ? dispatch.threads_per_threadgroup[i] : 1;
    groups[i] = (dispatch.grid[i] + size - 1) / size;
  }
  std::vector<uint32_t> order(groups[0] * groups[1] * groups[2]);
  std::iota(order.begin(), order.end(), 0u);
  if (dispatch.order == SIMULATOR_REVERSE) {
    std::reverse(order.begin(), order.end());
  } else if (dispatch.order == SIMULATOR_SHUFFLED) {
    std::shuffle(order.begin(), order.end(), std::mt19937(dispatch.seed));
  }
  Threadgroup threadgroup(dispatch);
  FlushToZero mode(dispatch.flush_to_zero != 0);
  for (uint32_t i : order) {
    const uint32_t position[3] = {
        static_cast<uint32_t>(i % groups[0]),
        static_cast<uint32_t>(i / groups[0] % groups[1]),
        static_cast<uint32_t>(i / groups[0] / groups[1])};
    threadgroup.run(position);
  }
}

bool is_kernel(int kernel) {
  return kernel >= 0 && kernel < simulator_kernel_count;
}

}  // namespace

#pragma GCC visibility push(default)

int simulator_abi(void) {
  return SIMULATOR_ABI;
}

int simulator_num_kernels(void) {
  return simulator_kernel_count;
}

const char* simulator_kernel_name(int kernel) {
  return is_kernel(kernel) ? simulator_kernels[kernel].name : nullptr;
}

int simulator_num_parameters(int kernel) {
  return is_kernel(kernel) ? simulator_kernels[kernel].num_parameters : 0;
}

const SimulatorParameter* simulator_parameter(int kernel, int parameter) {
  if (parameter < 0 || parameter >= simulator_num_parameters(kernel)) {
    return nullptr;
  }
  return &simulator_kernels[kernel].parameters[parameter];
}

const char* simulator_error(void) {
  return last_error().c_str();
}

int simulator_run(const SimulatorDispatch* dispatch) {
  try {
    if (!is_kernel(dispatch->kernel)) {
      throw KernelFault("there is no kernel of this number");
    }
    std::lock_guard<std::mutex> lock(one_dispatch_at_a_time);
    try {
      check_dispatch(*dispatch);
    } catch (const KernelFault& fault) {
      throw KernelFault(
          std::string("kernel ") + simulator_kernels[dispatch->kernel].name + ": " + fault.what());
    }
    run_grid(*dispatch);
    return 0;
  } catch (const std::exception& error) {
    last_error() = error.what();
    return 1;
  }
}

#pragma GCC visibility pop
