#include "tree.h"

#include <nanobind/stl/string.h>

#include <sstream>
#include <stdexcept>

#include "dtypes.h"
#include "fused_update.h"
#include "mlx/utils.h"

namespace flatstep {

namespace {

// The path from the root to where a walk is. Kept as a chain on the stack: no work unless there is
// an error to report.
struct Path {
  const Path* parent;
  nb::handle key;
  Py_ssize_t index;

  std::string str() const {
    std::string own = key.is_valid() ? nb::cast<std::string>(nb::str(key)) : std::to_string(index);
    return parent ? parent->str() + "." + own : own;
  }
};

std::string name_of(const Path* path) {
  return path ? path->str() : std::string("the tree");
}

std::string python_type_name(nb::handle object) {
  return nb::cast<std::string>(nb::str(nb::type_name(object.type())));
}

[[noreturn]] void fail(const Path* path, const std::string& message) {
  throw std::invalid_argument(name_of(path) + ": " + message);
}

std::string str(const mx::Shape& shape) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < shape.size(); ++i) {
    text << (i ? ", " : "") << shape[i];
  }
  text << (shape.size() == 1 ? ",)" : ")");
  return text.str();
}

std::string str(mx::Dtype dtype) {
  std::ostringstream text;
  text << dtype;
  return text.str();
}

// Null when there is no such item.
nb::object item_of(nb::handle container, nb::handle key) {
  if (PyDict_CheckExact(container.ptr())) {
    return nb::borrow(PyDict_GetItemWithError(container.ptr(), key.ptr()));
  }
  PyObject* item = PyObject_GetItem(container.ptr(), key.ptr());
  if (item == nullptr) {
    PyErr_Clear();
  }
  return nb::steal(item);
}

nb::object item_of(nb::handle container, Py_ssize_t index) {
  PyObject* raw = container.ptr();
  if (PyList_Check(raw)) {
    return nb::borrow(index < PyList_GET_SIZE(raw) ? PyList_GET_ITEM(raw, index) : nullptr);
  }
  if (PyTuple_Check(raw)) {
    return nb::borrow(index < PyTuple_GET_SIZE(raw) ? PyTuple_GET_ITEM(raw, index) : nullptr);
  }
  return nb::object();
}

bool is_sequence(nb::handle object) {
  return PyList_Check(object.ptr()) || PyTuple_Check(object.ptr());
}

Py_ssize_t length_of(nb::handle sequence) {
  return PyList_Check(sequence.ptr()) ? PyList_GET_SIZE(sequence.ptr())
                                      : PyTuple_GET_SIZE(sequence.ptr());
}

// Parameterless layers leave empty containers, which need no counterpart in the other trees.
bool has_leaves(nb::handle tree) {
  if (PyDict_Check(tree.ptr())) {
    for (auto [key, value] : nb::borrow<nb::dict>(tree)) {
      if (has_leaves(value)) {
        return true;
      }
    }
    return false;
  }
  if (is_sequence(tree)) {
    for (Py_ssize_t i = 0; i < length_of(tree); ++i) {
      if (has_leaves(item_of(tree, i))) {
        return true;
      }
    }
    return false;
  }
  return true;
}

class Collector {
 public:
  explicit Collector(const Layout& layout) : layout_(layout), array_type_(nb::type<mx::array>()) {
    result.leaves.reserve(layout.leaves().size());
    result.parameters.reserve(layout.leaves().size());
    result.gradients.reserve(layout.leaves().size());
  }

  void visit(nb::handle skeleton, nb::handle gradient, nb::handle parameter, const Path* path) {
    if (gradient.type().is(array_type_)) {
      visit_leaf(skeleton, gradient, parameter, path);
    } else if (PyDict_Check(gradient.ptr())) {
      if (nb::len(nb::borrow<nb::dict>(gradient)) > 0 && !PyDict_Check(parameter.ptr())) {
        fail(path, "the gradients hold a dict here, the parameters " + python_type_name(parameter));
      }
      PyObject *key, *value;
      Py_ssize_t position = 0;
      while (PyDict_Next(gradient.ptr(), &position, &key, &value)) {
        Path here{path, key, 0};
        visit_child(
            PyDict_Check(skeleton.ptr()) ? item_of(skeleton, nb::handle(key)) : nb::object(),
            value,
            item_of(parameter, nb::handle(key)),
            &here);
      }
    } else if (is_sequence(gradient)) {
      for (Py_ssize_t i = 0; i < length_of(gradient); ++i) {
        Path here{path, nb::handle(), i};
        nb::object value = item_of(gradient, i);
        visit_child(item_of(skeleton, i), value, item_of(parameter, i), &here);
      }
    } else {
      throw nb::type_error((name_of(path) + ": a gradient should be an mlx.core.array, found " +
                            python_type_name(gradient))
                               .c_str());
    }
  }

