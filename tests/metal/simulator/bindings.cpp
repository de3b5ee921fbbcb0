// Bound buffers and the memory behind them. See bindings.h.
#include "bindings.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

namespace {

// Sorted, and those that meet joined.
void normalize(std::vector<Range>& ranges) {
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) {
    return a.begin < b.begin;
  });
  std::vector<Range> joined;
  for (const Range& range : ranges) {
    if (range.begin >= range.end) {
      continue;
    }
    if (!joined.empty() && range.begin <= joined.back().end) {
      joined.back().end = std::max(joined.back().end, range.end);
    } else {
      joined.push_back(range);
    }
  }
  ranges = std::move(joined);
}

// What is given counts from the buffer's address; null is all that there is.
std::vector<Range> ranges(
    const Binding& binding, void* address, const SimulatorRange* given, uint64_t count) {
  if (!given) {
    return {{binding.begin, binding.end}};
  }
  uint64_t start = reinterpret_cast<uint64_t>(address);
  std::vector<Range> result;
  for (uint64_t i = 0; i < count; ++i) {
    result.push_back({start + given[i].begin, std::min(binding.end, start + given[i].end)});
  }
  normalize(result);
  return result;
}

bool lies_before(const Binding& a, const Binding& b) {
  return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
}

// Zeros, of which only what is touched takes memory.
template <typename T>
Mapping<T> reserve(uint64_t count, int protection = PROT_READ | PROT_WRITE) {
  uint64_t size = std::max<uint64_t>(count, 1) * sizeof(T);
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, size, protection, flags, -1, 0);
  if (memory == MAP_FAILED) {
    throw std::bad_alloc();
  }
  return Mapping<T>(static_cast<T*>(memory), Unmap{size});
}

}  // namespace

bool covers(const std::vector<Range>& ranges, uint64_t begin, uint64_t end) {
  auto after =
      std::upper_bound(ranges.begin(), ranges.end(), begin, [](uint64_t value, const Range& r) {
        return value < r.begin;
      });
  return after != ranges.begin() && end <= (after - 1)->end;
}

Bindings::Bindings(SimulatorDispatch& dispatch, const SimulatorKernel& kernel) {
  for (int i = 0; i < kernel.num_parameters; ++i) {
    const SimulatorParameter& parameter = kernel.parameters[i];
    if (parameter.kind == SIMULATOR_BUFFER) {
      const SimulatorBuffer& buffer = dispatch.buffers[parameter.index];
      Binding& binding = bindings_.emplace_back();
      binding.index = parameter.index;
      binding.is_writable = parameter.is_writable != 0;
      binding.begin = reinterpret_cast<uint64_t>(buffer.address) - buffer.before;
      binding.end = reinterpret_cast<uint64_t>(buffer.address) + buffer.size;
    }
  }
  std::sort(bindings_.begin(), bindings_.end(), lies_before);
  // From `first` up to `next` each overlaps one before it.
  for (size_t first = 0, next = 0; first < bindings_.size(); first = next) {
    uint64_t end = bindings_[first].end;
    for (next = first + 1; next < bindings_.size() && bindings_[next].begin < end; ++next) {
      end = std::max(end, bindings_[next].end);
    }
    if (next - first > 1) {
      give_views(first, next - first, end, dispatch);
    }
  }
  std::sort(bindings_.begin(), bindings_.end(), lies_before);
  for (Binding& binding : bindings_) {
    const SimulatorBuffer& buffer = dispatch.buffers[binding.index];
    binding.readable = ranges(binding, buffer.address, buffer.readable, buffer.num_readable);
    if (binding.is_writable) {
      binding.writable = ranges(binding, buffer.address, buffer.writable, buffer.num_writable);
      binding.touches = reserve<LastTouch>(binding.end - binding.begin);
    }
  }
}

Bindings::~Bindings() {
  for (const Shared& shared : shared_) {
    if (shared.is_written) {
      std::memcpy(shared.begin, shared.first_view, shared.size);
    }
  }
}

void Bindings::give_views(size_t first, size_t count, uint64_t end, SimulatorDispatch& dispatch) {
  uint64_t begin = bindings_[first].begin;
  Shared shared{};
  shared.begin = reinterpret_cast<char*>(begin);
  shared.size = end - begin;
  shared.users = reserve<Users>(shared.size);
  map_views(shared, count);
  for (size_t i = 0; i < count; ++i) {
    Binding& binding = bindings_[first + i];
    shared.is_written |= binding.is_writable;
    binding.users = shared.users.get() + (binding.begin - begin);
    uint64_t moved_by = reinterpret_cast<uint64_t>(shared.first_view) + i * shared.distance - begin;
    binding.begin += moved_by;
    binding.end += moved_by;
    void*& address = dispatch.buffers[binding.index].address;
    address = reinterpret_cast<void*>(reinterpret_cast<uint64_t>(address) + moved_by);
  }
  shared_.push_back(std::move(shared));
}

// Copies the memory to where it can be mapped `count` times. Before and behind each view lies as
// much that nobody may touch.
void Bindings::map_views(Shared& shared, uint64_t count) {
  uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  uint64_t in_page = reinterpret_cast<uint64_t>(shared.begin) % page;  // keeps the alignment
  uint64_t length = (in_page + shared.size + page - 1) / page * page;
  shared.views = reserve<char>((2 * count + 1) * length, PROT_NONE);
  int file = memfd_create("buffers", MFD_CLOEXEC);
  bool is_mapped = file >= 0 && ftruncate(file, static_cast<off_t>(length)) == 0;
  for (uint64_t i = 0; is_mapped && i < count; ++i) {
    void* at = shared.views.get() + (2 * i + 1) * length;
    is_mapped = mmap(at, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) == at;
  }
  close(file);
  if (!is_mapped) {
    throw std::bad_alloc();
  }
  shared.first_view = shared.views.get() + length + in_page;
  shared.distance = 2 * length;
  std::memcpy(shared.first_view, shared.begin, shared.size);
}

Binding* Bindings::find(uint64_t address) {
  if (latest_ && address >= latest_->begin && address < latest_->end) {
    return latest_;
  }
  auto found = std::upper_bound(
      bindings_.begin(), bindings_.end(), address, [](uint64_t value, const Binding& binding) {
        return value < binding.end;
      });
  if (found == bindings_.end() || address < found->begin) {
    return nullptr;
  }
  latest_ = &*found;
  return latest_;
}

void Bindings::forget_touches() {
  for (Binding& binding : bindings_) {
    if (binding.touches) {
      madvise(binding.touches.get(), binding.touches.get_deleter().size, MADV_DONTNEED);  // zeros
    }
  }
}
