// The threads that compute one op together. They spin for a moment between two ops and then park, so
// that an engine that steps pays no wake-up and an idle one no CPU; a barrier inside an op spins, and
// yields its core when the others are late, since a machine is seldom ours alone.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace sanderling {

class Pool {
  public:
    // No std::function: what a header instantiates in isa.cpp would be shared by all instruction sets.
    using Body = void (*)(void* context, int thread);

    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return threads_; }
    // Calls body(context, 0 .. threads - 1), one on each thread; returns when all have returned.
    void run(Body body, void* context);
    // Within run: waits until every thread has called it as often. All writes before are seen after.
    void barrier();

  private:
    void work(int thread);
    uint64_t await_job(uint64_t seen);

    const int threads_;
    Body body_ = nullptr;
    void* context_ = nullptr;
    std::atomic<uint64_t> job_{0};
    std::atomic<int> left_{0}, arrived_{0};
    std::atomic<uint64_t> phase_{0};
    std::atomic<bool> ending_{false};
    std::atomic<int> parked_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
};

#define SANDERLING_INLINE inline __attribute__((always_inline))

// [begin, end) of `thread`'s share of `items`.
struct Share {
    int64_t begin, end;
    SANDERLING_INLINE Share(int64_t items, int thread, int threads)
        : begin(items * thread / threads), end(items * (thread + 1) / threads) {}
};

}  // namespace sanderling
