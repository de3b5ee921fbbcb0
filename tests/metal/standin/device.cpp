// The stand-in for MLX's Metal device and command encoder: the methods that metal.cpp calls, of the
// very classes that MLX declares.
//
// Which barriers are put is decided as MLX decides it: by whole buffers, between dispatches of
// which one writes what the other touches, but not between the outputs of one concurrent block.
#include "mlx/backend/metal/device.h"

#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>

#include "settings.h"

namespace mlx::core::metal {

ResidencySets::ResidencySets(MTL::Device* device) : device_(device) {
}

ResidencySets::~ResidencySets() = default;

CommandEncoder::CommandEncoder(Device& device, int, ResidencySets& residency_sets)
    : device_(device), residency_sets_(residency_sets) {
  buffer_ = NS::SharedPtr(std::make_shared<MTL::CommandBuffer>());
}

CommandEncoder::~CommandEncoder() = default;

MTL::ComputeCommandEncoder* CommandEncoder::get_command_encoder() {
  return &buffer_->encoder;
}

void CommandEncoder::set_input_array(const array& a, int index, int64_t offset) {
  auto* buffer = static_cast<MTL::Resource*>(const_cast<void*>(a.buffer().ptr()));
  next_inputs_.insert(buffer);
  needs_barrier_ |= prev_outputs_.count(buffer) > 0;
  size_t before = static_cast<size_t>(a.offset() + offset);
  auto* start = static_cast<char*>(const_cast<array&>(a).buffer().raw_ptr());
  get_command_encoder()->bind({start + before, a.buffer_size() - before, before, {}}, index);
}

void CommandEncoder::set_output_array(array& a, int index, int64_t offset) {
  set_input_array(a, index, offset);
  auto* buffer = static_cast<MTL::Resource*>(a.buffer().ptr());
  if (concurrent_) {
    concurrent_outputs_.insert(buffer);
    return;
  }
  next_outputs_.insert(buffer);
  needs_barrier_ |= prev_inputs_.count(buffer) > 0;
}

void CommandEncoder::add_temporary(array a) {
  get_command_encoder()->keep(a.data_shared_ptr());
}

void CommandEncoder::maybeInsertBarrier() {
  if (needs_barrier_) {
    get_command_encoder()->barrier();
    needs_barrier_ = false;
    prev_inputs_.clear();
    prev_outputs_.clear();
  }
  prev_inputs_.merge(next_inputs_);
  prev_outputs_.merge(next_outputs_);
  next_inputs_.clear();
  next_outputs_.clear();
}

void CommandEncoder::dispatch_threadgroups(MTL::Size grid, MTL::Size group) {
  maybeInsertBarrier();
  get_command_encoder()->dispatch(grid, group, false);
}

void CommandEncoder::dispatch_threads(MTL::Size grid, MTL::Size group) {
  maybeInsertBarrier();
  get_command_encoder()->dispatch(grid, group, true);
}

Device::Device() : residency_sets_(nullptr) {
}

Device::~Device() = default;

namespace {

// The path of the library that the simulator builds from the text.
std::string compile(const std::string& source) {
  static int number = 0;
  const auto& settings = flatstep::standin::settings();
  std::string base =
      settings.folder + "/source" + std::to_string(getpid()) + "_" + std::to_string(number++);
  std::ofstream(base + ".metal") << source;
  std::string command =
      settings.compiler + " " + base + ".metal -o " + base + ".so > " + base + ".log 2>&1";
  if (std::system(command.c_str()) != 0) {
    std::ostringstream log;
    log << std::ifstream(base + ".log").rdbuf();
    throw std::runtime_error(
        "[metal::Device] Unable to build metal library from source\n" + log.str());
  }
  return base + ".so";
}

}  // namespace

MTL::Library* Device::get_library(
    const std::string& name,
    const CompileOptions& options,
    const std::function<std::string()>& build) {
  if (options.math_mode != MathMode::Safe) {
    throw std::invalid_argument("the kernels need safe arithmetic");
  }
  std::unique_lock lock(library_mtx_);
  auto it = library_map_.find(name);
  if (it == library_map_.end()) {
    NS::SharedPtr library(std::make_shared<MTL::Library>(name, compile(build())));
    it = library_map_.emplace(name, library).first;
  }
  return it->second.get();
}

MTL::ComputePipelineState* Device::get_kernel(
    const std::string& name,
    MTL::Library* library,
    const std::string&,
    const MTLFCList& constants,
    const std::vector<MTL::Function*>&) {
  if (!constants.empty()) {
    throw std::invalid_argument("no kernel here has function constants");
  }
  std::unique_lock lock(kernel_mtx_);
  auto& kernels = library_kernels_[library];
  auto it = kernels.find(name);
  if (it == kernels.end()) {
    int number = library->find(name);
    if (number < 0) {
      throw std::runtime_error("[metal::Device] Unable to load kernel " + name);
    }
    NS::SharedPtr kernel(std::make_shared<MTL::ComputePipelineState>(library, number, name));
    it = kernels.emplace(name, kernel).first;
  }
  return it->second.get();
}

Device& device(mlx::core::Device) {
  static auto* instance = new Device();
  return *instance;
}

CommandEncoder& get_command_encoder(Stream stream) {
  static std::mutex mutex;
  static auto* encoders = new std::map<int, std::unique_ptr<CommandEncoder>>();
  std::lock_guard lock(mutex);
  auto& encoder = (*encoders)[stream.index];
  if (!encoder) {
    auto& d = device(stream.device);
    encoder = std::make_unique<CommandEncoder>(d, stream.index, d.residency_sets());
  }
  return *encoder;
}

}  // namespace mlx::core::metal
