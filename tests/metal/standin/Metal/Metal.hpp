// Stands in for Apple's metal-cpp, so that csrc/backend/metal.cpp compiles on Linux against MLX's
// own declarations of its Metal device: the few types that those name. What is encoded is recorded,
// and run with the kernels that tests/metal/simulator compiles.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace NS {

using UInteger = std::uintptr_t;

class AutoreleasePool {};

template <typename T>
class SharedPtr {
 public:
  SharedPtr() = default;
  explicit SharedPtr(std::shared_ptr<T> pointer) : pointer_(std::move(pointer)) {
  }
  T* get() const {
    return pointer_.get();
  }
  T* operator->() const {
    return pointer_.get();
  }
  explicit operator bool() const {
    return pointer_ != nullptr;
  }

 private:
  std::shared_ptr<T> pointer_;
};

}  // namespace NS

namespace MTL {

enum class DataType {};

struct Size {
  Size(NS::UInteger w, NS::UInteger h, NS::UInteger d) : width(w), height(h), depth(d) {
  }
  NS::UInteger width;
  NS::UInteger height;
  NS::UInteger depth;
};

class Resource {};
class Buffer : public Resource {};
class Allocation;
class CommandQueue;
class Device;
class Fence;
class Function;
class LinkedFunctions;
class ResidencySet;

// Kernels that were compiled from one text.
class Library {
 public:
  // Loads what the simulator built.
  Library(std::string name, const std::string& path);
  ~Library();
  Library(const Library&) = delete;

  // The number of the kernel with this name; -1 if there is none.
  int find(const std::string& name) const;
  void* symbol(const char* name) const;

  const std::string name;

 private:
  void* handle_;
};

class ComputePipelineState {
 public:
  ComputePipelineState(const Library* library, int kernel, std::string name)
      : library(library), kernel(kernel), name(std::move(name)) {
  }
  NS::UInteger maxTotalThreadsPerThreadgroup() const;

  const Library* library;
  int kernel;
  std::string name;
};

// What a kernel finds at one of its indices.
struct Binding {
  char* address{nullptr};
  size_t size{0};           // what there is from the address on
  size_t before{0};         // and what there is before it
  std::vector<char> bytes;  // instead of an address: constants that were copied
};

struct Command {
  const ComputePipelineState* kernel;
  std::vector<Binding> bindings;
  Size grid;
  Size threads_per_group;
  bool grid_is_threads;
  bool after_barrier;
};

// Commands in their order, and what has to live until they have run.
struct Commands {
  std::vector<Command> list;
  std::vector<std::shared_ptr<void>> kept;
};

class ComputeCommandEncoder {
 public:
  void setComputePipelineState(ComputePipelineState* kernel) {
    kernel_ = kernel;
  }
  void setBytes(const void* bytes, NS::UInteger length, NS::UInteger index);
  void setThreadgroupMemoryLength(NS::UInteger length, NS::UInteger index);
  void bind(Binding binding, size_t index);
  void barrier() {
    barrier_ = true;
  }
  void dispatch(Size grid, Size threads_per_group, bool grid_is_threads);

  void keep(std::shared_ptr<void> memory) {
    commands_.kept.push_back(std::move(memory));
  }

  // What was encoded since the last call.
  Commands take();

 private:
  ComputePipelineState* kernel_{nullptr};
  std::vector<Binding> bindings_;
  Commands commands_;
  bool barrier_{false};
};

class CommandBuffer {
 public:
  ComputeCommandEncoder encoder;
};

}  // namespace MTL
