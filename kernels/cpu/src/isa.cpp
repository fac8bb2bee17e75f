// The kernels, in sixteen lanes. Compiled once for each instruction set, with SANDERLING_ISA its name.
//
// Activations are quantised by groups of 32 values: accurate to 15 bits, as a signed high and an
// unsigned low part of 7 bits, or fast to 8; or they are left as they are (plain.inc). A product's sums over a group are exact integers; scales
// and minima come in afterwards, group by group. So a row's result depends neither on the other rows
// nor on threads, tiles or the instruction set.
#include "table.h"

#include <cstdlib>

#if defined(__AMX_INT8__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__ARM_FEATURE_DOTPROD)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "lanes.h"
#include "lanes_attention.h"

namespace sanderling {
namespace {

constexpr int64_t PREFETCH_BYTES = 1600;

// Memory of one call. No std::vector: its code would be shared by all instruction sets.
template <class T> struct Buffer {
    T* at = nullptr;
    explicit Buffer(int64_t count)
        : at(static_cast<T*>(std::aligned_alloc(64, (size_t(count) * sizeof(T) + 127) / 64 * 64))) {}
    ~Buffer() { std::free(at); }
    Buffer(const Buffer&) = delete;
};

// Calls body(phases, thread) on the threads of the pool, for an op of `count` phases.
template <class Body> void on_all(Pool& pool, int64_t count, Body body) {
    struct Op {
        Body& body;
        Phase* phases;
        int64_t count;
    };
    const size_t bytes = size_t(count) * sizeof(Phase);
    void* memory = std::aligned_alloc(alignof(Phase), bytes);
    std::memset(memory, 0, bytes);
    Op op{body, static_cast<Phase*>(memory), count};
    pool.run(
        [](void* context, int thread) {
            Op& of = *static_cast<Op*>(context);
            of.body(Phases(of.phases, of.count), thread);
        },
        &op);
    std::free(memory);
}

// How a matrix's pairs of tiles are handed out: a share of what is left each time, so that most of the
// work is taken in few pieces (taking one costs as much as a short one) and the end comes evenly.
class Chunks {
  public:
    Chunks(int64_t pairs, int threads) {
        int64_t at = 0;
        for (; at < pairs && count_ < MOST - 1; count_++) {
            const int64_t share = (pairs - at) / threads;
            begins_[count_] = at;
            at += share < 1 ? 1 : share;
        }
        if (at < pairs) begins_[count_++] = at;
        begins_[count_] = pairs;
    }
    int64_t count() const { return count_; }
    int64_t begin(int64_t chunk) const { return begins_[chunk]; }
    int64_t end(int64_t chunk) const { return begins_[chunk + 1]; }

