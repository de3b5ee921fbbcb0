#include "tree.h"

#include <nanobind/stl/string.h>

#include <sstream>
#include <stdexcept>

#include "mlx/utils.h"
#include "tables.h"

namespace flatstep {

namespace {

std::string python_type_name(nb::handle object) {
  return nb::cast<std::string>(nb::str(nb::type_name(object.type())));
}

bool is_sequence(nb::handle object) {
  return PyList_Check(object.ptr()) || PyTuple_Check(object.ptr());
}

// Where a walk is: the containers from the root down, and in each the item that it has come to. No
// recursion, so that the depth of a tree never meets the end of a thread's stack.
class Walk {
 public:
  void enter(nb::handle container) {
    for (const Level& level : levels_) {
      if (level.container.is(container)) {
        fail("the tree contains itself here");
      }
    }
    if (levels_.size() == kMaxTreeDepth) {
      fail("trees nest at most " + std::to_string(kMaxTreeDepth) + " levels deep, this one more");
    }
    levels_.push_back({nb::borrow(container), nb::object(), 0});
  }

  // The next item of the innermost container; null after the last.
  nb::object next() {
    Level& level = levels_.back();
    if (PyDict_Check(level.container.ptr())) {
      PyObject *key, *value;
      if (PyDict_Next(level.container.ptr(), &level.position, &key, &value)) {
        level.key = nb::borrow(key);
        return nb::borrow(value);
      }
    } else if (level.position < PySequence_Fast_GET_SIZE(level.container.ptr())) {
      return nb::borrow(PySequence_Fast_GET_ITEM(level.container.ptr(), level.position++));
    }
    return nb::object();
  }

  nb::object leave() {
    nb::object container = std::move(levels_.back().container);
    levels_.pop_back();
    return container;
  }

  // What lies in another container where the walk is in its innermost one. Null when nothing does.
  nb::object counterpart(nb::handle container) const {
    const Level& level = levels_.back();
    PyObject* raw = container.ptr();
    if (!level.key.is_valid()) {
      bool is_there = raw != nullptr && is_sequence(container) &&
                      level.position <= PySequence_Fast_GET_SIZE(raw);
      return is_there ? nb::borrow(PySequence_Fast_GET_ITEM(raw, level.position - 1))
                      : nb::object();
    }
    if (raw == nullptr || !PyDict_Check(raw)) {
      return nb::object();
    }
    nb::object item = PyDict_CheckExact(raw)
                          ? nb::borrow(PyDict_GetItemWithError(raw, level.key.ptr()))
                          : nb::steal(PyObject_GetItem(raw, level.key.ptr()));
    if (!item.is_valid() && PyErr_Occurred()) {
      if (!PyErr_ExceptionMatches(PyExc_LookupError)) {
        throw nb::python_error();
      }
      PyErr_Clear();
    }
    return item;
  }

  bool is_done() const {
    return levels_.empty();
  }

  // The key of the item in the innermost container; null in a sequence.
  nb::handle key() const {
    return levels_.back().key;
  }

  [[noreturn]] void fail(const std::string& message) const {
    throw std::invalid_argument(path() + ": " + message);
  }

  [[noreturn]] void fail_type(const std::string& message) const {
    throw nb::type_error((path() + ": " + message).c_str());
  }

 private:
  struct Level {
    nb::object container;
    nb::object key;       // a dict's
    Py_ssize_t position;  // of the item after this one
  };

  // The first and the last keys are enough of a long path.
  static constexpr size_t kPathEnds = 10;

  std::string path() const {
    std::string text;
    for (size_t i = 0; i < levels_.size(); ++i) {
      if (i == kPathEnds && levels_.size() > 2 * kPathEnds) {
        i = levels_.size() - kPathEnds;
        text += ". ... ";
      }
      const Level& level = levels_[i];
      text += i == 0 ? "" : ".";
      text += level.key.is_valid() ? nb::cast<std::string>(nb::str(level.key))
                                   : std::to_string(level.position - 1);
    }
    return text.empty() ? "the tree" : text;
  }

