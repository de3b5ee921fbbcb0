#include "backend/thread_pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace flatstep {

namespace {

constexpr size_t kMaxThreads = 1024;
constexpr int kLooks = 200;
constexpr size_t kMaxGrains = 64;  // in a piece

// A thread's own part of a loop, handed out from front to back.
struct alignas(64) Part {
  std::atomic<size_t> next{0};
  size_t end{0};
};

using Body = std::function<void(size_t, size_t)>;

// Each thread starts with a part of its own, since memory is fastest when read on from where the
// last piece ended, and helps the others once that is done. The loop's parts are the pool's, one
// for each thread, so that a loop needs no memory.
class Pool {
 public:
  explicit Pool(size_t num_workers) : parts_(num_workers + 1) {
    threads_.reserve(num_workers);
    sigset_t all, previous;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &previous);
    try {
      for (size_t i = 0; i < num_workers; ++i) {
        threads_.emplace_back([this, i] { work(i + 1); });
      }
    } catch (const std::exception&) {
      // The system gives no more threads or memory: those that there are share the work.
    }
    pthread_sigmask(SIG_SETMASK, &previous, nullptr);
  }

  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) {
      thread.join();
    }
  }

  void share(const Body& body, size_t count, size_t grain) {
    {
      std::lock_guard lock(mutex_);
      hand_out(count, grain);
      body_ = &body;
      ++generation_;
    }
    wake_.notify_all();
    run(body, 0);
    // All is handed out. Who has not woken yet finds no loop any more, and is not waited for.
    {
      std::lock_guard lock(mutex_);
      body_ = nullptr;
    }
    if (!soon([this] { return busy_ == 0; })) {
      std::unique_lock lock(mutex_);
      done_.wait(lock, [this] { return busy_ == 0; });
    }
    if (failed_.exchange(false)) {
      std::rethrow_exception(std::exchange(error_, nullptr));
    }
  }

 private:
  // Looks a while before sleeping: the buckets of a step follow each other within microseconds, and
  // to wake a sleeping thread takes up to a hundred. Yields, so that whoever has work goes first.
  template <typename Ready>
  static bool soon(Ready&& ready) {
    for (int i = 0; i < kLooks; ++i) {
      if (ready()) {
        return true;
      }
      std::this_thread::yield();
    }
    return false;
  }

  // `number` of this thread; the one that shares a loop is number 0.
  void work(size_t number) {
    uint64_t seen = 0;
    for (;;) {
      soon([&] { return generation_ != seen; });
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return stopping_ || generation_ != seen; });
      if (stopping_) {
        return;
      }
      seen = generation_;
      if (body_ == nullptr) {
        continue;
      }
      const Body& body = *body_;
      ++busy_;
      lock.unlock();
      run(body, number);
      lock.lock();
      if (--busy_ == 0) {
        done_.notify_one();
      }
    }
  }

  void hand_out(size_t count, size_t grain) {
    size_t grains = (count + grain - 1) / grain;
    size_t begin = 0;
    for (size_t i = 0; i < parts_.size(); ++i) {
      size_t end = std::min(count, grains * (i + 1) / parts_.size() * grain);
      parts_[i].next = begin;
      parts_[i].end = end;
      begin = end;
    }
    grain_ = grain;
  }

  // Works until all is handed out. What the body throws is kept for `share` to throw, and nothing
  // more is handed out.
  void run(const Body& body, size_t thread) noexcept {
    try {
      for (size_t i = 0; i < parts_.size(); ++i) {
        run_part(body, parts_[(thread + i) % parts_.size()]);
      }
    } catch (...) {
      if (!failed_.exchange(true)) {
        error_ = std::current_exception();
      }
    }
  }

  void run_part(const Body& body, Part& part) {
    size_t begin = part.next;
    while (begin < part.end && !failed_) {
      // A quarter of what is left, in grains: long pieces first, and at the end so short ones that
      // no thread waits long for another.
      size_t piece = std::clamp<size_t>((part.end - begin) / grain_ / 4, 1, kMaxGrains) * grain_;
      size_t end = std::min(begin + piece, part.end);
      if (part.next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) {
        body(begin, end);
        begin = part.next;
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  const Body* body_{nullptr};  // of the loop that is shared
  std::atomic<uint64_t> generation_{0};
  std::atomic<size_t> busy_{0};  // workers in a loop
  bool stopping_{false};
  std::vector<std::thread> threads_;
  std::vector<Part> parts_;
  size_t grain_{1};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

struct SharedPool {
  std::mutex mutex;  // one loop at a time: two streams may ask at once
  std::unique_ptr<Pool> pool;
  std::atomic<size_t> num_threads{1};
};

SharedPool*& shared_pool() {
  // Never freed, see the header. In a forked child the threads are gone and a mutex may be held
  // by one of them for ever, so the child starts from a new object and leaves the old one alone.
  static SharedPool* instance = [] {
    pthread_atfork(nullptr, nullptr, [] {
      size_t n = shared_pool()->num_threads;
      shared_pool() = new SharedPool;
      shared_pool()->num_threads = n;
    });
    return new SharedPool;
  }();
  return instance;
}

}  // namespace

size_t num_threads() {
  return shared_pool()->num_threads;
}

void set_num_threads(size_t n) {
  if (n < 1 || n > kMaxThreads) {
    throw std::invalid_argument(
        "[set_num_threads] the number of threads should be from 1 to " +
        std::to_string(kMaxThreads) + ", " + std::to_string(n) + " was provided instead");
  }
  SharedPool& shared = *shared_pool();
  std::lock_guard lock(shared.mutex);
  shared.num_threads = n;
  shared.pool.reset();
}

void parallel_for(size_t count, size_t grain, const Body& body) {
  SharedPool& shared = *shared_pool();
  if (count <= grain || shared.num_threads == 1) {
    if (count > 0) {
      body(0, count);
    }
    return;
  }
  std::lock_guard lock(shared.mutex);
  if (shared.pool == nullptr) {
    try {
      shared.pool = std::make_unique<Pool>(shared.num_threads - 1);
    } catch (const std::bad_alloc&) {
      body(0, count);
      return;
    }
  }
  shared.pool->share(body, count, grain);
}

}  // namespace flatstep
