// Bounds, permissions, alignment and races of a kernel's accesses. See memory_check.h.
#include "memory_check.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

#include "fiber.h"

namespace {

// A touch packs time (20 bits), thread (10 bits) and, for readers, how many there were (2 bits).
enum Readers : uint32_t { ONE_THREAD = 0, ONE_SIMDGROUP = 1, SEVERAL_SIMDGROUPS = 2 };

uint32_t pack(uint32_t time, uint32_t thread, uint32_t readers = ONE_THREAD) {
  return time << 12 | thread << 2 | readers;
}
uint32_t time_of(uint32_t touch) {
  return touch >> 12;
}
uint32_t thread_of(uint32_t touch) {
  return touch >> 2 & 1023;
}
uint32_t readers_of(uint32_t touch) {
  return touch & 3;
}
bool same_simdgroup(uint32_t a, uint32_t b) {
  return a / 32 == b / 32;
}

std::string text(uint64_t number) {
  return std::to_string(number);
}

// Sorted, and those that meet joined.
template <typename Range>
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

template <typename Range>
bool covers(const std::vector<Range>& ranges, uint64_t begin, uint64_t end) {
  auto after =
      std::upper_bound(ranges.begin(), ranges.end(), begin, [](uint64_t value, const Range& r) {
        return value < r.begin;
      });
  return after != ranges.begin() && end <= (after - 1)->end;
}

// Zeroed, and only what is touched takes memory.
LastTouch* make_touches(uint64_t count) {
  void* memory = mmap(
      nullptr,
      count * sizeof(LastTouch),
      PROT_READ | PROT_WRITE,
      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
      -1,
      0);
  if (memory == MAP_FAILED) {
    throw std::bad_alloc();
  }
  return static_cast<LastTouch*>(memory);
}

void free_touches(LastTouch* touches, uint64_t count) {
  if (touches) {
    munmap(touches, count * sizeof(LastTouch));
  }
}

}  // namespace

// The first and last byte of this library, where `constant` program data lies. Set by the linker.
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start;
extern "C" __attribute__((visibility("hidden"))) const char _end;

MemoryCheck::MemoryCheck(const SimulatorDispatch& dispatch, const SimulatorKernel& kernel)
    : dispatch_(dispatch) {
  for (int i = 0; i < kernel.num_parameters; ++i) {
    if (kernel.parameters[i].kind == SIMULATOR_BUFFER) {
      add_buffer(dispatch, kernel.parameters[i]);
    }
  }
  merge_areas();
  for (Area& area : areas_) {
    normalize(area.readable);
    normalize(area.writable);
    // Nothing races where nothing may be written.
    area.touches = area.writable.empty() ? nullptr : make_touches(area.end - area.begin);
  }
}

MemoryCheck::~MemoryCheck() {
  for (Area& area : areas_) {
    free_touches(area.touches, area.end - area.begin);
  }
}

void MemoryCheck::add_buffer(
    const SimulatorDispatch& dispatch, const SimulatorParameter& parameter) {
  const SimulatorBuffer& buffer = dispatch.buffers[parameter.index];
  uint64_t begin = reinterpret_cast<uint64_t>(buffer.address);
  uint64_t first = begin - buffer.before;
  uint64_t end = begin + buffer.size;
  if (first == end) {
    return;
  }
  auto ranges = [&](const SimulatorRange* given, uint64_t count) {
    std::vector<Range> result;
    if (!given) {
      result.push_back({first, end});
    }
    for (uint64_t i = 0; given && i < count; ++i) {
      result.push_back({begin + given[i].begin, std::min(end, begin + given[i].end)});
    }
    return result;
  };
  std::vector<Range> writable;
  if (parameter.is_writable) {
    writable = ranges(buffer.writable, buffer.num_writable);
  }
  areas_.push_back({first, end, ranges(buffer.readable, buffer.num_readable), writable, nullptr});
}

