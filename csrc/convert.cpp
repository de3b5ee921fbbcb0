#include "convert.h"

#include <stdexcept>

#include "allocate.h"
#include "backend/cpu_loops.h"
#include "layout.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"

namespace flatstep {

namespace {

constexpr auto kCpu = mx::Device::cpu;

mx::Shape in_blocks(const mx::array& a, size_t columns) {
  return {a.shape(0), static_cast<mx::ShapeElem>(columns)};
}

// Shapes and dtypes of what the storage holds.
struct Form {
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;

  Form(Storage storage, const mx::array& like) {
    const StorageTraits& traits = traits_of(storage);
    add(in_blocks(like, traits.block_bytes / traits.dtype.size()), traits.dtype);
    if (traits.rest_bytes > 0) {
      add(in_blocks(like, traits.rest_bytes), mx::uint8);
    }
  }

 private:
  void add(mx::Shape shape, mx::Dtype dtype) {
    shapes.push_back(std::move(shape));
    dtypes.push_back(dtype);
  }
};

void check(const mx::array& a, const mx::Shape& shape, mx::Dtype dtype) {
  if (a.shape() != shape || a.dtype() != dtype) {
    throw std::invalid_argument("[flatstep] an array of blocks has another shape or dtype.");
  }
}

}  // namespace

mx::array load_blocks(Storage storage, std::vector<mx::array> stored) {
  if (stored.empty() || stored[0].ndim() != 2) {
    throw std::invalid_argument("[flatstep] blocks should be rows.");
  }
  Form form(storage, stored[0]);
  if (form.shapes.size() != stored.size()) {
    throw std::invalid_argument("[flatstep] the storage has another number of arrays.");
  }
  for (size_t i = 0; i < stored.size(); ++i) {
    check(stored[i], form.shapes[i], form.dtypes[i]);
    stored[i] = mx::contiguous(stored[i], false, kCpu);
  }
  mx::Shape shape = in_blocks(stored[0], kBlock);
  auto node = std::make_shared<Convert>(
      mx::default_stream(kCpu), std::vector<mx::Shape>{shape}, storage, /* is_load */ true);
  return mx::array(shape, mx::float32, node, std::move(stored));
}

std::vector<mx::array> store_blocks(Storage storage, const mx::array& values) {
  if (values.ndim() != 2) {
    throw std::invalid_argument("[flatstep] blocks should be rows.");
  }
  check(values, in_blocks(values, kBlock), mx::float32);
  Form form(storage, values);
  auto node = std::make_shared<Convert>(
      mx::default_stream(kCpu), form.shapes, storage, /* is_load */ false);
  return mx::array::make_arrays(
      form.shapes, form.dtypes, node, {mx::contiguous(values, false, kCpu)});
}

void Convert::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  allocate_all(outputs);
  // Keeps all that it works on until it has run.
  mx::cpu::get_command_encoder(stream()).dispatch(
      [inputs, outputs, number = static_cast<size_t>(storage_), is_load = is_load_]() mutable {
        const auto& whole = is_load ? outputs : inputs;
        const auto& stored = is_load ? inputs : outputs;
        auto* floats = const_cast<float*>(whole[0].data<float>());
        auto* first = const_cast<char*>(stored[0].data<char>());
        auto* rests = stored.size() > 1 ? const_cast<char*>(stored[1].data<char>()) : nullptr;
        if (is_load) {
          cpu_loops().load[number](first, rests, floats, whole[0].size());
        } else {
          cpu_loops().store[number](floats, first, rests, whole[0].size(), rounding_key(0, 0, 0));
        }
      });
}

void Convert::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
  throw std::runtime_error("[flatstep] storages are converted on the CPU.");
}

}  // namespace flatstep