  GivenLeaves result;

 private:
  void visit_child(
      const nb::object& skeleton,
      nb::handle gradient,
      const nb::object& parameter,
      const Path* path) {
    if (parameter.is_valid() && skeleton.is_valid()) {
      visit(skeleton, gradient, parameter, path);
    } else if (has_leaves(gradient)) {
      if (!parameter.is_valid()) {
        fail(path, "there is a gradient but no parameter of this name");
      }
      fail(
          path,
          "there is no optimizer state for this parameter; call "
          "optimizer.init(model.trainable_parameters()) after adding parameters");
    }
  }

  void visit_leaf(
      nb::handle skeleton, nb::handle gradient, nb::handle parameter, const Path* path) {
    if (!parameter.type().is(array_type_)) {
      throw nb::type_error((name_of(path) + ": a parameter should be an mlx.core.array, found " +
                            python_type_name(parameter))
                               .c_str());
    }
    if (!PyLong_Check(skeleton.ptr())) {
      fail(path, "the optimizer was initialised with a subtree here, not with an array");
    }
    size_t index = PyLong_AsSize_t(skeleton.ptr());
    const Leaf& leaf = layout_.leaves().at(index);
    const auto& p = *nb::inst_ptr<mx::array>(parameter);
    const auto& g = *nb::inst_ptr<mx::array>(gradient);
    if (g.shape() != p.shape()) {
      fail(path, "gradient " + str(g.shape()) + " does not match parameter " + str(p.shape()));
    }
    if (p.shape() != leaf.shape) {
      fail(
          path,
          "parameter " + str(p.shape()) + " does not match the shape " + str(leaf.shape) +
              " that the optimizer was initialised with");
    }
    check_dtype("parameter", p.dtype(), path);
    check_dtype("gradient", g.dtype(), path);
    if (p.dtype() != leaf.dtype) {
      // A replay of the trace would write the arrays of another layout into the state, which MLX
      // does without looking. The parameter itself need be no tracer: mx.grad's are not any more.
      if (is_tracing()) {
        fail(
            path,
            "the parameter is " + str(p.dtype()) + " but the optimizer was initialised with " +
                str(leaf.dtype) +
                "; call optimizer.init(parameters) outside the compiled function");
      }
      result.dtype_changed = true;
    }
    result.leaves.push_back(index);
    result.parameters.push_back(p);
    result.gradients.push_back(g);
  }

  void check_dtype(const char* what, mx::Dtype dtype, const Path* path) {
    if (!is_supported(dtype)) {
      throw nb::type_error((name_of(path) + ": " + what + " has dtype " + str(dtype) +
                            "; float32, float16 and bfloat16 are supported")
                               .c_str());
    }
  }

  const Layout& layout_;
  nb::handle array_type_;
};

class Rebuilder {
 public:
  explicit Rebuilder(std::vector<mx::array> values)
      : values_(std::move(values)), array_type_(nb::type<mx::array>()) {
  }

  nb::object visit(nb::handle tree) {
    if (tree.type().is(array_type_)) {
      return nb::cast(std::move(values_.at(next_++)));
    }
    if (PyDict_Check(tree.ptr())) {
      // A copy has room for all keys; a dict that grows as they come is moved several times.
      nb::object result = PyDict_CheckExact(tree.ptr()) ? nb::steal(PyDict_Copy(tree.ptr()))
                                                        : nb::object(nb::dict());
      PyObject *key, *value;
      Py_ssize_t position = 0;
      while (PyDict_Next(tree.ptr(), &position, &key, &value)) {
        if (PyDict_SetItem(result.ptr(), key, visit(value).ptr()) != 0) {
          throw nb::python_error();
        }
      }
      return result;
    }
    nb::list items;
    for (Py_ssize_t i = 0; i < length_of(tree); ++i) {
      items.append(visit(item_of(tree, i)));
    }
    if (PyList_CheckExact(tree.ptr())) {
      return items;
    }
    nb::handle type = tree.type();
    return nb::hasattr(type, "_fields") ? type(*items) : type(items);
  }

 private:
  std::vector<mx::array> values_;
  size_t next_{0};
  nb::handle array_type_;
};

}  // namespace

GivenLeaves collect_leaves(
    const Layout& layout, nb::handle skeleton, nb::handle gradients, nb::handle parameters) {
  Collector collector(layout);
  collector.visit(skeleton, gradients, parameters, nullptr);
  return std::move(collector.result);
}

nb::object rebuild_tree(nb::handle gradients, std::vector<mx::array> values) {
  return Rebuilder(std::move(values)).visit(gradients);
}

}  // namespace flatstep
