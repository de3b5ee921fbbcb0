// Python trees of arrays: from a tree to the leaves of a layout, and back.
//
// A skeleton is the tree that the layout was made from with each leaf replaced by its number. Walks
// are in C++ because they visit every tensor at every step.
#pragma once

#include <nanobind/nanobind.h>

#include <vector>

#include "layout.h"

namespace flatstep {

namespace nb = nanobind;

// How many containers may lie in one another, here and in Python. MLX's own functions recurse, and
// reach some 200 to 600.
inline constexpr size_t kMaxTreeDepth = 1000;

// The leaves that a step was given, in the order of the gradient tree.
struct GivenLeaves {
  std::vector<size_t> leaves;
  std::vector<mx::array> parameters;
  std::vector<mx::array> gradients;
  bool dtype_changed{false};  // a parameter's dtype is not the one that the layout was made for
};

// Pairs gradients with their parameters and their numbers; without `parameters` they are by
// themselves. Throws std::invalid_argument or
// nb::type_error naming the path of what does not fit.
GivenLeaves collect_leaves(
    const Layout& layout, nb::handle skeleton, nb::handle gradients, nb::handle parameters);

// A tree of the structure of `gradients` with its leaves replaced by `values` in order. Dicts come
// back as dict, lists and tuples as their own type.
nb::object rebuild_tree(nb::handle gradients, std::vector<mx::array> values);

}  // namespace flatstep