  std::vector<Level> levels_;
};

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

class Collector {
 public:
  Collector(const Layout& layout, bool has_parameters)
      : layout_(layout), array_type_(nb::type<mx::array>()), has_parameters_(has_parameters) {
    result.leaves.reserve(layout.leaves().size());
    result.parameters.reserve(layout.leaves().size());
    result.gradients.reserve(layout.leaves().size());
  }

  void collect(nb::object skeleton, nb::handle gradient, nb::object parameter) {
    visit(std::move(skeleton), gradient, std::move(parameter));
    while (!walk_.is_done()) {
      nb::object child = walk_.next();
      if (child.is_valid()) {
        const Others& others = others_.back();
        visit(walk_.counterpart(others.skeleton), child, walk_.counterpart(others.parameter));
      } else {
        walk_.leave();
        others_.pop_back();
      }
    }
  }

  GivenLeaves result;

 private:
  // What the other trees hold where the gradients have a container. Null where they have nothing:
  // layers without parameters leave empty containers, which need no counterpart.
  struct Others {
    nb::object skeleton;
    nb::object parameter;
  };

  void visit(nb::object skeleton, nb::handle gradient, nb::object parameter) {
    if (gradient.type().is(array_type_)) {
      visit_leaf(skeleton, gradient, parameter);
    } else if (PyDict_Check(gradient.ptr()) || is_sequence(gradient)) {
      if (PyDict_Check(gradient.ptr()) && PyDict_GET_SIZE(gradient.ptr()) > 0 &&
          parameter.is_valid() && !PyDict_Check(parameter.ptr())) {
        walk_.fail("the gradients hold a dict here, the parameters " + python_type_name(parameter));
      }
      walk_.enter(gradient);
      others_.push_back({std::move(skeleton), std::move(parameter)});
    } else {
      refuse_type("gradient", gradient);
    }
  }

  void visit_leaf(nb::handle skeleton, nb::handle gradient, nb::handle parameter) {
    if (!has_parameters_) {
      visit_gradient(skeleton, gradient);
      return;
    }
    if (!parameter.is_valid()) {
      walk_.fail("there is a gradient but no parameter of this name");
    }
    if (!parameter.type().is(array_type_)) {
      refuse_type("parameter", parameter);
    }
    const auto& p = *nb::inst_ptr<mx::array>(parameter);
    const auto& g = *nb::inst_ptr<mx::array>(gradient);
    if (!is_supported(p.dtype())) {
      refuse_dtype("parameter", p.dtype());
    }
    size_t index = number_of(skeleton);
    const Leaf& leaf = layout_.leaves().at(index);
    if (g.shape() != p.shape()) {
      walk_.fail("gradient " + str(g.shape()) + " does not match parameter " + str(p.shape()));
    }
    if (p.shape() != leaf.shape) {
      walk_.fail(
          "parameter " + str(p.shape()) + " does not match the shape " + str(leaf.shape) +
          " that the optimizer was initialised with");
    }
    if (!is_supported(g.dtype())) {
      refuse_dtype("gradient", g.dtype());
    }
    if (p.dtype() != leaf.dtype) {
      // A replay of the trace would write the arrays of another layout into the state, which MLX
      // does without looking. The parameter itself need be no tracer: mx.grad's are not any more.
      if (is_tracing()) {
        walk_.fail(
            "the parameter is " + str(p.dtype()) + " but the optimizer was initialised with " +
            str(leaf.dtype) + "; call optimizer.init(parameters) outside the compiled function");
      }
      result.dtype_changed = true;
    }
    result.leaves.push_back(index);
    result.parameters.push_back(p);
    result.gradients.push_back(g);
  }

