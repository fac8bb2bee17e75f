// The threads that compute one op together, and the phases in which they do.
//
// Workers spin for a moment between two ops and then park, so that an engine that steps pays no
// wake-up and an idle one no CPU. Nobody ever waits for a thread, only for work that a thread has
// taken: a machine is seldom ours alone, and a barrier of all threads would stand still whenever one of
// them is not running. A worker that comes late to an op finds it done, and skips it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#define SANDERLING_INLINE inline __attribute__((always_inline))

namespace sanderling {

void spin(int& spins);  // a moment's pause; after some of them the core goes to whoever wants it

class Pool {
  public:
    // No std::function: what a header instantiates in isa.cpp would be shared by all instruction sets.
    using Body = void (*)(void* context, int thread);

    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return threads_; }
    // Calls body(context, 0) here, and body(context, n) on whichever workers are in time; returns when
    // all that were have returned. So body(context, 0) alone has to be able to do everything.
    void run(Body body, void* context);

  private:
    void work(int thread);
    void await_job(uint64_t seen);

    const int threads_;
    Body body_ = nullptr;
    void* context_ = nullptr;
    std::atomic<uint64_t> job_{0};
    std::atomic<bool> open_{false}, ending_{false};
    std::atomic<int> active_{0}, parked_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
};

// The work of an op, phase by phase: in each, items that any thread may take. Every thread goes through
// all phases in the same order; a phase begins when all items of the one before are done.
struct Phase {
    alignas(64) std::atomic<int64_t> next;
    alignas(64) std::atomic<int64_t> done;  // a line of its own: who waits does not slow who takes
};

class Phases {
  public:
    // `phases`: zeroed memory for `count`.
    SANDERLING_INLINE Phases(Phase* phases, int64_t count) : phase_(phases), end_(phases + count) {}

    // Takes items of the next phase while there are any, and returns when all are done.
    template <class Item> SANDERLING_INLINE void each(int64_t items, Item item) {
        if (phase_ == end_) std::abort();  // more than the op said: memory behind them is not ours
        Phase& phase = *phase_++;
        int64_t number, mine = 0;
        for (; (number = phase.next.fetch_add(1, std::memory_order_relaxed)) < items; mine++) item(number);
        if (mine > 0) phase.done.fetch_add(mine, std::memory_order_release);
        int spins = 0;
        while (phase.done.load(std::memory_order_acquire) < items) spin(spins);
    }

  private:
    Phase* phase_;
    Phase* const end_;
};

}  // namespace sanderling
