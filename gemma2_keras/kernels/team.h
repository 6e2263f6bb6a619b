// Threads that work on one step together.

#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace {

// Threads meet here; spinning is what makes a hundred meetings per token cheap.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait() {
    int phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; spins++) {
      // Whoever is waited for may have lost its processor to another program.
      if (spins > 4000)
        std::this_thread::sleep_for(std::chrono::microseconds(50));
      else if (spins > 2000)
        std::this_thread::yield();
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }

 private:
  const int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

void team(int threads, const std::function<void(int)>& work) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; i++) others.emplace_back(work, i);
  work(0);
  for (auto& other : others) other.join();
}

// How OpenMP starts a function on several threads (libgomp's ABI); null if no pool was offered.
using StartThreads = void (*)(void (*)(void*), void*, unsigned, unsigned);
inline StartThreads start_threads = nullptr;

// Calls `work` for [0, parts), by the threads of another library if they were offered: they spin for a while after each
// of its operations, and ours would have to wait for that. Parts must not wait for one another.
template <class Work>
void in_parallel(int parts, const Work& work) {
  struct Call {
    const Work& work;
    const int parts;
    std::atomic<int> next;
    static void run(void* self) {
      auto& call = *static_cast<Call*>(self);
      for (int part; (part = call.next.fetch_add(1)) < call.parts;) call.work(part);
    }
  } call{work, parts, {0}};
  if (parts == 1)
    work(0);
  else if (start_threads)
    start_threads(Call::run, &call, unsigned(parts), 0);
  else
    team(parts, [&](int) { Call::run(&call); });
}

// Hands out ranges of [0, n): long ones first, since memory serves long streams best, short ones to end together.
class Ranges {
 public:
  void reset() { next_.store(0, std::memory_order_relaxed); }
  bool take(int64_t n, int threads, int64_t least, int64_t* begin, int64_t* end) {
    int64_t from = next_.load(std::memory_order_relaxed);
    do {
      if (from >= n) return false;
      int64_t share = (n - from) / (2 * threads);
      *end = from + (share > least ? share : least);
      if (*end > n) *end = n;
    } while (!next_.compare_exchange_weak(from, *end, std::memory_order_relaxed));
    *begin = from;
    return true;
  }

 private:
  alignas(64) std::atomic<int64_t> next_{0};
};

}  // namespace
