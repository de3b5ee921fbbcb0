// Bounds, permissions, alignment, overlaps and races of a kernel's accesses. See memory_check.h.
#include "memory_check.h"

#include <algorithm>

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

}  // namespace

// The first and last byte of this library, where `constant` program data lies. Set by the linker.
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start;
extern "C" __attribute__((visibility("hidden"))) const char _end;

MemoryCheck::MemoryCheck(SimulatorDispatch& dispatch, const SimulatorKernel& kernel)
    : dispatch_(dispatch), bindings_(dispatch, kernel) {
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
  bindings_.forget_touches();
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
  if (const Binding* binding = bindings_.find(address)) {
    problem = in_device(*binding, address, size, kind, is_atomic);
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
    const Binding& binding, uint64_t address, uint64_t size, AccessKind kind, bool is_atomic) {
  if (address + size > binding.end) {
    return "which goes past the end of the buffer";
  }
  if (kind == ACCESS_WRITE && !binding.is_writable) {
    return "which is read-only";
  }
  const std::vector<Range>& allowed = kind == ACCESS_WRITE ? binding.writable : binding.readable;
  if (!covers(allowed, address, address + size)) {
    return kind == ACCESS_WRITE ? "which the test does not let it write"
                                : "which the test does not let it read";
  }
  uint64_t offset = address - binding.begin;
  if (binding.users) {
    std::string problem = overlap(binding, offset, size, kind);
    if (!problem.empty()) {
      return problem;
    }
  }
  if (binding.touches && !is_atomic && race(binding.touches.get() + offset, size, kind, true)) {
    return "which another thread touches without a barrier in between (a data race)";
  }
  return "";
}

std::string MemoryCheck::overlap(
    const Binding& binding, uint64_t offset, uint64_t size, AccessKind kind) {
  Users self = 1u << binding.index;
  for (uint64_t i = offset; i < offset + size; ++i) {
    Users& users = binding.users[i];
    Users others = users & ~(self | kWritten);
    bool is_written = users & kWritten;
    if (others && (is_written || kind == ACCESS_WRITE)) {
      uint64_t other = 0;
      while (!(others >> other & 1)) {
        ++other;
      }
      return std::string("which is also ") + (is_written ? "written" : "read") +
             " through buffer " + text(other) + " (Metal takes it that buffers do not overlap)";
    }
    users |= kind == ACCESS_WRITE ? self | kWritten : self;
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
