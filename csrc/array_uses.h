// How many owners an array's descriptor and its memory have: what decides whether memory may be
// written in place.
//
// MLX offers only array::is_donatable(), which is never true for an input of a primitive with
// several outputs, because every output holds its own copy of the input list. The descriptor's own
// count says what is needed, but is private. Naming a private member in an explicit template
// instantiation is allowed by the standard ([temp.spec]); this file is the one place that does it.
#pragma once

#include <memory>

#include "mlx/array.h"
#include "mlx/version.h"

#if MLX_VERSION_NUMERIC != 32004
#error "array_uses.h relies on the layout of mlx::core::array in 0.32.4: review it for this version"
#endif

namespace flatstep {

long descriptor_uses(const mlx::core::array& a);

template <auto pointer>
struct ExposeDescriptor {
  friend long descriptor_uses(const mlx::core::array& a) {
    return (a.*pointer).use_count();
  }
};

template struct ExposeDescriptor<&mlx::core::array::array_desc_>;

// Owners of the memory itself: other arrays over it, and queued work that still reads it.
inline long memory_uses(const mlx::core::array& a) {
  return a.data_shared_ptr().use_count();
}

}  // namespace flatstep
