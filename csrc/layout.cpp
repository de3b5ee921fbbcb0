#include "layout.h"

#include <algorithm>
#include <limits>
#include <map>
#include <stdexcept>

namespace flatstep {

namespace {

constexpr size_t kCachedPlans = 8;
constexpr size_t kNone = std::numeric_limits<size_t>::max();

size_t blocks_for(size_t elements) {
  return (elements + kBlock - 1) / kBlock;
}

// FNV-1a.
uint32_t hash_of(const std::string& text) {
  uint32_t hash = 2166136261u;
  for (unsigned char c : text) {
    hash = (hash ^ c) * 16777619u;
  }
  return hash;
}

}  // namespace

mx::Shape BucketPlan::p_shape() const {
  return {static_cast<mx::ShapeElem>(p_blocks), static_cast<mx::ShapeElem>(kBlock)};
}

Layout::Layout(
    const std::vector<std::string>& paths,
    const std::vector<mx::Shape>& shapes,
    const std::vector<mx::Dtype>& dtypes,
    const std::vector<uint32_t>& kinds,
    size_t bucket_bytes) {
  if (paths.size() != shapes.size() || paths.size() != dtypes.size() ||
      paths.size() != kinds.size()) {
    throw std::invalid_argument(
        "[Layout] paths, shapes, dtypes and kinds should have the same length.");
  }
  // One open bucket for each, so that float32 norms among bfloat16 weights don't split them.
  std::map<std::pair<mx::Dtype::Val, uint32_t>, size_t> open_bucket;
  for (size_t i = 0; i < paths.size(); ++i) {
    Leaf leaf{paths[i], shapes[i], dtypes[i], size_of_shape(shapes[i])};
    size_t blocks = blocks_for(leaf.size);
    size_t block_bytes = kBlock * mx::size_of(leaf.dtype);
    size_t& open = open_bucket.try_emplace({leaf.dtype.val(), kinds[i]}, kNone).first->second;
    if (open == kNone || (buckets_[open].blocks + blocks) * block_bytes > bucket_bytes) {
      open = buckets_.size();
      buckets_.push_back(Bucket{leaf.dtype});
    }
    leaf.bucket = open;
    leaf.name = hash_of(leaf.path);
    Bucket& bucket = buckets_[leaf.bucket];
    leaf.offset = bucket.blocks * kBlock;
    bucket.blocks += blocks;
    if (bucket.blocks > static_cast<size_t>(std::numeric_limits<mx::ShapeElem>::max())) {
      throw std::invalid_argument("[Layout] " + leaf.path + " is too large for one array.");
    }
    bucket.leaves.push_back(i);
    leaves_.push_back(std::move(leaf));
  }
  for (Bucket& bucket : buckets_) {
    std::vector<size_t> sizes;
    for (size_t index : bucket.leaves) {
      sizes.push_back(blocks_for(leaves_[index].size));
    }
    bucket.kept = std::make_shared<KeptLeaves>(std::move(sizes));
  }
}

std::shared_ptr<const BucketPlans> Layout::plan(
    const std::vector<size_t>& given, bool recurs, const Groups& groups) const {
  std::lock_guard lock(mutex_);
  if (!recurs) {
    recurs = given.size() == leaves_.size() || given == last_given_;
    last_given_ = given;
  }
  for (const auto& cached : cache_) {
    if (cached.recurs == recurs && cached.groups == groups && cached.given == given) {
      return cached.plans;
    }
  }
  if (cache_.size() == kCachedPlans) {
    cache_.erase(cache_.begin());
  }
  auto plans = std::make_shared<const BucketPlans>(make_plans(given, recurs, groups));
  cache_.push_back({given, recurs, groups, plans});
  return plans;
}

BucketPlans Layout::make_plans(
    const std::vector<size_t>& given, bool recurs, const Groups& groups) const {
  std::vector<size_t> position(leaves_.size(), kNone);
  for (size_t i = 0; i < given.size(); ++i) {
    if (given[i] != kFrozen) {
      position.at(given[i]) = i;
    }
  }
  BucketPlans plans;
  for (size_t b = 0; b < buckets_.size(); ++b) {
    const Bucket& bucket = buckets_[b];
    BucketPlan plan{b, bucket.dtype, bucket.blocks, bucket.kept};
    for (size_t k = 0; k < bucket.leaves.size(); ++k) {
      size_t index = bucket.leaves[k];
      const Leaf& leaf = leaves_[index];
      if (position[index] == kNone) {
        plan.untouched.push_back({leaf.offset, leaf.offset + leaf.size});
        continue;
      }
      plan.segments.push_back(
          {position[index],
           leaf.size,
           plan.p_blocks * kBlock,
           leaf.offset,
           k,
           groups ? groups->at(index) : 0,
           leaf.name});
      plan.p_blocks += blocks_for(leaf.size);
    }
    if (plan.segments.empty()) {
      continue;
    }
    auto of_state = std::make_shared<BucketPlan>(plan);
    of_state->p_blocks = bucket.blocks;
    for (Segment& s : of_state->segments) {
      s.p_offset = s.state_offset;
    }
    plan.of_state = std::move(of_state);
    bool is_part = !plan.untouched.empty() && !recurs;
    std::vector<ViewSpec> views;
    for (const Segment& s : plan.segments) {
      bool is_apart = is_part && keeps_much_else(blocks_for(s.size), plan.p_blocks);
      std::shared_ptr<const std::atomic<bool>> kept(plan.kept, &plan.kept->is_apart(s.leaf));
      const mx::Shape& shape = leaves_[bucket.leaves[s.leaf]].shape;
      views.push_back({shape, s.p_offset, is_apart ? always() : std::move(kept)});
    }
    plan.views = std::make_shared<const std::vector<ViewSpec>>(std::move(views));
    plans.push_back(std::make_shared<const BucketPlan>(std::move(plan)));
  }
  return plans;
}

}  // namespace flatstep
