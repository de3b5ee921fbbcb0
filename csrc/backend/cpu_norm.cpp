// The CPU backend's sum of squares: one task over all gradients, whose parts each have a sum of
// their own. So it is the same for any number of threads.
#include <algorithm>
#include <atomic>

#include "allocate.h"
#include "backend/backend.h"
#include "backend/cpu_arrays.h"
#include "backend/thread_pool.h"
#include "mlx/backend/cpu/encoder.h"

namespace flatstep {

namespace {

// Of a part with a sum of its own: the sums together are small, and a thread has enough to do.
constexpr size_t kPartElements = 4 * kSquares;

struct NormJob {
  struct Source {
    Input input;
    size_t first;
    size_t size;
    size_t first_part;
  };

  std::shared_ptr<const std::vector<mx::array>> held;
  PassSettings settings;
  const CpuLoops& loops{cpu_loops()};
  const float* grad_scale{nullptr};
  const uint64_t* accumulated{nullptr};
  float* out;
  std::vector<Source> sources;
  std::vector<float> sums;  // of each part
  std::atomic<uint32_t> largest{0};
};

// All of an array that is only permuted is read as it lies.
bool is_dense(const mx::array& a, const SquaredNorm::Part& part) {
  return a.flags().contiguous && a.data_size() == a.size() && part.size == a.size();
}

float sum_of_part(NormJob& job, const NormJob::Source& source, size_t part, float scale) {
  size_t begin = source.first + part * kPartElements;
  size_t end = std::min(begin + kPartElements, source.first + source.size);
  Walk walk(source.input, end, 0);
  auto add = job.loops.sum_of_squares[static_cast<size_t>(source.input.storage)];
  uint32_t largest = 0;
  Pair total{};
  for (size_t i = begin, n = 0; i < end; i += n) {
    n = std::min(kSquares, end - i);
    const char* stored = walk.raw(i, n);
    total = with_value(total, add(stored, n, scale, job.settings.clip_value, largest));
  }
  uint32_t before = job.largest;
  while (before < largest && !job.largest.compare_exchange_weak(before, largest)) {
  }
  return total.hi;
}

void run(NormJob& job) {
  StepScalars now{};
  now.grad_scale = job.grad_scale ? *job.grad_scale : 1.0f;
  now.accumulated = job.accumulated ? *job.accumulated : 0;
  *job.out = 0.0f;
  if (holds(job.settings, now) || job.sums.empty()) {
    return;
  }
  float scale = scale_of(job.settings, now);
  parallel_for(job.sums.size(), 1, [&](size_t begin, size_t end) {
    auto source = std::upper_bound(
        job.sources.begin(), job.sources.end(), begin, [](size_t part, const auto& s) {
          return part < s.first_part;
        });
    --source;
    for (size_t part = begin; part < end; ++part) {
      while (std::next(source) != job.sources.end() && std::next(source)->first_part <= part) {
        ++source;
      }
      job.sums[part] = sum_of_part(job, *source, part - source->first_part, scale);
    }
  });
  Pair total{};
  for (float part : job.sums) {
    total = with_value(total, part);
  }
  bool has_nonfinite = job.settings.skips_nonfinite != 0 && job.largest >= 0x7f800000u;
  *job.out = has_nonfinite ? FLATSTEP_BITS(float, 0x7fc00000u) : total.hi;
}

}  // namespace

void cpu_squared_norm(
    SquaredNorm& norm, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  allocate_all(outputs);
  const Operands& operands = norm.operands();
  auto job = std::make_shared<NormJob>();
  job->held = operands.held();
  job->settings = norm.settings();
  if (operands.has(Operand::grad_scale)) {
    job->grad_scale = operands.get(Operand::grad_scale, inputs)->data<float>();
  }
  if (operands.has(Operand::accumulated)) {
    job->accumulated = operands.get(Operand::accumulated, inputs)->data<uint64_t>();
  }
  job->out = outputs[0].data<float>();
  const mx::array* arrays = operands.get(Operand::gradients, inputs);
  size_t num_parts = 0;
  for (const SquaredNorm::Part& part : norm.parts()) {
    if (part.size > 0) {
      const mx::array& a = arrays[part.array];
      Storage storage = storage_of(a.dtype());
      Input input = is_dense(a, part) ? Input(a.data<char>(), storage)
                                      : Input(a, storage, extent_of(storage));
      job->sources.push_back({std::move(input), part.first, part.size, num_parts});
      num_parts += (part.size + kPartElements - 1) / kPartElements;
    }
  }
  job->sums.resize(num_parts);
  auto& encoder = mx::cpu::get_command_encoder(norm.stream());
  encoder.dispatch([job = std::move(job)] { run(*job); });
}

}  // namespace flatstep
