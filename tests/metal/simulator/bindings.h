// The buffers of a dispatch: where its kernel finds them, what of them it may touch, and what has
// touched them.
//
// An address says through which buffer a kernel goes, whatever it computes from its pointers:
// buffers that overlap are mapped once for each of them, at addresses of its own.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "kernel_side.h"

// Who touched a byte last: a time, a thread of the threadgroup that ran then, and for readers
// whether there were several, of one SIMD-group or of more.
struct LastTouch {
  uint32_t write;
  uint32_t read;
};

// Through which buffers a byte was touched: a bit for each index, and one for a write.
using Users = uint32_t;
constexpr Users kWritten = 1u << SIMULATOR_NUM_SLOTS;

struct Range {
  uint64_t begin;
  uint64_t end;
};

bool covers(const std::vector<Range>& ranges, uint64_t begin, uint64_t end);

struct Unmap {
  uint64_t size = 0;
  void operator()(void* memory) const {
    munmap(memory, size);
  }
};
template <typename T>
using Mapping = std::unique_ptr<T[], Unmap>;

struct Binding {
  int index;
  bool is_writable;
  uint64_t begin;  // of all that there is, of which some may lie before the buffer's address
  uint64_t end;
  std::vector<Range> readable;
  std::vector<Range> writable;
  // For each byte from `begin` on.
  Mapping<LastTouch> touches;  // null: nothing races where nothing may be written
  Users* users;                // null: no other buffer overlaps
};

class Bindings {
 public:
  // Changes the addresses of buffers that overlap. What was written is where it belongs once the
  // destructor has run.
  Bindings(SimulatorDispatch& dispatch, const SimulatorKernel& kernel);
  ~Bindings();

  // Null: the address lies in no buffer.
  Binding* find(uint64_t address);
  void forget_touches();

 private:
  // The memory of buffers that overlap.
  struct Shared {
    char* begin;  // where the host has it
    uint64_t size;
    bool is_written;
    char* first_view;
    uint64_t distance;  // from one view to the next
    Mapping<char> views;
    Mapping<Users> users;
  };

  void give_views(size_t first, size_t count, uint64_t end, SimulatorDispatch& dispatch);
  static void map_views(Shared& shared, uint64_t count);

  std::vector<Binding> bindings_;  // as they lie in the kernel's memory, where none overlap
  std::vector<Shared> shared_;
  Binding* latest_ = nullptr;
};