  void visit_gradient(nb::handle skeleton, nb::handle gradient) {
    size_t index = number_of(skeleton);
    const Leaf& leaf = layout_.leaves().at(index);
    const auto& g = *nb::inst_ptr<mx::array>(gradient);
    if (g.shape() != leaf.shape) {
      walk_.fail("gradient " + str(g.shape()) + " does not match parameter " + str(leaf.shape));
    }
    if (!is_supported(g.dtype())) {
      refuse_dtype("gradient", g.dtype());
    }
    result.leaves.push_back(index);
    result.gradients.push_back(g);
  }

  // Of a leaf in the layout.
  size_t number_of(nb::handle skeleton) {
    if (!skeleton.is_valid() ||
        (PyDict_Check(skeleton.ptr()) && PyDict_GET_SIZE(skeleton.ptr()) == 0)) {
      walk_.fail(
          "there is no optimizer state for this parameter; call "
          "optimizer.init(model.trainable_parameters()) after adding parameters");
    }
    if (!PyLong_Check(skeleton.ptr())) {
      walk_.fail("the optimizer was initialised with a subtree here, not with an array");
    }
    return PyLong_AsSize_t(skeleton.ptr());
  }

  [[noreturn]] void refuse_type(const char* what, nb::handle found) {
    walk_.fail_type(
        std::string("a ") + what + " should be an mlx.core.array, found " +
        python_type_name(found));
  }

  [[noreturn]] void refuse_dtype(const char* what, mx::Dtype dtype) {
    walk_.fail_type(
        std::string(what) + " has dtype " + str(dtype) +
        "; float32, float16 and bfloat16 are supported");
  }

  const Layout& layout_;
  nb::handle array_type_;
  bool has_parameters_;
  Walk walk_;
  std::vector<Others> others_;
};

// A container of this kind, for its items to be put into.
nb::object empty_like(nb::handle container) {
  if (!PyDict_Check(container.ptr())) {
    return nb::list();
  }
  // A copy has room for all keys; a dict that grows as they come is moved several times.
  return PyDict_CheckExact(container.ptr()) ? nb::steal(PyDict_Copy(container.ptr())) : nb::dict();
}

// What was made in the place of a container, as its type.
nb::object as_type_of(nb::handle container, nb::object made) {
  if (PyDict_Check(container.ptr()) || PyList_CheckExact(container.ptr())) {
    return made;
  }
  nb::handle type = container.type();
  return nb::hasattr(type, "_fields") ? type(*nb::borrow<nb::list>(made)) : type(made);
}

}  // namespace

GivenLeaves collect_leaves(
    const Layout& layout, nb::handle skeleton, nb::handle gradients, nb::handle parameters) {
  Collector collector(layout, parameters.is_valid());
  collector.collect(nb::borrow(skeleton), gradients, nb::borrow(parameters));
  return std::move(collector.result);
}

nb::object rebuild_tree(nb::handle gradients, std::vector<mx::array> values) {
  nb::handle array_type = nb::type<mx::array>();
  size_t next = 0;
  Walk walk;
  std::vector<nb::object> containers;
  nb::object node = nb::borrow(gradients);
  // Each time around: down into a container, or up with what stands in the place of a node.
  for (;;) {
    if (node.is_valid() && !node.type().is(array_type)) {
      walk.enter(node);
      containers.push_back(empty_like(node));
    } else {
      nb::object made;
      if (node.is_valid()) {
        made = nb::cast(std::move(values.at(next++)));
      } else {
        made = as_type_of(walk.leave(), std::move(containers.back()));
        containers.pop_back();
      }
      if (walk.is_done()) {
        return made;
      }
      PyObject* container = containers.back().ptr();
      int failed = walk.key().is_valid() ? PyDict_SetItem(container, walk.key().ptr(), made.ptr())
                                         : PyList_Append(container, made.ptr());
      if (failed) {
        throw nb::python_error();
      }
    }
    node = walk.next();
  }
}

}  // namespace flatstep
