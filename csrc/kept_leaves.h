// Which leaves of a bucket get memory of their own, because somebody keeps a small one: see "What
// may be written in place" in docs/engine.md.
#pragma once

#include <atomic>
#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "mlx/array.h"

namespace flatstep {

namespace mx = mlx::core;

// Whether a view of this part keeps much memory beside its own.
inline bool keeps_much_else(size_t part, size_t whole) {
  return 3 * part < 2 * whole;
}

class KeptLeaves {
 public:
  // Of a bucket whose leaves have these sizes, in blocks.
  explicit KeptLeaves(std::vector<size_t> sizes) : sizes_(std::move(sizes)), apart_(sizes_.size()) {
  }

  // Whether a leaf, by its number in the bucket, gets memory of its own.
  const std::atomic<bool>& is_apart(size_t leaf) const {
    return apart_[leaf];
  }

  // Before each update of the bucket: once nobody holds the memory any more, no leaf is apart.
  void review();

  // The bucket cannot be updated in place in this memory, of `whole` blocks, because somebody holds
  // these leaves; none: because somebody holds the memory, by a slice of a leaf.
  using Memory = std::shared_ptr<mx::array::Data>;
  void suspect(const Memory& memory, const std::vector<size_t>& held, size_t whole);

  // The same where queued work holds the memory at every step, as on a GPU: if somebody else does,
  // it is still there some steps later.
  void watch(const Memory& memory, size_t whole);

 private:
  using WeakMemory = std::weak_ptr<mx::array::Data>;

  // Leaves up to this size, but for those that are most of the memory.
  void set_apart(size_t largest, size_t whole, const WeakMemory& memory);

  std::mutex mutex_;
  std::vector<size_t> sizes_;
  std::vector<std::atomic<bool>> apart_;
  bool has_apart_{false};
  WeakMemory memory_;  // that was held when leaves were last set apart
  std::deque<WeakMemory> watched_;
};

}  // namespace flatstep
