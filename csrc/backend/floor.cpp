#include "backend/floor.h"

#include <algorithm>
#include <array>
#include <stdexcept>

#include "backend/thread_pool.h"

namespace flatstep {

namespace mx = mlx::core;

namespace {

// As in an update.
constexpr size_t kGrain = size_t(1) << 12;

template <size_t N>
void add_to(const std::vector<float*>& data, size_t begin, size_t end) {
  const float* g = data[0];
  std::array<float*, N> to;
  std::copy_n(data.begin() + 1, N, to.begin());
  for (size_t i = begin; i < end; ++i) {
    float x = g[i];
    for (float* array : to) {
      array[i] += x;
    }
  }
}

}  // namespace

void floor_pass(mx::array& p, const mx::array& g, std::vector<mx::array>& state) {
  constexpr std::array passes{add_to<1>, add_to<2>, add_to<3>, add_to<4>};
  std::vector<mx::array> arrays{g, p};
  arrays.insert(arrays.end(), state.begin(), state.end());
  std::vector<float*> data;
  for (mx::array& a : arrays) {
    if (a.dtype() != mx::float32 || a.size() != g.size() || !a.flags().row_contiguous) {
      throw std::invalid_argument("[floor_pass] arrays should be contiguous float32 of one size.");
    }
    data.push_back(a.data<float>());
  }
  auto pass = passes.at(state.size());
  parallel_for(g.size(), kGrain, [&](size_t begin, size_t end) { pass(data, begin, end); });
}

}  // namespace flatstep
