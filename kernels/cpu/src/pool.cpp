#include "pool.h"

#include <sched.h>

namespace sanderling {
namespace {

constexpr int SPINS_BEFORE_PARKING = 20000;  // some hundred microseconds: longer than a step's Python
constexpr int SPINS_BEFORE_YIELDING = 500;

}  // namespace

void spin(int& spins) {
    if (++spins > SPINS_BEFORE_YIELDING) {
        sched_yield();
        return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

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

// Sequentially consistent throughout: a worker counts itself in before it looks whether the op is open,
// and run() closes the op before it looks who is in; so one of the two sees the other.
void Pool::run(Body body, void* context) {
    body_ = body;
    context_ = context;
    open_.store(true);
    job_.fetch_add(1);
    if (parked_.load() > 0) {
        std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }
    body(context, 0);
    open_.store(false);
    for (int spins = 0; active_.load() > 0;) spin(spins);
}

void Pool::await_job(uint64_t seen) {
    for (int spins = 0; spins < SPINS_BEFORE_PARKING; spins++) {
        if (job_.load() != seen || ending_.load()) return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    std::unique_lock<std::mutex> lock(mutex_);
    parked_.fetch_add(1);
    wake_.wait(lock, [&] { return job_.load() != seen || ending_.load(); });
    parked_.fetch_sub(1);
}

void Pool::work(int thread) {
    uint64_t seen = 0;
    while (true) {
        await_job(seen);
        if (ending_.load()) return;
        active_.fetch_add(1);
        seen = job_.load();
        if (open_.load()) body_(context_, thread);
        active_.fetch_sub(1);
    }
}

}  // namespace sanderling
