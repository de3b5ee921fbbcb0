// Where each leaf of a parameter tree lies in flat memory.
//
// A bucket is one flat array; a leaf's segment starts on a 64-element boundary in it. A dimension
// of an MLX array is an int32, so a flat array has the shape (blocks, 64).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kept_leaves.h"
#include "mlx/array.h"
#include "storage.h"
#include "view.h"

namespace flatstep {

inline constexpr size_t kBlock = FLATSTEP_BLOCK;

struct Leaf {
  std::string path;
  mx::Shape shape;
  mx::Dtype dtype;
  size_t size{0};
  size_t bucket{0};
  size_t offset{0};  // in elements, in the bucket's flat arrays
  uint32_t name{0};  // a hash of the path: wherever the leaf lies, it is rounded alike
};

struct Bucket {
  mx::Dtype dtype;
  size_t blocks{0};
  std::vector<size_t> leaves{};
  std::shared_ptr<KeptLeaves> kept{};
};

// A leaf's part in a step. `p_offset` differs from `state_offset` when gradients came for a subset
// of the leaves: parameters are then packed among themselves, the state stays where it is.
struct Segment {
  size_t position;  // in the list of leaves that this step was given
  size_t size;
  size_t p_offset;
  size_t state_offset;
  size_t leaf;     // its number in the bucket
  uint32_t group;  // of parameters, which have hyperparameters in common
  uint32_t name;
};

// The group of each leaf of a layout; null: 0 for all.
using Groups = std::shared_ptr<const std::vector<uint32_t>>;

// In place of a leaf's number: a step is given it, and leaves it as it is.
inline constexpr size_t kFrozen = SIZE_MAX;

struct Range {
  size_t begin;
  size_t end;
};

// What a step does to one bucket.
struct BucketPlan {
  size_t bucket;
  mx::Dtype dtype;
  size_t state_blocks;
  std::shared_ptr<KeptLeaves> kept;
  std::vector<Segment> segments{};  // by rising offsets
  std::vector<Range> untouched{};   // state that this step leaves as it is
  ViewSpecs views{};                // the segments' parameters in the flat array that is written
  size_t p_blocks{0};
  // For arrays that lie as the state does in place of parameters.
  std::shared_ptr<const BucketPlan> of_state{};

  mx::Shape p_shape() const;
};

using BucketPlans = std::vector<std::shared_ptr<const BucketPlan>>;

class Layout {
 public:
  // A bucket takes leaves of one dtype, and of one kind of state, until it holds `bucket_bytes` of
  // parameters.
  Layout(
      const std::vector<std::string>& paths,
      const std::vector<mx::Shape>& shapes,
      const std::vector<mx::Dtype>& dtypes,
      const std::vector<uint32_t>& kinds,
      size_t bucket_bytes);

  const std::vector<Leaf>& leaves() const {
    return leaves_;
  }
  const std::vector<Bucket>& buckets() const {
    return buckets_;
  }

  // The plans for a step that brings gradients for these leaves, in the order given. The last few
  // are kept, since a training loop asks for the same one at every step. `groups` is told from
  // others by its address.
  //
  // A leaf of a part of a bucket would keep the others of this part, although the next step may
  // bring other leaves: small leaves are then apart, unless the part `recurs` or is that of the
  // last call that did not say so.
  std::shared_ptr<const BucketPlans> plan(
      const std::vector<size_t>& given, bool recurs, const Groups& groups = nullptr) const;

 private:
  BucketPlans make_plans(const std::vector<size_t>& given, bool recurs, const Groups& groups) const;

  struct CachedPlan {
    std::vector<size_t> given;
    bool recurs;
    Groups groups;
    std::shared_ptr<const BucketPlans> plans;
  };

  std::vector<Leaf> leaves_;
  std::vector<Bucket> buckets_;
  mutable std::mutex mutex_;
  mutable std::vector<CachedPlan> cache_;
  mutable std::vector<size_t> last_given_;
};

}  // namespace flatstep
