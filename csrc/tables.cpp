#include "tables.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <sstream>
#include <stdexcept>

#include "mlx/utils.h"
#include "plain_schedule.h"

namespace flatstep {

namespace {

template <typename R>
void prepare(const Hyperparameters& h, float learning_rate, Step step, uint32_t* words) {
  static_assert(sizeof(typename R::Hyperparameters) <= sizeof(Hyperparameters));
  static_assert(sizeof(typename R::Constants) <= FLATSTEP_RULE_WORDS * sizeof(uint32_t));
  static_assert(R::NUM_STATES <= kMaxStates);
  typename R::Hyperparameters own;
  std::memcpy(&own, h.data(), sizeof(own));
  auto constants = R::prepare(own, learning_rate, step);
  std::memcpy(words, &constants, sizeof(constants));
}

// A number whose logarithm is only asked for where it lies in [0, 1).
Number number(double x) {
  double log = std::max(std::log(std::abs(x)), -1e6);
  return {static_cast<float>(x), static_cast<float>(1 - x), split(log)};
}

}  // namespace

void refuse_storage(mx::Dtype dtype) {
  std::ostringstream message;
  message << "[flatstep] no storage for " << dtype << "; there are";
  for (size_t i = 0; i < kNumPlainStorages; ++i) {
    message << " " << kStorages[i].name;
  }
  throw std::invalid_argument(message.str());
}

Storage parameter_storage(mx::Dtype dtype, Rounding rounding) {
  Storage plain = storage_of(dtype);
  if (plain == Storage::Float32) {
    return plain;
  }
  bool is_float16 = plain == Storage::Float16;
  switch (rounding) {
    case Rounding::nearest:
      return plain;
    case Rounding::stochastic:
      return is_float16 ? Storage::StochasticFloat16 : Storage::StochasticBfloat16;
    case Rounding::keep_8_bits:
      return is_float16 ? Storage::Float16And8 : Storage::Bfloat16And8;
    case Rounding::keep_16_bits:
      return is_float16 ? Storage::Float16And16 : Storage::Bfloat16And16;
  }
  return plain;
}

Storage chance_storage(mx::Dtype dtype) {
  return parameter_storage(dtype, Rounding::stochastic);
}

const RuleTraits kRules[kNumRules] = {
#define FLATSTEP_ROW(R, name) \
  {name, #R, R::NAMES, R::NUM_STATES, R::UNSIGNED_STATES, R::READS_STEP != 0, prepare<R>},
    FLATSTEP_RULES(FLATSTEP_ROW)
#undef FLATSTEP_ROW
};

Rule::Rule(const std::string& name, const std::map<std::string, double>& values) {
  auto* found = std::find_if(std::begin(kRules), std::end(kRules), [&](const RuleTraits& rule) {
    return rule.name == name;
  });
  if (found == std::end(kRules)) {
    throw std::invalid_argument("[Rule] there is no rule named " + name + ".");
  }
  index_ = found - kRules;
  groups_ = std::make_shared<const std::vector<ParameterGroup>>(1, ParameterGroup{numbers(values)});
}

Rule Rule::with_group(
    const std::map<std::string, double>& values,
    RateSource source,
    float scale,
    std::shared_ptr<const Schedule> schedule) const {
  auto groups = *groups_;
  groups.push_back({numbers(values), source, scale, std::move(schedule)});
  Rule result = *this;
  result.groups_ = std::make_shared<const std::vector<ParameterGroup>>(std::move(groups));
  return result;
}

Hyperparameters Rule::numbers(const std::map<std::string, double>& values) const {
  const std::string name = traits().name;
  Hyperparameters group{};
  size_t count = 0;
  for (std::string names = traits().names; !names.empty(); ++count) {
    std::string next = names.substr(0, names.find(", "));
    names.erase(0, next.size() + 2);
    auto value = values.find(next);
    if (value == values.end()) {
      throw std::invalid_argument("[Rule] " + name + " needs " + next + ".");
    }
    group.at(count) = number(value->second);
  }
  if (count != values.size()) {
    throw std::invalid_argument("[Rule] " + name + " takes " + traits().names + " and no more.");
  }
  return group;
}

}  // namespace flatstep
