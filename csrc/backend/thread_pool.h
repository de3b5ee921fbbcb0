// A few persistent threads that share loops with the thread that asks.
//
// No OpenMP: two OpenMP runtimes in one process (torch brings one) fight, and Apple's clang has
// none. The pool is never destroyed, so that work which MLX finishes at interpreter exit still has
// it; a forked child starts a new one; its threads block every signal, so that Ctrl-C reaches
// Python.
#pragma once

#include <cstddef>
#include <functional>

namespace flatstep {

// How many threads share a loop, the calling one counted. One until flatstep's import sets it.
size_t num_threads();
void set_num_threads(size_t n);

// Calls body(begin, end) for ranges that cover [0, count), on all threads. They begin at multiples
// of `grain` and are long at first, short at last; one thread gets one range. Returns when all have
// run. What `body` throws comes out here, once no thread is in it any more.
void parallel_for(size_t count, size_t grain, const std::function<void(size_t, size_t)>& body);

}  // namespace flatstep
