// The CPU backend: a step of one bucket as one task on MLX's stream, shared among threads. A task
// also does what the next ones would, as far as that is ready: threads then wait for each other
// once for many buckets.
//
// The task walks the bucket in parts that fit in the first-level cache. Float32 is read and written
// where it lies, and so are a parameter and its gradient in one plain storage; what is stored
// otherwise goes through float32 scratch, and what is not contiguous through a panel.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <optional>

#include "backend/backend.h"
#include "backend/cpu_arrays.h"
#include "backend/thread_pool.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/stream.h"

namespace flatstep {

namespace {

constexpr size_t kMinGrain = 64;  // in blocks of a bucket
// Where each array has its own pass over a part: small enough that the processor overlaps them.
constexpr size_t kCodedElements = 512;

struct State {
  State(const mx::array& a, mx::array& written, Storage storage, Extent extent)
      : in(a, storage, extent),
        out(written, storage, extent, a.data_shared_ptr() == written.data_shared_ptr()) {
  }

  Input in;
  Output out;
};

// All that a task needs. MLX keeps the memory of the node's inputs until it has run.
struct Job {
  Job(FusedUpdate& update,
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs,
      bool p_in_place)
      : held(update.operands().held()),
        plan(update.plan_ptr()),
        rule(update.rule()),
        schedule(update.schedule()),
        seed(update.seed()),
        p_out(outputs[0], update.p_storage(), extent_of(update.p_storage()), p_in_place),
        stream(update.stream()),
        constants(rule.groups().size()) {
    const Operands& operands = update.operands();
    auto operand = [&](Operand which) { return operands.get(which, inputs); };
    // The leaves, or the parts of a flat array, that the segments name.
    auto add_inputs = [&](std::vector<Input>& to,
                          const mx::array* arrays,
                          bool is_flat,
                          std::optional<Storage> stored_as = {}) {
      to.reserve(plan->segments.size());
      for (const Segment& segment : plan->segments) {
        const mx::array& a = is_flat ? *arrays : *arrays++;
        Storage storage = stored_as ? *stored_as : storage_of(a.dtype());
        to.emplace_back(a, storage, extent_of(storage), is_flat ? segment.p_offset : 0);
      }
    };
    if (operands.has(Operand::step)) {
      step = operand(Operand::step)->data<uint64_t>();
    }
    if (operands.has(Operand::learning_rate)) {
      learning_rate = operand(Operand::learning_rate)->data<float>();
    }
    add_inputs(
        parameters, operand(Operand::parameters), update.has_flat_parameters(), p_out.storage);
    add_inputs(gradients, operand(Operand::gradients), update.has_flat_gradients());
    for (size_t k = 0; k < update.num_states(); ++k) {
      const mx::array& in = *operand(state_operand(k));
      Storage storage = update.state_storage(k, in);
      states.emplace_back(in, outputs[1 + k], storage, extent_of(storage));
      has_codes |= traits_of(storage).is_codes;
    }
    if (size_t k = update.num_states(); k < update.num_state_arrays()) {
      Extent extent = extent_of_rests(p_out.storage);
      rests.emplace(*operand(state_operand(k)), outputs[1 + k], Storage::count, extent);
    }
  }

  // What a part of a segment ends at: this many elements from its start, or all.
  size_t unit() const {
    return has_codes || rests ? kBlock : 1;
  }
  bool is_in_place() const {
    auto in_place = [](const State& state) { return state.out.in_place; };
    return p_out.in_place && std::all_of(states.begin(), states.end(), in_place) &&
           (!rests || rests->out.in_place);
  }

  std::shared_ptr<const std::vector<mx::array>> held;
  std::shared_ptr<const BucketPlan> plan;
  Rule rule;
  std::shared_ptr<const Schedule> schedule;
  const CpuLoops& loops{cpu_loops()};
  const uint64_t* step{nullptr};        // null when nothing depends on it
  const float* learning_rate{nullptr};  // null with a schedule
  std::vector<Input> parameters;
  std::vector<Input> gradients;
  std::vector<State> states;
  std::optional<State> rests;  // of the parameters
  bool has_codes{false};
  uint32_t seed;
  Output p_out;
  mx::Stream stream;
  // The next job that the same thread queued on the stream, where that is ready: all that it reads
  // was there when its graph was built, and it writes that memory. Its task is queued behind this
  // one's, so it outlives this one's.
  std::atomic<Job*> next{nullptr};
  // For the stream's thread:
  std::vector<Constants> constants;  // of each group
  Step now{0};                       // steps taken so far
  bool has_run{false};
  size_t start{0};  // its first block, counted through the jobs that are done at once
};

// One thread's update of a part of a segment.
class SegmentUpdate {
 public:
  // The part ends before element `end`.
  SegmentUpdate(const Job& job, size_t index, size_t end)
      : job_(job),
        segment_(job.plan->segments[index]),
        g_storage_(job.gradients[index].storage),
        storage_(job.p_out.storage),
        gradient_(job.gradients[index], end, 0),
        parameter_(job.parameters[index], end, 1) {
    for (size_t k = 0; k < job.states.size(); ++k) {
      states_[k].emplace(job.states[k].in, segment_.state_offset + end, 2 + k);
    }
    if (traits_of(g_storage_).dtype != traits_of(storage_).dtype) {
      g_storage_ = storage_ = Storage::Float32;
    }
    if (job.has_codes || !is_plain(job.p_out.storage)) {
      for (uint32_t k = 0; k <= job.states.size(); ++k) {
        starts_[k] = start_of(job.seed, segment_.name, k);
      }
    }
  }

