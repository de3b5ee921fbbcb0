// The dtypes in which parameters, gradients and state may be stored.
#pragma once

#include "mlx/dtype.h"

namespace flatstep {

inline bool is_supported(mlx::core::Dtype dtype) {
  switch (dtype.val()) {
    case mlx::core::Dtype::Val::float32:
    case mlx::core::Dtype::Val::float16:
    case mlx::core::Dtype::Val::bfloat16:
      return true;
    default:
      return false;
  }
}

}  // namespace flatstep
