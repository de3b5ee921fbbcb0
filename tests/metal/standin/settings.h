// What the tests have set.
#pragma once

#include <string>

namespace flatstep::standin {

struct Settings {
  bool use_gpu{true};
  bool has_pending_gpu{false};
  int late{0};  // in microseconds
  std::string compiler;
  std::string folder;
  int max_threads{1024};
};

Settings& settings();

}  // namespace flatstep::standin
