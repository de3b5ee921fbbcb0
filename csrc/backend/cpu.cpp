// The CPU backend: a step of one bucket as one task on MLX's stream, shared among threads. A task
// also does what the next ones would, as far as that is ready: threads then wait for each other
// once for many buckets.
//
// The task walks the bucket in blocks that fit in the first-level cache. Float32 is read and
// written where it lies, and so are parameters and gradients of one half-precision dtype; what is
// stored otherwise goes through a block of float32 scratch, and what is not contiguous through a
// panel.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>

#include "backend/backend.h"
#include "backend/cpu_arrays.h"
#include "backend/cpu_dispatch.h"
#include "backend/thread_pool.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/stream.h"

namespace flatstep {

namespace {

constexpr size_t kMinGrain = 64;  // in blocks of a bucket

struct Slot {
  Input in;
  Output out;
  bool in_place;
};

struct StepConstants {
  AdamStep adam;
  SgdStep sgd;
};

// All that a task needs. MLX keeps the memory of the node's inputs until it has run.
struct Job {
  explicit Job(mx::Stream s) : stream(s) {
  }

  std::pair<HeldArrays, HeldArrays> held;
  std::shared_ptr<const BucketPlan> plan;
  Rule rule{};
  std::shared_ptr<const Schedule> schedule;
  const CpuLoops* loops{nullptr};
  const uint64_t* step{nullptr};        // null when nothing depends on it
  const float* learning_rate{nullptr};  // null with a schedule
  std::vector<Input> parameters;
  std::vector<Input> gradients;
  std::vector<Slot> slots;
  std::vector<Output> p_out;  // one
  mx::Stream stream;
  // The next job that the same thread queued on the stream, where that is ready: all that it reads
  // was there when its graph was built, and it writes that memory. Its task is queued behind this
  // one's, so it outlives this one's.
  std::atomic<Job*> next{nullptr};
  // For the stream's thread:
  StepConstants constants{};
  bool has_run{false};
  size_t start{0};  // its first block, counted through the jobs that are done at once
};

// The loops that read both as they are stored, or null.
const UpdateLoops* loops_for(const CpuLoops& loops, const Input& parameter, const Input& gradient) {
  if (parameter.dtype() != gradient.dtype()) {
    return nullptr;
  }
  switch (parameter.dtype().val()) {
    case mx::Dtype::Val::float16:
      return &loops.float16;
    case mx::Dtype::Val::bfloat16:
      return &loops.bfloat16;
    default:
      return &loops.float32;
  }
}

// One thread's update of a part of a segment.
class SegmentUpdate {
 public:
  // The part ends before element `end`.
  SegmentUpdate(const Job& job, size_t index, size_t end)
      : job_(job),
        segment_(job.plan->segments[index]),
        gradient_(job.gradients[index], end, 0),
        parameter_(job.parameters[index], end, 1),
        own_loops_(loops_for(*job.loops, job.parameters[index], job.gradients[index])) {
    for (size_t k = 0; k < job.slots.size(); ++k) {
      slots_[k].emplace(job.slots[k].in, segment_.state_offset + end, 2 + k);
    }
  }

  // Updates elements [begin, end) of the segment.
  void run(size_t begin, size_t end) {
    for (size_t i = begin, n = 0; i < end; i += n) {
      n = std::min(kBlockElements, end - i);
      run_block(i, n);
    }
  }

 private:
  // Updates at most n elements, and sets n to how many.
  void run_block(size_t i, size_t& n) {
    const CpuLoops& loops = *job_.loops;
    const Output& p_out = job_.p_out.front();
    size_t p_at = segment_.p_offset + i;
    size_t state_at = segment_.state_offset + i;
    BlockArrays a{};
    a.g = gradient_.read(i, n);
    a.p_in = parameter_.read(i, n);
    const void* state_raw[kMaxSlots]{};
    for (size_t k = 0; k < job_.slots.size(); ++k) {
      state_raw[k] = slots_[k]->read(state_at, n);
    }
    const float* state_in[kMaxSlots]{};
    float* state_out[kMaxSlots]{};
    for (size_t k = 0; k < job_.slots.size(); ++k) {
      state_in[k] = slots_[k]->as_floats(loops, state_raw[k], n, state_[k]);
      state_out[k] = job_.slots[k].out.target(state_at, state_[k]);
    }
    if (own_loops_ != nullptr) {
      a.p_out = p_out.at(p_at);
      update(*own_loops_, a, state_in, state_out, n);
    } else {
      a.g = gradient_.as_floats(loops, a.g, n, g_);
      a.p_in = parameter_.as_floats(loops, a.p_in, n, p_);
      a.p_out = p_out.target(p_at, p_);
      bool is_half = parameter_.dtype() != mx::float32;
      update(is_half ? loops.half_in_float32 : loops.float32, a, state_in, state_out, n);
      p_out.store(loops, p_at, n, p_);
    }
    for (size_t k = 0; k < job_.slots.size(); ++k) {
      job_.slots[k].out.store(loops, state_at, n, state_[k]);
    }
  }