void MemoryCheck::merge_areas() {
  std::sort(
      areas_.begin(), areas_.end(), [](const Area& a, const Area& b) { return a.begin < b.begin; });
  std::vector<Area> merged;
  for (Area& area : areas_) {
    if (merged.empty() || area.begin >= merged.back().end) {
      merged.push_back(area);
      continue;
    }
    Area& into = merged.back();
    into.end = std::max(into.end, area.end);
    into.readable.insert(into.readable.end(), area.readable.begin(), area.readable.end());
    into.writable.insert(into.writable.end(), area.writable.begin(), area.writable.end());
  }
  areas_ = std::move(merged);
}

void MemoryCheck::set_threadgroup_memory(const char* begin, uint64_t size) {
  threadgroup_begin_ = reinterpret_cast<uint64_t>(begin);
  threadgroup_end_ = threadgroup_begin_ + size;
  threadgroup_touches_.assign(size, LastTouch{0, 0});
}

void MemoryCheck::clear_threadgroup_blocks() {
  threadgroup_blocks_.clear();
}

void MemoryCheck::add_threadgroup_block(const char* begin, uint64_t size) {
  uint64_t address = reinterpret_cast<uint64_t>(begin);
  threadgroup_blocks_.push_back({address, address + size});
}

void MemoryCheck::restart_time() {
  std::fill(threadgroup_touches_.begin(), threadgroup_touches_.end(), LastTouch{0, 0});
  for (Area& area : areas_) {
    uint64_t count = area.end - area.begin;
    if (area.touches) {
      free_touches(area.touches, count);
      area.touches = make_touches(count);
    }
  }
}

MemoryCheck::Area* MemoryCheck::find_area(uint64_t address) {
  if (latest_ && address >= latest_->begin && address < latest_->end) {
    return latest_;
  }
  for (Area& area : areas_) {
    if (address >= area.begin && address < area.end) {
      latest_ = &area;
      return latest_;
    }
  }
  return nullptr;
}

std::string MemoryCheck::access(
    uint64_t address, uint64_t size, AccessKind kind, bool is_aligned_access, bool is_atomic) {
  if (size == 0) {
    return "";
  }
  uint64_t stack = reinterpret_cast<uint64_t>(thread.stack);
  if (address - stack < kStackSize && address + size - stack <= kStackSize) {
    return "";
  }
  const char* verb = kind == ACCESS_WRITE ? "writes " : "reads ";
  std::string problem;
  if (Area* area = find_area(address)) {
    problem = in_device(*area, address, size, kind, is_atomic);
  } else if (address >= threadgroup_begin_ && address < threadgroup_end_) {
    problem = in_threadgroup(address, size, kind, is_aligned_access);
  } else if (
      kind == ACCESS_READ && address >= reinterpret_cast<uint64_t>(&__ehdr_start) &&
      address + size <= reinterpret_cast<uint64_t>(&_end)) {
    return "";
  } else {
    problem = "which is outside of what is bound";
  }
  if (problem.empty() && is_aligned_access && address % size != 0) {
    problem = "which is not aligned to that size";
  }
  if (problem.empty()) {
    return "";
  }
  return verb + text(size) + " bytes, " + where(address) + ", " + problem;
}

std::string MemoryCheck::in_device(
    Area& area, uint64_t address, uint64_t size, AccessKind kind, bool is_atomic) {
  if (address + size > area.end) {
    return "which goes past the end of the buffer";
  }
  if (kind == ACCESS_WRITE && area.writable.empty()) {
    return "which is read-only";
  }
  if (!covers(kind == ACCESS_WRITE ? area.writable : area.readable, address, address + size)) {
    return kind == ACCESS_WRITE ? "which the test does not let it write"
                                : "which the test does not let it read";
  }
  if (area.touches && !is_atomic && race(area.touches + (address - area.begin), size, kind, true)) {
    return "which another thread touches without a barrier in between (a data race)";
  }
  return "";
}

