// The pool and its phases, compiled with ThreadSanitizer by test_cpu_pool.py: phases that read what the
// one before wrote, in pools of several sizes, many ops in a row. Exits with 1 when a sum is wrong;
// a race is the sanitizer's to report.
#include "pool.h"

#include <cstdio>
#include <cstring>
#include <vector>

using sanderling::Phase;
using sanderling::Phases;
using sanderling::Pool;

constexpr int PHASES = 5, ITEMS = 64, RUNS = 400;

struct Op {
    Phase* phases;
    std::vector<long> odd, even;
};

static void body(void* context, int) {
    Op& op = *static_cast<Op*>(context);
    Phases phases(op.phases, PHASES);
    for (int phase = 0; phase < PHASES; phase++) {
        phases.each(ITEMS, [&](int64_t i) {
            if (phase % 2 == 0)
                op.even[size_t(i)] += op.odd[size_t((i + 7) % ITEMS)] + 1;
            else
                op.odd[size_t(i)] += op.even[size_t((i + 3) % ITEMS)];
        });
    }
}

int main() {
    long first = -1;
    for (int threads : {1, 2, 3, 6}) {
        Pool pool(threads);
        for (int run = 0; run < RUNS; run++) {
            Phase memory[PHASES];
            std::memset(static_cast<void*>(memory), 0, sizeof memory);
            Op op{memory, std::vector<long>(ITEMS), std::vector<long>(ITEMS)};
            pool.run(body, &op);
            long sum = 0;
            for (long value : op.even) sum += value;
            if (first < 0) first = sum;
            if (sum != first) return 1;
        }
    }
    std::puts("ok");
    return 0;
}
