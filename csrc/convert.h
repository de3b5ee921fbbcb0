// Arrays in another storage: what is kept in blocks as float32, and the other way round. Not what a
// step does; on the CPU, wherever the step runs.
#pragma once

#include <vector>

#include "tables.h"
#include "update_primitive.h"

namespace flatstep {

// Values of shape (blocks, 64) in float32, from arrays in this storage: what is stored and, of a
// split one, the rests. Throws std::invalid_argument.
mx::array load_blocks(Storage storage, std::vector<mx::array> stored);

// The arrays that hold these values, rounded by keys that are always the same. Throws
// std::invalid_argument.
std::vector<mx::array> store_blocks(Storage storage, const mx::array& values);

class Convert : public UpdatePrimitive {
 public:
  Convert(mx::Stream stream, std::vector<mx::Shape> shapes, Storage storage, bool is_load)
      : UpdatePrimitive(stream, std::move(shapes)), storage_(storage), is_load_(is_load) {
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;

  DEFINE_NAME(FlatstepConvert)

 private:
  Storage storage_;
  bool is_load_;
};

}  // namespace flatstep