std::string MemoryCheck::in_threadgroup(
    uint64_t address, uint64_t size, AccessKind kind, bool is_aligned_access) {
  bool inside =
      std::any_of(threadgroup_blocks_.begin(), threadgroup_blocks_.end(), [&](const Range& block) {
        return address >= block.begin && address + size <= block.end;
      });
  if (!inside) {
    return "which is outside of the threadgroup variable";
  }
  LastTouch* touches = threadgroup_touches_.data() + (address - threadgroup_begin_);
  // A copy of a struct reads its padding, which nobody writes.
  for (uint64_t i = 0; kind == ACCESS_READ && is_aligned_access && i < size; ++i) {
    if (time_of(touches[i].write) < thread.group_start) {
      return "which nothing has been written to in this threadgroup";
    }
  }
  if (race(touches, size, kind, false)) {
    return "which another thread touches without a barrier in between (a data race)";
  }
  return "";
}

bool MemoryCheck::is_ordered(uint32_t touch, bool is_device) const {
  uint32_t time = time_of(touch);
  if (time == 0) {
    return true;
  }
  if (time < thread.group_start) {
    // An earlier threadgroup's: threadgroup memory is another's now, device memory is the same.
    return !is_device;
  }
  if (time < (is_device ? thread.device_barrier : thread.threadgroup_barrier)) {
    return true;
  }
  uint32_t simd = is_device ? thread.device_simd_barrier : thread.threadgroup_simd_barrier;
  if (readers_of(touch) == SEVERAL_SIMDGROUPS || !same_simdgroup(thread_of(touch), thread.id)) {
    return false;
  }
  if (time < simd) {
    return true;
  }
  return readers_of(touch) == ONE_THREAD && thread_of(touch) == thread.id;
}

// Keeps of a byte's readers what a later write has to be compared with.
void MemoryCheck::note_read(LastTouch& touch, bool is_device) const {
  uint32_t time = time_of(touch.read);
  if (is_device && time != 0 && time < thread.group_start) {
    return;  // no later thread is ordered after a reader of another threadgroup: nothing is worse
  }
  if (is_ordered(touch.read, is_device)) {
    touch.read = pack(thread.now, thread.id);
    return;
  }
  bool one = readers_of(touch.read) != SEVERAL_SIMDGROUPS &&
             same_simdgroup(thread_of(touch.read), thread.id);
  touch.read = pack(thread.now, thread.id, one ? ONE_SIMDGROUP : SEVERAL_SIMDGROUPS);
}

bool MemoryCheck::race(LastTouch* touches, uint64_t size, AccessKind kind, bool is_device) {
  for (uint64_t i = 0; i < size; ++i) {
    LastTouch& touch = touches[i];
    if (!is_ordered(touch.write, is_device)) {
      return true;
    }
    if (kind == ACCESS_READ) {
      note_read(touch, is_device);
    } else if (!is_ordered(touch.read, is_device)) {
      return true;
    } else {
      touch.write = pack(thread.now, thread.id);
    }
  }
  return false;
}

std::string MemoryCheck::where(uint64_t address) const {
  if (address >= threadgroup_begin_ && address < threadgroup_end_) {
    for (size_t i = threadgroup_blocks_.size(); i-- > 0;) {
      const Range& block = threadgroup_blocks_[i];
      if (address >= block.begin) {
        return "at byte " + text(address - block.begin) + " of a threadgroup variable of " +
               text(block.end - block.begin) + " bytes";
      }
    }
    return "in threadgroup memory";
  }
  std::string result;
  uint64_t nearest = 4096;  // further away it is not worth naming
  for (int i = 0; i < SIMULATOR_NUM_SLOTS; ++i) {
    const SimulatorBuffer& buffer = dispatch_.buffers[i];
    uint64_t begin = reinterpret_cast<uint64_t>(buffer.address);
    uint64_t end = begin + buffer.size;
    if (!buffer.address) {
      continue;
    }
    std::string name = "buffer " + text(i) + " (" + text(buffer.size) + " bytes)";
    if (address >= begin && address < end) {
      return "at byte " + text(address - begin) + " of " + name;
    }
    if (address >= end && address - end < nearest) {
      nearest = address - end;
      result = text(nearest) + " bytes past the end of " + name;
    } else if (address < begin && begin - address < nearest) {
      nearest = begin - address;
      result = text(nearest) + " bytes before " + name;
    }
  }
  return result.empty() ? "at an address that is near no buffer" : result;
}
