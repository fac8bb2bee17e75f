#include "pool.h"

#include <sched.h>

namespace sanderling {
namespace {

constexpr int SPINS_BEFORE_PARKING = 20000;  // some hundred microseconds: longer than a step's Python
constexpr int SPINS_BEFORE_YIELDING = 2000;

inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

Pool::Pool(int threads) : threads_(threads) {
    for (int thread = 1; thread < threads; thread++) workers_.emplace_back(&Pool::work, this, thread);
}

Pool::~Pool() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        ending_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void Pool::run(Body body, void* context) {
    body_ = body;
    context_ = context;
    left_.store(threads_ - 1, std::memory_order_relaxed);
    job_.fetch_add(1);  // sequentially consistent, as parked_ is: one of the two sees the other
    if (parked_.load() > 0) {
        std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }
    body(context, 0);
    for (int spins = 0; left_.load(std::memory_order_acquire) > 0; spins++)
        spins < SPINS_BEFORE_YIELDING ? pause_briefly() : void(sched_yield());
}

void Pool::barrier() {
    if (threads_ == 1) return;
    uint64_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; spins++)
        spins < SPINS_BEFORE_YIELDING ? pause_briefly() : void(sched_yield());
}

uint64_t Pool::await_job(uint64_t seen) {
    for (int spins = 0; spins < SPINS_BEFORE_PARKING; spins++) {
        uint64_t job = job_.load(std::memory_order_acquire);
        if (job != seen || ending_.load(std::memory_order_relaxed)) return job;
        pause_briefly();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    parked_.fetch_add(1);
    wake_.wait(lock, [&] { return job_.load() != seen || ending_.load(); });
    parked_.fetch_sub(1);
    return job_.load(std::memory_order_acquire);
}

void Pool::work(int thread) {
    uint64_t seen = 0;
    while (true) {
        uint64_t job = await_job(seen);
        if (job == seen) return;  // ending
        seen = job;
        body_(context_, thread);
        left_.fetch_sub(1, std::memory_order_release);
    }
}

}  // namespace sanderling
