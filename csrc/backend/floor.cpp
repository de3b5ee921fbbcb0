#include "backend/floor.h"

#include <stdexcept>

#include "backend/thread_pool.h"

namespace flatstep {

namespace mx = mlx::core;

// As in an update.
constexpr size_t kGrain = size_t(1) << 12;

void floor_pass(mx::array& p, const mx::array& g, std::vector<mx::array>& state) {
  size_t n = p.size();
  for (const mx::array* a : {static_cast<const mx::array*>(&p), &g}) {
    if (a->dtype() != mx::float32 || a->size() != n || !a->flags().row_contiguous) {
      throw std::invalid_argument("[floor_pass] arrays should be contiguous float32 of one size.");
    }
  }
  std::vector<float*> slots;
  for (auto& slot : state) {
    if (slot.dtype() != mx::float32 || slot.size() != n || !slot.flags().row_contiguous) {
      throw std::invalid_argument("[floor_pass] arrays should be contiguous float32 of one size.");
    }
    slots.push_back(slot.data<float>());
  }
  float* p_data = p.data<float>();
  const float* g_data = g.data<float>();
  parallel_for(n, kGrain, [&](size_t begin, size_t end) {
    if (slots.size() == 2) {
      float* m = slots[0];
      float* v = slots[1];
      for (size_t i = begin; i < end; ++i) {
        float x = g_data[i];
        p_data[i] += x;
        m[i] += x;
        v[i] += x;
      }
    } else if (slots.size() == 1) {
      float* v = slots[0];
      for (size_t i = begin; i < end; ++i) {
        float x = g_data[i];
        p_data[i] += x;
        v[i] += x;
      }
    } else {
      for (size_t i = begin; i < end; ++i) {
        p_data[i] += g_data[i];
      }
    }
  });
}

}  // namespace flatstep
