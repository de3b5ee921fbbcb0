// What csrc/backend/thread_pool.h promises where a body throws. Compiled and run by
// test_thread_pool.py.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <thread>

#include "backend/thread_pool.h"

namespace {

void check(bool ok, const char* what) {
  if (!ok) {
    std::fprintf(stderr, "%s\n", what);
    std::exit(1);
  }
}

}  // namespace

int main() {
  flatstep::set_num_threads(4);
  std::atomic<int> inside{0};
  for (size_t thrower = 0; thrower < 400; ++thrower) {
    bool thrown = false;
    try {
      flatstep::parallel_for(400, 1, [&](size_t begin, size_t end) {
        ++inside;
        std::this_thread::yield();
        bool is_here = begin <= thrower && thrower < end;
        --inside;
        if (is_here) {
          throw std::bad_alloc();
        }
      });
    } catch (const std::bad_alloc&) {
      thrown = true;
    }
    check(thrown, "what a body throws should come out of the loop");
    check(inside == 0, "no thread should be in a body any more");
  }
  std::atomic<size_t> done{0};
  flatstep::parallel_for(1000, 1, [&](size_t begin, size_t end) { done += end - begin; });
  check(done == 1000, "the next loop should be whole");
}
