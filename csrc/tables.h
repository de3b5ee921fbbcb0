// The tables of rules and of storages as the host sees them, and a rule with its hyperparameters.
#pragma once

#include <array>
#include <cstddef>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "mlx/dtype.h"
#include "rules.h"
#include "storage.h"

namespace flatstep {

namespace mx = mlx::core;

// ---- Storages ----

enum class Storage : uint32_t {
#define FLATSTEP_NAME(Type, dtype) dtype,
  FLATSTEP_STORAGES(FLATSTEP_NAME)
#undef FLATSTEP_NAME
      count
};
inline constexpr auto kNumStorages = static_cast<size_t>(Storage::count);

struct StorageTraits {
  mx::Dtype::Val dtype;
  const char* name;  // as MLX's dtype
  const char* type;  // of its struct in storage.h
  size_t bytes;      // of one value
};

inline constexpr StorageTraits kStorages[kNumStorages] = {
#define FLATSTEP_ROW(Type, dtype) {mx::Dtype::Val::dtype, #dtype, #Type, sizeof(Type::Stored)},
    FLATSTEP_STORAGES(FLATSTEP_ROW)
#undef FLATSTEP_ROW
};

inline constexpr const StorageTraits& traits_of(Storage storage) {
  return kStorages[static_cast<size_t>(storage)];
}

// Storage::count for a dtype that none is for.
inline Storage find_storage(mx::Dtype dtype) {
  size_t i = 0;
  while (i < kNumStorages && kStorages[i].dtype != dtype.val()) {
    ++i;
  }
  return static_cast<Storage>(i);
}

inline bool is_supported(mx::Dtype dtype) {
  return find_storage(dtype) != Storage::count;
}

[[noreturn]] void refuse_storage(mx::Dtype dtype);

// Throws std::invalid_argument for a dtype that none is for.
inline Storage storage_of(mx::Dtype dtype) {
  Storage found = find_storage(dtype);
  if (found == Storage::count) {
    refuse_storage(dtype);
  }
  return found;
}

// ---- Rules ----

inline constexpr size_t kMaxStates = 4;
inline constexpr size_t kMaxHyperparameters = 8;

using Hyperparameters = std::array<Number, kMaxHyperparameters>;
struct alignas(16) Constants {
  std::byte bytes[64];
};

struct RuleTraits {
  const char* name;
  const char* type;   // the name of its struct in rules.h
  const char* names;  // of the hyperparameters, in their order: "beta1, beta2"
  size_t num_states;
  bool reads_step;
  void (*prepare)(const Hyperparameters& h, float learning_rate, Step step, Constants& out);
};

inline constexpr size_t kNumRules = 0
#define FLATSTEP_COUNT(Type, name) +1
    FLATSTEP_RULES(FLATSTEP_COUNT)
#undef FLATSTEP_COUNT
    ;
extern const RuleTraits kRules[kNumRules];

// A rule with what a user has set, for each group of parameters.
class Rule {
 public:
  // One group. Throws std::invalid_argument for a name that is not there or one too many.
  Rule(const std::string& name, const std::map<std::string, double>& values);

  const RuleTraits& traits() const {
    return kRules[index_];
  }
  // Its number in the table.
  size_t index() const {
    return index_;
  }
  size_t num_states() const {
    return traits().num_states;
  }
  const std::vector<Hyperparameters>& groups() const {
    return *groups_;
  }

 private:
  size_t index_{0};
  std::shared_ptr<const std::vector<Hyperparameters>> groups_;
};

}  // namespace flatstep