  private:
    static constexpr int MOST = 1024;
    int64_t count_ = 0, begins_[MOST + 1];
};

#include "activations.inc"
#include "kinds.inc"
#include "products.inc"
#include "fixed.inc"
#include "amx.inc"

// each(tile, row, count, acc): all m rows of the pairs of tiles from `begin` to `end`.
template <class Each>
void pairs_of_tiles(const Matrix& w, const Activations& a, int64_t m, int64_t begin, int64_t end, Each each) {
    const int64_t tiles = w.rows / TILE_ROWS;
    for (int64_t first = 2 * begin; first < 2 * end && first < tiles; first += 2) {
        const int64_t second = first + 1 < tiles ? first + 1 : first;
        products(w, a, m, first, second, [&](int64_t row, int count, const F* one, const F* other) {
            each(first, row, count, one);
            if (second != first) each(second, row, count, other);
        });
    }
}

// Fetches what a thread will probably read first of a product's pairs, while it has little else to do.
SANDERLING_INLINE void expect(const Matrix& w, const Chunks& chunks, int thread) {
    const int64_t tiles = w.rows / TILE_ROWS;
    if (thread >= chunks.count() || 2 * chunks.begin(thread) + 1 >= tiles) return;
    Pair(w, 2 * chunks.begin(thread), 2 * chunks.begin(thread) + 1).expect();
}

int64_t pairs(const Matrix& w) { return (w.rows / TILE_ROWS + 1) / 2; }

void norm_row(const float* x, const float* weight, float eps, int64_t size, float* y) {
    F squares = zero();
    for (int64_t i = 0; i < size; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    F scale = set(1.f / std::sqrt(sum(squares) / float(size) + eps));
    for (int64_t i = 0; i < size; i += LANES) store(y + i, load(x + i) * scale * load(weight + i));
}

void norm(Pool& pool, const float* weight, float eps, int64_t size, const float* x, int64_t m, float* y) {
    on_all(pool, 1, [&](Phases phases, int) {
        phases.each(m, [&](int64_t row) { norm_row(x + row * size, weight, eps, size, y + row * size); });
    });
}

// Values [rows, columns] as the products come: sixteen columns of all rows next to each other. Row by
// row, eight results of a product would lie in as many pages, and often in one set of the cache; for the
// same reason the number of lines is odd.
struct Columns {
    Buffer<float> memory;
    int64_t lines;
    Columns(int64_t rows, int64_t columns) : memory((rows | 1) * columns), lines(rows | 1) {}
    SANDERLING_INLINE float* at(int64_t tile, int64_t row) const { return memory.at + (tile * lines + row) * LANES; }
    void take(int64_t row, const float* from, int64_t columns) const {
        for (int64_t tile = 0; tile < columns / LANES; tile++) store(at(tile, row), load(from + tile * LANES));
    }
    void give(int64_t row, float* to, int64_t columns) const {
        for (int64_t tile = 0; tile < columns / LANES; tile++) store(to + tile * LANES, load(at(tile, row)));
    }
};

// One product after another, each of the same x [m, widest] (of which it reads its own columns). Without
// y the results are left as a layer takes them.
void linears(Pool& pool, const Matrix* matrices, int64_t count, const float* x, int64_t widest, int64_t m,
             float* y, Precision asked, bool invariant) {
    const Precision precision = invariant ? asked : in_company(asked, m, widest);
    const ActivationBuffer buffer(m, widest, precision);
    int64_t most = 0;
    for (int64_t i = 0; i < count; i++) most = matrices[i].rows > most ? matrices[i].rows : most;
    const Columns dropped(y == nullptr ? m : 0, most);
    on_all(pool, 2 * count, [&](Phases phases, int thread) {
        const MatrixUnits units(precision);
        for (int64_t i = 0; i < count; i++) {
            const Matrix& w = matrices[i];
            const Activations a = buffer.of(w.columns);
            const Chunks chunks(pairs(w), pool.threads());
            expect(w, chunks, thread);
            phases.each(m, [&](int64_t row) { quantize(x + row * widest, row, a); });
            phases.each(chunks.count(), [&](int64_t chunk) {
                pairs_of_tiles(w, a, m, chunks.begin(chunk), chunks.end(chunk),
                               [&](int64_t number, int64_t row, int rows, const F* acc) {
                                   for (int j = 0; j < rows; j++)
                                       store(y == nullptr ? dropped.at(number, row + j)
                                                          : y + (row + j) * w.rows + number * TILE_ROWS,
                                             acc[j]);
                               });
            });
        }
    });
}

void gather_row(const Matrix& w, int64_t id, float* out) {
    const uint8_t* tile = w.data + size_t(id / TILE_ROWS) * w.tile_bytes();
    for (int64_t g = 0; g < w.columns / GROUP; g++) decode_group(w, tile, g, id % TILE_ROWS, out + g * GROUP);
}

void gather(Pool& pool, const Matrix& w, const int64_t* ids, int64_t m, float* out) {
    on_all(pool, 1, [&](Phases phases, int) {
        phases.each(m, [&](int64_t row) { gather_row(w, ids[row], out + row * w.columns); });
    });
}

#include "kv_write.inc"
#include "attention_tiles.inc"
#include "attention_units.inc"
#include "kv_read.inc"
#include "attention_block.inc"
#include "attention.inc"
#include "layers.inc"
#include "limits.inc"

}  // namespace

#define NAMED(isa) table_##isa
#define NAME(isa) NAMED(isa)
#define TEXTED(isa) #isa
#define TEXT(isa) TEXTED(isa)

static bool supported() {
#if defined(__AMX_INT8__)
    return matrix_units_granted();
#elif defined(__AVX512VNNI__)
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq");
#elif defined(__AVX512BW__)
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(__ARM_FEATURE_DOTPROD)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return true;
#endif
}

const Table& NAME(SANDERLING_ISA)() {
    static const Table table{TEXT(SANDERLING_ISA), supported, linears, gather, layers, attention, norm, read, multiply};
    return table;
}

}  // namespace sanderling