  // Updates elements [begin, end) of the segment.
  void run(size_t begin, size_t end) {
    for (size_t i = begin, n = 0; i < end; i += n) {
      n = length_of_part(i, end - i);
      size_t state_at = segment_.state_offset + i;
      BlockArrays a{};
      if (job_.rests) {
        a.rests_in = job_.rests->in.at(state_at);
        a.rests_out = job_.rests->out.at(state_at);
      }
      a.g = gradient_.exactly(n, i, g_storage_, loops_, nullptr, g_);
      a.p_in = parameter_.exactly(n, i, storage_, loops_, a.rests_in, p_);
      a.p_out = job_.p_out.target(segment_.p_offset + i, p_, storage_);
      for (size_t k = 0; k < job_.states.size(); ++k) {
        a.state_in[k] = static_cast<const float*>(
            states_[k]->exactly(n, state_at, Storage::Float32, loops_, nullptr, state_[k]));
        a.state_out[k] = job_.states[k].out.floats(state_at, state_[k]);
      }
      auto update = loops_.update[job_.rule.index()][static_cast<size_t>(storage_)];
      RoundingKey key = key_of(0, i);
      update(job_.constants[segment_.group], a, n, key);
      job_.p_out.store(loops_, segment_.p_offset + i, n, p_, storage_, key, a.rests_out);
      for (size_t k = 0; k < job_.states.size(); ++k) {
        key = key_of(1 + k, i);
        job_.states[k].out.store(loops_, state_at, n, state_[k], Storage::Float32, key);
      }
    }
  }

 private:
  // As many elements from `i` on as can be had at once of each array, in whole units.
  size_t length_of_part(size_t i, size_t left) {
    size_t n = std::min(job_.has_codes ? kCodedElements : kBlockElements, left);
    gradient_.limit(i, n);
    parameter_.limit(i, n);
    for (size_t k = 0; k < job_.states.size(); ++k) {
      states_[k]->limit(segment_.state_offset + i, n);
    }
    size_t unit = std::min(job_.unit(), left);
    return n == left ? n : std::max(n / unit * unit, unit);
  }

  // Of an element of the parameter, array 0, or of state number `array - 1`.
  RoundingKey key_of(size_t array, size_t i) const {
    return rounding_key(starts_[array], job_.now, i);
  }

