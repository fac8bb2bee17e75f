// The kernels, in sixteen lanes. Compiled once for each instruction set, with SANDERLING_ISA its name.
//
// Activations are quantised by groups of 32 values: accurate to 15 bits, as a signed high and an
// unsigned low part of 7 bits, or fast to 8. A product's sums over a group are exact integers; scales
// and minima come in afterwards, group by group. So a row's result depends neither on the other rows
// nor on threads, tiles or the instruction set.
#include "table.h"

#include <cstdlib>

#include "lanes.h"
#include "lanes_attention.h"

namespace sanderling {
namespace {

constexpr float ACCURATE_LEVELS = 16256.f;  // 127 * 128
constexpr float FAST_LEVELS = 127.f;

// Memory of one call. No std::vector: its code would be shared by all instruction sets.
template <class T> struct Buffer {
    T* at = nullptr;
    explicit Buffer(int64_t count) : at(static_cast<T*>(std::malloc(size_t(count) * sizeof(T) + 64))) {}
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

// How a matrix's tiles are handed out: a few together, since taking one costs as much as a short one.
struct Chunks {
    int64_t tiles, size;
    Chunks(int64_t all, int threads) : tiles(all), size(all / (threads * 8)) { size = size < 1 ? 1 : size; }
    int64_t count() const { return (tiles + size - 1) / size; }
    int64_t begin(int64_t chunk) const { return chunk * size; }
    int64_t end(int64_t chunk) const { return (chunk + 1) * size < tiles ? (chunk + 1) * size : tiles; }
};

// Quantised rows [m, columns] with a scale and a scaled sum for each group.
struct Activations {
    int64_t columns;
    int8_t *high, *low;
    float *scale, *sum;
};

// The memory behind Activations of at most `most` values.
struct ActivationBuffer {
    Buffer<int8_t> high, low;
    Buffer<float> scale, sum;
    explicit ActivationBuffer(int64_t most)
        : high(most), low(most), scale(most / GROUP), sum(most / GROUP) {}
    Activations of(int64_t columns) { return {columns, high.at, low.at, scale.at, sum.at}; }
};

// Groups [begin, end) of a row.
void quantize(const float* x, int64_t row, int64_t begin, int64_t end, const Activations& a, bool accurate) {
    const float levels = accurate ? ACCURATE_LEVELS : FAST_LEVELS;
    for (int64_t g = begin; g < end; g++) {
        F first = load(x + g * GROUP), second = load(x + g * GROUP + LANES);
        float largest_value = largest(max(abs(first), abs(second)));
        F inverse = set(largest_value > 0.f ? levels / largest_value : 0.f);
        I q1 = rounded(first * inverse), q2 = rounded(second * inverse);
        int8_t* high = a.high + row * a.columns + g * GROUP;
        int8_t* low = a.low + row * a.columns + g * GROUP;
        if (accurate) {
            store_bytes(high, right<7>(q1));
            store_bytes(high + LANES, right<7>(q2));
            store_bytes(low, both(q1, 127));
            store_bytes(low + LANES, both(q2, 127));
        } else {
            store_bytes(high, q1);
            store_bytes(high + LANES, q2);
        }
        int64_t at = row * (a.columns / GROUP) + g;
        a.scale[at] = largest_value / levels;
        a.sum[at] = a.scale[at] * float(sum(q1 + q2));
    }
}

inline void read4(const int8_t* p, int32_t* out) { std::memcpy(out, p, 4); }

// acc[m] = the sixteen outputs of one tile for M rows of activations from `row` on.
template <int M, bool ACCURATE>
void tile_affine4(const uint8_t* w, const Activations& a, int64_t row, F* acc) {
    const int64_t groups = a.columns / GROUP;
    for (int m = 0; m < M; m++) acc[m] = zero();
    for (int64_t g = 0; g < groups; g++, w += AFFINE4_BYTES) {
        for (size_t line = 0; line < AFFINE4_BYTES; line += 64)
            __builtin_prefetch(w + 5 * AFFINE4_BYTES + line);
        Bytes low[4], high[4];
        for (int j = 0; j < 4; j++) {
            Bytes both_halves = load_bytes(w + 64 * j);
            low[j] = low_nibbles(both_halves);
            high[j] = high_nibbles(both_halves);
        }
        F scale = load_half(w + 256), minimum = load_half(w + 288);
        for (int m = 0; m < M; m++) {
            const int8_t* coarse = a.high + (row + m) * a.columns + g * GROUP;
            const int8_t* fine = a.low + (row + m) * a.columns + g * GROUP;
            I s = izero(), t = izero();
            for (int j = 0; j < 4; j++) {
                int32_t q[2];
                std::memcpy(q, coarse + 8 * j, 8);
                s = dot_unsigned(dot_unsigned(s, low[j], q[0]), high[j], q[1]);
                if (ACCURATE) {
                    std::memcpy(q, fine + 8 * j, 8);
                    t = dot_unsigned(dot_unsigned(t, low[j], q[0]), high[j], q[1]);
                }
            }
            F whole = to_float(ACCURATE ? left<7>(s) + t : s);
            int64_t at = (row + m) * groups + g;
            acc[m] = fma(whole * scale, set(a.scale[at]), acc[m]);
            acc[m] = fma(minimum, set(a.sum[at]), acc[m]);
        }
    }
}

template <int M, bool ACCURATE>
void tile_signed8(const uint8_t* w, const Activations& a, int64_t row, F* acc) {
    const int64_t groups = a.columns / GROUP;
    for (int m = 0; m < M; m++) acc[m] = zero();
    for (int64_t g = 0; g < groups; g++, w += SIGNED8_BYTES) {
        for (size_t line = 0; line < SIGNED8_BYTES; line += 64)
            __builtin_prefetch(w + 4 * SIGNED8_BYTES + line);
        Bytes v[8];
        for (int j = 0; j < 8; j++) v[j] = load_bytes(w + 64 * j);
        F scale = load_half(w + 512);
        I start = correction(load_int(w + 544));
        for (int m = 0; m < M; m++) {
            const int8_t* coarse = a.high + (row + m) * a.columns + g * GROUP;
            const int8_t* fine = a.low + (row + m) * a.columns + g * GROUP;
            I s = start, t = izero();
            for (int j = 0; j < 8; j++) {
                int32_t q;
                read4(coarse + 4 * j, &q);
                s = dot_signed(s, v[j], q);
                if (ACCURATE) {
                    read4(fine + 4 * j, &q);
                    t = dot_positive(t, v[j], q);
                }
            }
            F whole = to_float(ACCURATE ? left<7>(s) + t : s);
            acc[m] = fma(whole * scale, set(a.scale[(row + m) * groups + g]), acc[m]);
        }
    }
}

template <int M>
void tile(const Matrix& w, int64_t number, const Activations& a, int64_t row, bool accurate, F* acc) {
    const uint8_t* data = w.data + size_t(number) * w.tile_bytes();
    if (w.kind == Kind::affine4)
        accurate ? tile_affine4<M, true>(data, a, row, acc) : tile_affine4<M, false>(data, a, row, acc);
    else
        accurate ? tile_signed8<M, true>(data, a, row, acc) : tile_signed8<M, false>(data, a, row, acc);
}

// each(tile, row, count, acc): all rows of the tiles from `begin` to `end`, as many rows at a time as
// registers hold.
template <class Each>
void tiles(const Matrix& w, const Activations& a, int64_t m, bool accurate, int64_t begin, int64_t end, Each each) {
    for (int64_t number = begin; number < end; number++) {
        F acc[4];
        int64_t row = 0;
        for (; m - row >= 4; row += 4) {
            tile<4>(w, number, a, row, accurate, acc);
            each(number, row, 4, acc);
        }
        for (; m - row >= 2; row += 2) {
            tile<2>(w, number, a, row, accurate, acc);
            each(number, row, 2, acc);
        }
        if (m > row) {
            tile<1>(w, number, a, row, accurate, acc);
            each(number, row, 1, acc);
        }
    }
}

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

void linear(Pool& pool, const Matrix& w, const float* x, int64_t m, float* y, bool accurate) {
    ActivationBuffer buffer(m * w.columns);
    const Activations a = buffer.of(w.columns);
    const Chunks chunks(w.rows / TILE_ROWS, pool.threads());
    auto keep = [&](int64_t number, int64_t row, int count, F* acc) {
        for (int i = 0; i < count; i++) store(y + (row + i) * w.rows + number * TILE_ROWS, acc[i]);
    };
    on_all(pool, 2, [&](Phases phases, int) {
        phases.each(m, [&](int64_t row) {
            quantize(x + row * w.columns, row, 0, w.columns / GROUP, a, accurate);
        });
        phases.each(chunks.count(), [&](int64_t chunk) {
            tiles(w, a, m, accurate, chunks.begin(chunk), chunks.end(chunk), keep);
        });
    });
}

void gather_row(const Matrix& w, int64_t id, float* out) {
    const uint8_t* block = w.data + size_t(id / TILE_ROWS) * w.tile_bytes();
    const int lane = int(id % TILE_ROWS);
    for (int64_t g = 0; g < w.columns / GROUP; g++, block += w.block_bytes(), out += GROUP) {
        uint16_t half;
        if (w.kind == Kind::signed8) {
            std::memcpy(&half, block + 512 + 2 * lane, 2);
            float scale = half_to_float(half);
            for (int k = 0; k < GROUP; k++)
                out[k] = scale * float(int8_t(block[64 * (k / 4) + 4 * lane + k % 4]));
        } else {
            std::memcpy(&half, block + 256 + 2 * lane, 2);
            float scale = half_to_float(half);
            std::memcpy(&half, block + 288 + 2 * lane, 2);
            float minimum = half_to_float(half);
            for (int k = 0; k < GROUP; k++) {
                uint8_t byte = block[64 * (k / 8) + 4 * lane + k % 4];
                out[k] = scale * float(k % 8 < 4 ? byte & 15 : byte >> 4) + minimum;
            }
        }
    }
}

void gather(Pool& pool, const Matrix& w, const int64_t* ids, int64_t m, float* out) {
    on_all(pool, 1, [&](Phases phases, int) {
        phases.each(m, [&](int64_t row) { gather_row(w, ids[row], out + row * w.columns); });
    });
}

#include "kv_write.inc"
#include "attention_tiles.inc"
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
#if defined(__AVX512VNNI__)
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq");
#elif defined(__AVX512BW__)
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return true;
#endif
}

const Table& NAME(SANDERLING_ISA)() {
    static const Table table{TEXT(SANDERLING_ISA), supported, linear, gather, layers, attention, norm, read, multiply};
    return table;
}

}  // namespace sanderling
