// The stand-ins for Metal's own types.
#include <dlfcn.h>

#include <cstring>
#include <stdexcept>
#include <utility>

#include "Metal/Metal.hpp"
#include "runtime.h"

namespace MTL {

Library::Library(std::string name, const std::string& path)
    : name(std::move(name)), handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
  if (!handle_) {
    throw std::runtime_error(dlerror());
  }
}

Library::~Library() {
  dlclose(handle_);
}

void* Library::symbol(const char* name) const {
  void* found = dlsym(handle_, name);
  if (!found) {
    throw std::runtime_error(dlerror());
  }
  return found;
}

int Library::find(const std::string& name) const {
  auto* num_kernels =
      reinterpret_cast<decltype(&simulator_num_kernels)>(symbol("simulator_num_kernels"));
  auto* kernel_name =
      reinterpret_cast<decltype(&simulator_kernel_name)>(symbol("simulator_kernel_name"));
  for (int kernel = 0; kernel < num_kernels(); ++kernel) {
    if (name == kernel_name(kernel)) {
      return kernel;
    }
  }
  return -1;
}

void ComputeCommandEncoder::bind(Binding binding, size_t index) {
  if (index >= SIMULATOR_NUM_SLOTS) {
    throw std::out_of_range("Metal binds at most 31 buffers");
  }
  if (bindings_.size() <= index) {
    bindings_.resize(index + 1);
  }
  bindings_[index] = std::move(binding);
}

void ComputeCommandEncoder::setBytes(const void* bytes, NS::UInteger length, NS::UInteger index) {
  if (length == 0 || length > 4096) {
    throw std::length_error("setBytes takes 1 to 4096 bytes");
  }
  Binding binding;
  binding.bytes.resize(length);
  std::memcpy(binding.bytes.data(), bytes, length);
  bind(std::move(binding), index);
}

void ComputeCommandEncoder::setThreadgroupMemoryLength(NS::UInteger, NS::UInteger) {
  throw std::logic_error("no kernel here takes threadgroup memory as an argument");
}

void ComputeCommandEncoder::dispatch(Size grid, Size threads_per_group, bool grid_is_threads) {
  commands_.list.push_back(
      {kernel_,
       bindings_,
       grid,
       threads_per_group,
       grid_is_threads,
       std::exchange(barrier_, false)});
}

Commands ComputeCommandEncoder::take() {
  // Nothing that was bound stays: each user of an encoder binds all that it needs.
  bindings_.clear();
  kernel_ = nullptr;
  barrier_ = false;
  return std::exchange(commands_, {});
}

}  // namespace MTL