  void update(
      const UpdateLoops& loops,
      BlockArrays a,
      const float* const* state_in,
      float* const* state_out,
      size_t n) const {
    if (job_.rule.kind == RuleKind::adam) {
      a.m_in = state_in[0];
      a.m_out = state_out[0];
      a.v_in = state_in[1];
      a.v_out = state_out[1];
      loops.adam(job_.constants.adam, a, n);
    } else {
      a.v_in = state_in[0];
      a.v_out = state_out[0];
      size_t momentum = job_.rule.has_momentum + (job_.rule.values.nesterov != 0);
      size_t variant = job_.rule.has_weight_decay + 2 * momentum;
      loops.sgd[variant](job_.constants.sgd, a, n);
    }
  }

  const Job& job_;
  const Segment& segment_;
  Walk gradient_;
  Walk parameter_;
  const UpdateLoops* own_loops_;  // null where the parameter and its gradient differ in dtype
  std::array<std::optional<Walk>, kMaxSlots> slots_;
  alignas(64) Scratch p_;
  alignas(64) Scratch g_;
  alignas(64) Scratch state_[kMaxSlots];
};

// Updates elements [begin, end) of the segment with this index in the plan: from front to back, or
// panel by panel where the gradient lies across its rows.
void update_segment(const Job& job, size_t index, size_t begin, size_t end) {
  SegmentUpdate update(job, index, end);
  size_t length = job.gradients[index].long_row();
  if (length == 0) {
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

// State of leaves that this step brings no gradient for, when their flat array moves.
void carry_untouched(const Job& job, const Slot& slot) {
  alignas(64) Scratch values;
  for (const Range& range : job.plan->untouched) {
    Walk walk(slot.in, range.end, 0);
    for (size_t i = range.begin, n = 0; i < range.end; i += n) {
      n = std::min(kBlockElements, range.end - i);
      const void* raw = walk.read(i, n);
      const float* from = walk.as_floats(*job.loops, raw, n, values);
      float* to = slot.out.target(i, values);
      if (from != to) {
        std::memcpy(to, from, n * sizeof(float));
      }
      slot.out.store(*job.loops, i, n, values);
    }
  }
}

// The gaps between segments are never read, but memory that users can reach holds no noise.
void clear_gaps(const Output& out, const std::vector<Range>& used, size_t end) {
  size_t from = 0;
  for (const Range& range : used) {
    std::memset(out.at(from), 0, (range.begin - from) * out.itemsize());
    from = range.end;
  }
  std::memset(out.at(from), 0, (end - from) * out.itemsize());
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
  uint64_t step = job.step ? *job.step : 0;
  float learning_rate = job.schedule ? schedule_value(*job.schedule, step) : *job.learning_rate;
  for (const Slot& slot : job.slots) {
    if (!slot.in_place) {
      carry_untouched(job, slot);
    }
  }
  if (job.rule.kind == RuleKind::adam) {
    job.constants.adam = prepare_adam(job.rule.values, learning_rate, step);
  } else {
    job.constants.sgd = prepare_sgd(job.rule.values, learning_rate);
  }
}

// How many blocks a thread takes at least: enough to find whole panels, but no more than a thread's
// share.
size_t grain_of(const Job& first, const Job& last, size_t total) {
  size_t share = (total + num_threads() - 1) / num_threads();
  size_t grain = kMinGrain;
  for (const Job* job = &first;; job = job->next) {
    for (const Input& gradient : job->gradients) {
      size_t panel = gradient.scattered_row() * kPanelRows / kBlock;
      grain = std::max(grain, std::min(panel, share));
    }
    if (job == &last) {
      return grain;
    }
  }
}

// Does this job and all that follow it, unless an earlier task has done so already. Needs no
// memory: what has begun cannot fail.
void run(Job& first) {
  if (first.has_run) {
    return;
  }
  size_t total = 0;
  Job* last = nullptr;
  for (Job* job = &first; job != nullptr; job = job->next) {
    job->has_run = true;
    prepare(*job);
    job->start = total;
    total += job->plan->p_blocks;
    last = job;
  }
  parallel_for(total, grain_of(first, *last, total), [&first, last](size_t begin, size_t end) {
    Job* job = &first;
    while (job != last && job->next.load()->start <= begin) {
      job = job->next;
    }
    for (;; job = job->next) {
      size_t from = std::max(begin, job->start) - job->start;
      size_t to = std::min(end - job->start, job->plan->p_blocks);
      if (from < to) {
        update_blocks(*job, from, to);
      }
      if (job == last || job->start + job->plan->p_blocks >= end) {
        return;
      }
    }
  });
}

// Queues the job's task. When the job is ready an earlier task of the stream may do it as well.
void enqueue(const std::shared_ptr<Job>& job, bool is_ready) {
  mx::cpu::get_command_encoder(job->stream).dispatch([job] { run(*job); });
  thread_local std::weak_ptr<Job> last;
  auto before = last.lock();
  if (is_ready && before && before->stream == job->stream) {
    before->next = job.get();
  }
  last = job;
}

// Writes zeros between the segments of each array that moves to fresh memory.
void clear_fresh_gaps(const Job& job, bool p_in_place, const std::vector<mx::array>& outputs) {
  std::vector<Range> p_used;
  std::vector<Range> state_used = job.plan->untouched;
  for (const Segment& s : job.plan->segments) {
    p_used.push_back({s.p_offset, s.p_offset + s.size});
    state_used.push_back({s.state_offset, s.state_offset + s.size});
  }
  std::sort(state_used.begin(), state_used.end(), [](const Range& a, const Range& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  if (!p_in_place) {
    clear_gaps(job.p_out.front(), p_used, outputs[0].size());
  }
  for (size_t k = 0; k < job.slots.size(); ++k) {
    if (!job.slots[k].in_place) {
      clear_gaps(job.slots[k].out, state_used, outputs[1 + k].size());
    }
  }
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
  auto operand = [&](size_t i) -> const mx::array& { return update.operand(inputs, i); };
  auto job = std::make_shared<Job>(update.stream());
  job->held = update.held();
  job->plan = update.plan_ptr();
  job->rule = update.rule();
  job->schedule = update.schedule();
  job->loops = &cpu_loops();
  if (update.reads_step()) {
    job->step = operand(0).data<uint64_t>();
  }
  if (!job->schedule) {
    job->learning_rate = operand(update.learning_rate_operand()).data<float>();
  }
  size_t n = update.num_segments();
  job->p_out.emplace_back(outputs[0]);
  job->parameters.reserve(n);
  job->gradients.reserve(n);
  size_t first_parameter = update.first_parameter_operand();
  for (size_t i = 0; i < n; ++i) {
    if (update.has_flat_parameters()) {
      job->parameters.emplace_back(operand(first_parameter), job->plan->segments[i].p_offset);
    } else {
      job->parameters.emplace_back(operand(first_parameter + i));
    }
    job->gradients.emplace_back(operand(update.first_gradient_operand() + i));
  }
  for (size_t k = 0; k < update.num_slots(); ++k) {
    const mx::array& in = operand(update.first_state_operand() + k);
    mx::array& out = outputs[1 + k];
    bool in_place = in.data_shared_ptr() == out.data_shared_ptr();
    job->slots.push_back({Input(in), Output(out), in_place});
  }
  bool all_in_place =
      p_in_place && std::all_of(job->slots.begin(), job->slots.end(), [](const Slot& slot) {
        return slot.in_place;
      });
  if (!all_in_place) {
    clear_fresh_gaps(*job, p_in_place, outputs);
  }
  // What is held was there when the graph was built; an input may be an output of what is still
  // queued, which MLX does not tell. And fresh memory may have been that of an output which was
  // dropped before its task has written it.
  bool is_ready = inputs.empty() && all_in_place;
  enqueue(job, is_ready);
}

}  // namespace flatstep
