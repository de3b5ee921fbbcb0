// Which instruction set's loops run.
#include <atomic>
#include <stdexcept>

#include "backend/cpu_loops.h"

namespace flatstep {

namespace {

std::vector<const CpuLoops*> available() {
  std::vector<const CpuLoops*> loops{&baseline_loops};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    loops.push_back(&avx2_loops);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      loops.push_back(&avx512_loops);
    }
  }
#endif
  return loops;
}

std::atomic<const CpuLoops*> chosen{available().back()};

}  // namespace

const CpuLoops& cpu_loops() {
  return *chosen.load();
}

std::vector<std::string> available_cpu_loops() {
  std::vector<std::string> names;
  for (const CpuLoops* loops : available()) {
    names.push_back(loops->name);
  }
  return names;
}

void set_cpu_loops(const std::string& name) {
  for (const CpuLoops* loops : available()) {
    if (name == loops->name) {
      chosen = loops;
      return;
    }
  }
  throw std::invalid_argument("[set_cpu_loops] " + name + " is not available on this processor.");
}

}  // namespace flatstep
