// The tables of rules and of storages as the host sees them, and a rule with its hyperparameters.
#pragma once

#include <array>
#include <cstddef>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "mlx/dtype.h"
#include "pass.h"
#include "rules.h"
#include "schedule.h"
#include "storage.h"

namespace flatstep {

namespace mx = mlx::core;

// ---- Storages ----

#define FLATSTEP_PARAMETER_STORAGES(STORAGE) \
  FLATSTEP_STORAGES(STORAGE)                 \
  FLATSTEP_STOCHASTIC_STORAGES(STORAGE)      \
  FLATSTEP_SPLIT_STORAGES(STORAGE)
#define FLATSTEP_ALL_STORAGES(STORAGE) \
  FLATSTEP_PARAMETER_STORAGES(STORAGE) \
  FLATSTEP_CODE_STORAGES(STORAGE)

enum class Storage : uint32_t {
#define FLATSTEP_NAME(Type, dtype) Type,
  FLATSTEP_ALL_STORAGES(FLATSTEP_NAME)
#undef FLATSTEP_NAME
      count
};
inline constexpr auto kNumStorages = static_cast<size_t>(Storage::count);
// Those of any array come first, then the others of parameters.
#define FLATSTEP_COUNT(Type, dtype) +1
inline constexpr size_t kNumPlainStorages = 0 FLATSTEP_STORAGES(FLATSTEP_COUNT);
inline constexpr size_t kNumParameterStorages = 0 FLATSTEP_PARAMETER_STORAGES(FLATSTEP_COUNT);
#undef FLATSTEP_COUNT

// What a storage is made of: values, values with a rest, or blocks of codes.
template <typename S>
concept IsSplit = requires { typename S::Rest; };
template <typename S>
concept IsCodes = requires { S::scale_of(0); };

struct StorageTraits {
  mx::Dtype dtype;
  const char* name;    // as MLX's dtype
  const char* type;    // of its struct in storage.h
  size_t block_bytes;  // of a block of values
  size_t rest_bytes;   // of what lies beside that in an array of its own
  bool is_codes;       // which lie in blocks
};

template <typename S>
constexpr StorageTraits make_traits(mx::Dtype dtype, const char* name, const char* type) {
  if constexpr (IsCodes<S>) {
    return {dtype, name, type, sizeof(typename S::Block), 0, true};
  } else {
    size_t rest_bytes = 0;
    if constexpr (IsSplit<S>) {
      rest_bytes = sizeof(typename S::Block);
    }
    return {dtype, name, type, FLATSTEP_BLOCK * sizeof(typename S::Stored), rest_bytes, false};
  }
}

inline constexpr StorageTraits kStorages[kNumStorages] = {
#define FLATSTEP_ROW(Type, dtype) make_traits<Type>(mx::dtype, #dtype, #Type),
    FLATSTEP_ALL_STORAGES(FLATSTEP_ROW)
#undef FLATSTEP_ROW
};

inline constexpr const StorageTraits& traits_of(Storage storage) {
  return kStorages[static_cast<size_t>(storage)];
}

inline constexpr bool is_plain(Storage storage) {
  return static_cast<size_t>(storage) < kNumPlainStorages;
}

// Storage::count for a dtype that no plain one is for.
inline Storage find_storage(mx::Dtype dtype) {
  size_t i = 0;
  while (i < kNumPlainStorages && kStorages[i].dtype != dtype) {
    ++i;
  }
  return i < kNumPlainStorages ? static_cast<Storage>(i) : Storage::count;
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

// How an optimizer rounds half-precision parameters: what is cut off may be kept beside them.
enum class Rounding : uint8_t { nearest, stochastic, keep_8_bits, keep_16_bits };

// Of parameters of a dtype, which is one of the plain ones.
Storage parameter_storage(mx::Dtype dtype, Rounding rounding);

// Of codes of a state's values.
inline Storage code_storage(bool has_sign) {
  return has_sign ? Storage::SignedCodes : Storage::UnsignedCodes;
}

// Of what adds up over steps: rounded by chance where bits are few.
Storage chance_storage(mx::Dtype dtype);

// ---- Rules ----

// Of a rule's state arrays.
inline constexpr size_t kMaxStates = 3;
// With what lies beside parameters, their average, and the sum of gradients.
inline constexpr size_t kMaxStateArrays = kMaxStates + 3;
inline constexpr size_t kMaxHyperparameters = 8;

using Hyperparameters = std::array<Number, kMaxHyperparameters>;

struct RuleTraits {
  const char* name;
  const char* type;   // the name of its struct in rules.h
  const char* names;  // of the hyperparameters, in their order: "beta1, beta2"
  size_t num_states;
  uint32_t unsigned_states;  // a bit for each
  bool reads_step;
  // Writes FLATSTEP_RULE_WORDS words at most.
  void (*prepare)(const Hyperparameters& h, float learning_rate, Step step, uint32_t* words);
};

inline constexpr size_t kNumRules = 0
#define FLATSTEP_COUNT(Type, name) +1
    FLATSTEP_RULES(FLATSTEP_COUNT)
#undef FLATSTEP_COUNT
    ;
extern const RuleTraits kRules[kNumRules];

// A group of parameters: what a user has set for it.
struct ParameterGroup {
  Hyperparameters hyperparameters{};
  RateSource source{RATE_OF_ALL};
  float scale{1.0f};
  std::shared_ptr<const Schedule> schedule{};
};

// A rule with what a user has set, for each group of parameters.
class Rule {
 public:
  // One group. Throws std::invalid_argument for a name that is not there or one too many.
  Rule(const std::string& name, const std::map<std::string, double>& values);

  // The same with one more group.
  Rule with_group(
      const std::map<std::string, double>& values,
      RateSource source,
      float scale,
      std::shared_ptr<const Schedule> schedule) const;

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
  // Whether values of state number k may be below zero.
  bool has_sign(size_t k) const {
    return (traits().unsigned_states >> k & 1) == 0;
  }
  const std::vector<ParameterGroup>& groups() const {
    return *groups_;
  }

 private:
  // Of the hyperparameters that this rule has.
  Hyperparameters numbers(const std::map<std::string, double>& values) const;

  size_t index_{0};
  std::shared_ptr<const std::vector<ParameterGroup>> groups_;
};

}  // namespace flatstep
