// The CPU backend: a step of one bucket as one task on MLX's stream, shared among threads. A task
// also does what the next ones would, as far as that is ready: threads then wait for each other
// once for many buckets.
//
// The task walks the bucket in blocks that fit in the first-level cache. Float32 is read and
// written where it lies, and so are a parameter and its gradient in one storage; what is stored
// otherwise goes through a block of float32 scratch, and what is not contiguous through a panel.
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

struct State {
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
        p_out(outputs[0], p_in_place),
        stream(update.stream()),
        constants(rule.groups().size()) {
    const Operands& operands = update.operands();
    auto operand = [&](Operand which) { return operands.get(which, inputs); };
    // The leaves, or the parts of a flat array, that the segments name.
    auto add_inputs = [&](std::vector<Input>& to, const mx::array* arrays, bool is_flat) {
      to.reserve(plan->segments.size());
      for (const Segment& segment : plan->segments) {
        to.emplace_back(is_flat ? *arrays : *arrays++, is_flat ? segment.p_offset : 0);
      }
    };
    if (operands.has(Operand::step)) {
      step = operand(Operand::step)->data<uint64_t>();
    }
    if (operands.has(Operand::learning_rate)) {
      learning_rate = operand(Operand::learning_rate)->data<float>();
    }
    add_inputs(parameters, operand(Operand::parameters), update.has_flat_parameters());
    add_inputs(gradients, operand(Operand::gradients), update.has_flat_gradients());
    for (size_t k = 0; k < update.num_states(); ++k) {
      const mx::array& in = *operand(state_operand(k));
      mx::array& out = outputs[1 + k];
      bool in_place = in.data_shared_ptr() == out.data_shared_ptr();
      states.push_back({Input(in), Output(out, in_place)});
    }
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
  Output p_out;
  mx::Stream stream;
  // The next job that the same thread queued on the stream, where that is ready: all that it reads
  // was there when its graph was built, and it writes that memory. Its task is queued behind this
  // one's, so it outlives this one's.
  std::atomic<Job*> next{nullptr};
  // For the stream's thread:
  std::vector<Constants> constants;  // of each group
  RoundingKey key{};                 // of no element
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
        storage_(
            job.gradients[index].storage == job.parameters[index].storage
                ? job.gradients[index].storage
                : Storage::float32),
        gradient_(job.gradients[index], end, 0),
        parameter_(job.parameters[index], end, 1) {
    for (size_t k = 0; k < job.states.size(); ++k) {
      states_[k].emplace(job.states[k].in, segment_.state_offset + end, 2 + k);
    }
  }

  // Updates elements [begin, end) of the segment.
  void run(size_t begin, size_t end) {
    const CpuLoops& loops = job_.loops;
    for (size_t i = begin, n = 0; i < end; i += n) {
      n = std::min(kBlockElements, end - i);
      size_t p_at = segment_.p_offset + i;
      size_t state_at = segment_.state_offset + i;
      // Each read may make n smaller.
      BlockArrays a{};
      a.g = gradient_.read(loops, i, n, g_, storage_);
      a.p_in = parameter_.read(loops, i, n, p_, storage_);
      a.p_out = job_.p_out.target(p_at, p_, storage_);
      for (size_t k = 0; k < job_.states.size(); ++k) {
        a.state_in[k] = states_[k]->read(loops, state_at, n, state_[k]);
        a.state_out[k] = job_.states[k].out.target(state_at, state_[k]);
      }
      auto update = loops.update[job_.rule.index()][static_cast<size_t>(storage_)];
      update(job_.constants[segment_.group], a, n, {p_at, job_.key.step, job_.key.seed});
      job_.p_out.store(loops, job_.key, p_at, n, p_, storage_);
      for (size_t k = 0; k < job_.states.size(); ++k) {
        job_.states[k].out.store(loops, job_.key, state_at, n, state_[k]);
      }
    }
  }

 private:
  const Job& job_;
  const Segment& segment_;
  Storage storage_;  // in which the loop takes the parameter and its gradient
  Walk gradient_;
  Walk parameter_;
  std::array<std::optional<Walk>, kMaxStates> states_;
  alignas(64) Scratch p_;
  alignas(64) Scratch g_;
  alignas(64) Scratch state_[kMaxStates];
};

// Updates elements [begin, end) of the segment with this index in the plan: from front to back, or
// panel by panel where the gradient lies across long rows.
void update_segment(const Job& job, size_t index, size_t begin, size_t end) {
  SegmentUpdate update(job, index, end);
  size_t length = job.gradients[index].scattered_row();
  if (length <= kPanelColumns) {
    update.run(begin, end);
    return;
  }
  size_t last_row = (end - 1) / length + 1;
  for (size_t first_row = begin / length; first_row < last_row; first_row += kPanelRows) {
    size_t end_row = std::min(first_row + kPanelRows, last_row);
    for (size_t column = 0; column < length; column += kPanelColumns) {
      size_t end_column = std::min(column + kPanelColumns, length);
      for (size_t row = first_row; row < end_row; ++row) {
        update.run(
            std::max(begin, row * length + column), std::min(end, row * length + end_column));
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
  for (const State& state : job.states) {
    if (state.out.in_place) {
      continue;
    }
    for (const Segment& segment : plan.segments) {
      clear_gap(state.out, segment.state_offset + segment.size);
    }
    // A single parameter's state may be longer than the parameter.
    state.out.clear(plan.state_blocks * kBlock, SIZE_MAX);
    alignas(64) Scratch values;
    for (const Range& range : plan.untouched) {
      Walk walk(state.in, range.end, 0);
      for (size_t i = range.begin, n = 0; i < range.end; i += n) {
        n = std::min(kBlockElements, range.end - i);
        const float* from = walk.read(job.loops, i, n, values);
        float* to = state.out.target(i, values);
        if (from != to) {
          std::memcpy(to, from, n * sizeof(float));
        }
        state.out.store(job.loops, job.key, i, n, values);
      }
      clear_gap(state.out, range.end);
    }
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
  job.key.step = job.step ? *job.step : 0;
  float learning_rate =
      job.schedule ? schedule_value(*job.schedule, job.key.step) : *job.learning_rate;
  const auto& groups = job.rule.groups();
  for (size_t k = 0; k < groups.size(); ++k) {
    job.rule.traits().prepare(groups[k], learning_rate, job.key.step, job.constants[k]);
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
  bool is_ready = inputs.empty() && p_in_place;
  for (const State& state : job->states) {
    is_ready &= state.out.in_place;
  }
  thread_local std::weak_ptr<Job> last;
  auto before = last.lock();
  if (is_ready && before && before->stream == job->stream) {
    before->next = job.get();
  }
  last = job;
}

}  // namespace flatstep
