#include "kept_leaves.h"

#include <algorithm>

namespace flatstep {

// More steps than are queued at once.
constexpr size_t kWatched = 8;

void KeptLeaves::review() {
  std::lock_guard lock(mutex_);
  if (has_apart_ && memory_.expired()) {
    has_apart_ = false;
    std::fill(apart_.begin(), apart_.end(), false);
  }
}

void KeptLeaves::suspect(const Memory& memory, const std::vector<size_t>& held, size_t whole) {
  std::lock_guard lock(mutex_);
  size_t part = 0;
  size_t largest = held.empty() ? whole : 0;
  for (size_t leaf : held) {
    part += sizes_[leaf];
    largest = std::max(largest, sizes_[leaf]);
  }
  if (keeps_much_else(part, whole)) {
    set_apart(largest, whole, memory);
  }
}

void KeptLeaves::watch(const Memory& memory, size_t whole) {
  std::lock_guard lock(mutex_);
  watched_.push_back(memory);
  if (watched_.size() > kWatched) {
    if (!watched_.front().expired()) {
      set_apart(whole, whole, watched_.front());
    }
    watched_.pop_front();
  }
}

void KeptLeaves::set_apart(size_t largest, size_t whole, const WeakMemory& memory) {
  memory_ = memory;
  for (size_t leaf = 0; leaf < sizes_.size(); ++leaf) {
    if (sizes_[leaf] <= largest && keeps_much_else(sizes_[leaf], whole)) {
      apart_[leaf] = true;
      has_apart_ = true;
    }
  }
}

}  // namespace flatstep