  const Job& job_;
  const CpuLoops& loops_{job_.loops};
  const Segment& segment_;
  Storage g_storage_;  // in which the loop takes the gradient, and below the parameter
  Storage storage_;
  std::array<uint32_t, 1 + kMaxStates> starts_{};  // of the keys, where there are any
  Walk gradient_;
  Walk parameter_;
  std::array<std::optional<Walk>, kMaxStates> states_;
  alignas(64) Scratch p_;
  alignas(64) Scratch g_;
  alignas(64) Scratch state_[kMaxStates];
};

// Updates elements [begin, end) of the segment with this index in the plan: from front to back, or
// panel by panel where the gradient lies across long rows. A unit belongs to the panel in which it
// begins.
void update_segment(const Job& job, size_t index, size_t begin, size_t end) {
  SegmentUpdate update(job, index, end);
  size_t length = job.gradients[index].scattered_row();
  if (length <= kPanelColumns) {
    update.run(begin, end);
    return;
  }
  auto first_unit = [unit = job.unit()](size_t i) { return (i + unit - 1) / unit * unit; };
  size_t last_row = (end - 1) / length + 1;
  for (size_t first_row = begin / length; first_row < last_row; first_row += kPanelRows) {
    size_t end_row = std::min(first_row + kPanelRows, last_row);
    for (size_t column = 0; column < length; column += kPanelColumns) {
      size_t end_column = std::min(column + kPanelColumns, length);
      for (size_t row = first_row; row < end_row; ++row) {
        update.run(
            std::max(begin, first_unit(row * length + column)),
            std::min(end, first_unit(row * length + end_column)));
      }
    }
  }
}

// What fresh memory needs besides the update: the state of leaves that this step brings no gradient
// for, and zeros between leaves. These are never read, but users can reach them.
void fill_fresh(const Job& job) {
  const BucketPlan& plan = *job.plan;
  auto clear_gap = [](const Output& out, size_t end_of_leaf) {
    out.clear(end_of_leaf, (end_of_leaf + kBlock - 1) / kBlock * kBlock);
  };
  if (!job.p_out.in_place) {
    for (const Segment& segment : plan.segments) {
      clear_gap(job.p_out, segment.p_offset + segment.size);
    }
  }
  auto fill = [&](const State& state) {
    if (state.out.in_place) {
      return;
    }
    for (const Segment& segment : plan.segments) {
      clear_gap(state.out, segment.state_offset + segment.size);
    }
    // A single parameter's state may be longer than the parameter.
    state.out.clear(plan.state_blocks * kBlock, SIZE_MAX);
    for (const Range& range : plan.untouched) {
      Walk walk(state.in, range.end, 0);
      for (size_t i = range.begin, n = 0; i < range.end; i += n) {
        n = std::min(kBlockElements, range.end - i);
        const char* from = walk.raw(i, n);
        std::memcpy(state.out.at(i), from, state.out.extent.bytes(n));
      }
      clear_gap(state.out, range.end);
    }
  };
  std::for_each(job.states.begin(), job.states.end(), fill);
  if (job.rests) {
    fill(*job.rests);
  }
}

// Updates blocks [begin, end) of the bucket.
void update_blocks(const Job& job, size_t begin_block, size_t end_block) {
  const auto& segments = job.plan->segments;
  size_t begin = begin_block * kBlock;
  size_t end = end_block * kBlock;
  auto segment = std::upper_bound(
      segments.begin(), segments.end(), begin, [](size_t offset, const Segment& s) {
        return offset < s.p_offset;
      });
  // A leaf of size 0 has the offset of the one that follows it.
  for (--segment; segment != segments.end() && segment->p_offset < end; ++segment) {
    size_t first = begin > segment->p_offset ? begin - segment->p_offset : 0;
    size_t last = std::min(segment->size, end - segment->p_offset);
    if (first < last) {
      update_segment(job, segment - segments.begin(), first, last);
    }
  }
}

// What comes before the update of a bucket's elements.
void prepare(Job& job) {
  job.now = job.step ? *job.step : 0;
  float learning_rate = job.schedule ? schedule_value(*job.schedule, job.now) : *job.learning_rate;
  const auto& groups = job.rule.groups();
  for (size_t k = 0; k < groups.size(); ++k) {
    job.rule.traits().prepare(groups[k], learning_rate, job.now, job.constants[k]);
  }
  fill_fresh(job);
}

// Does this job and all that follow it, unless an earlier task has done so already. Needs no
// memory: what has begun cannot fail.
void run(Job& first) {
  if (first.has_run) {
    return;
  }
  size_t total = 0;
  size_t longest_row = 0;
  Job* last = nullptr;
  for (Job* job = &first; job != nullptr; job = job->next) {
    job->has_run = true;
    prepare(*job);
    job->start = total;
    total += job->plan->p_blocks;
    for (const Input& gradient : job->gradients) {
      longest_row = std::max(longest_row, gradient.scattered_row());
    }
    last = job;
  }
  // A thread takes enough to find whole panels, but no more than its share.
  size_t share = (total + num_threads() - 1) / num_threads();
  size_t grain = std::max(kMinGrain, std::min(longest_row * kPanelRows / kBlock, share));
  parallel_for(total, grain, [&first, last](size_t begin, size_t end) {
    for (Job* job = &first;; job = job->next) {
      size_t job_end = job->start + job->plan->p_blocks;
      size_t from = std::max(begin, job->start);
      size_t to = std::min(end, job_end);
      if (from < to) {
        update_blocks(*job, from - job->start, to - job->start);
      }
      if (job == last || job_end >= end) {
        return;
      }
    }
  });
}

}  // namespace

void cpu_fused_update(
    FusedUpdate& update, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  // Work that is still queued holds the buffers that it reads, the backward pass's reads of the
  // weights above all. Waiting for it costs little: this step needs its gradients anyway.
  bool p_in_place = update.place_outputs(inputs, outputs, [&] {
    if (may_wait_for_queue()) {
      mx::synchronize(update.stream());
    }
  });
  auto job = std::make_shared<Job>(update, inputs, outputs, p_in_place);
  mx::cpu::get_command_encoder(job->stream).dispatch([job] { run(*job); });
  // An earlier task of the stream may do it as well, if it is ready. What is held was there when
  // the graph was built; an input may be an output of what is still queued, which MLX does not
  // tell. And fresh memory may have been that of an output which was dropped before its task has
  // written it.
  bool is_ready = inputs.empty() && job->is_in_place();
  thread_local std::weak_ptr<Job> last;
  auto before = last.lock();
  if (is_ready && before && before->stream == job->stream) {
    before->next = job.get();
  }
  last = job;
}

}  // namespace flatstep
