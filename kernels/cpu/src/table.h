// What one instruction set offers: the kernels behind the ops, as plain functions. ops.cpp picks a
// table when it runs; isa.cpp is compiled once for each.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pool.h"

namespace sanderling {

// Rows of a matrix lie in tiles of 16, columns in groups of 32.
constexpr int TILE_ROWS = 16;
constexpr int GROUP = 32;
constexpr size_t AFFINE4_BYTES = 16 * 32 / 2 + 2 * 16 * 2;     // nibbles, scales, minima
constexpr size_t SIGNED8_BYTES = 16 * 32;                      // bytes; the tile's scales follow the last
constexpr size_t SCALES_BYTES = 16 * 2;
// Of the nested kinds, whose scales are small integers times a half that 256 columns share.
constexpr int SUPER = 256;
constexpr int SUPER_GROUPS = SUPER / GROUP;
constexpr size_t NESTED4_SCALES = 16 * SUPER / 2;              // nibbles come first in a super-group
constexpr size_t NESTED4_BYTES = NESTED4_SCALES + SUPER_GROUPS * 2 * 16 + 2 * SCALES_BYTES;
constexpr size_t NESTED5_SCALES = 16 * SUPER;                  // bytes come first in a super-group
constexpr size_t NESTED5_BYTES = NESTED5_SCALES + SUPER_GROUPS * 2 * 16 + 2 * SCALES_BYTES;
constexpr size_t NESTED8_BYTES = SUPER_GROUPS * 2 * 16 + SCALES_BYTES;  // scales behind the tile's bytes

constexpr int64_t PEAK_MACS = 16 * 64;  // of one round of Table::multiply

// affine4 (Q4_0, Q4_1): nibbles, a scale and a minimum as halves. signed8 (Q8_0): bytes, a scale as a half.
// nested4 (Q4_K): nibbles, scale and minimum 6-bit integers times halves of the super-group. nested8 (Q6_K):
// bytes, of each 16 columns an 8-bit scale times a half of the super-group. nested5 (Q5_K): bytes that are
// not negative, scale and minimum as nested4 has them. Q5_0 is signed8 too.
enum class Kind { affine4 = 0, signed8 = 1, nested4 = 2, nested8 = 3, nested5 = 4 };
constexpr int KINDS = 5;

// A packed matrix [rows, columns]: rows a multiple of 16 (padded with zeros), columns of 32.
struct Matrix {
    const uint8_t* data;
    Kind kind;
    int64_t rows, columns;
    // A whole number of cache lines.
    SANDERLING_INLINE size_t tile_bytes() const {
        const size_t groups = size_t(columns / GROUP), supers = size_t(columns / SUPER);
        switch (kind) {
            case Kind::affine4: return groups * AFFINE4_BYTES;
            case Kind::signed8: return (groups * (SIGNED8_BYTES + SCALES_BYTES) + 63) / 64 * 64;
            case Kind::nested4: return supers * NESTED4_BYTES;
            case Kind::nested5: return supers * NESTED5_BYTES;
            default: return (groups * SIGNED8_BYTES + supers * NESTED8_BYTES + 63) / 64 * 64;
        }
    }
};

// Of activations in a product: rounded to 15 bits, rounded to 8, or as they are. Fixed nobody asks
// for: accurate and fast become it, see fixed.inc.
enum class Precision { accurate, fast, float32, fixed };

// How the cache stores one token's keys, or values, of one head; kernels/kv_formats.py says it for Python.
// int8: head_dim bytes, a float32 scale. int4: 16 bytes for each 32 numbers, byte j with number j low and
// j + 16 high; behind them 4 bytes for each 32, with keys their fifth bits, with values two halves: the
// values' scale and the keys'.
enum class KvFormat { float32, float16, int8, int4 };

SANDERLING_INLINE int64_t kv_bytes(KvFormat format, int64_t head_dim) {
    switch (format) {
        case KvFormat::float32: return 4 * head_dim;
        case KvFormat::float16: return 2 * head_dim;
        case KvFormat::int8: return head_dim + 4;
        default: return head_dim / 2 + head_dim / 32 * 4;
    }
}

// Shape of a decoder's layers. kv: this layer's [2, pages, page_tokens, kv_heads, kv_bytes].
struct Shape {
    int64_t hidden, heads, kv_heads, head_dim, ff, pages, page_tokens;
    float eps;
    KvFormat format;
    SANDERLING_INLINE int64_t head_bytes() const { return kv_bytes(format, head_dim); }
    SANDERLING_INLINE int64_t token_bytes() const { return kv_heads * head_bytes(); }
    // Of the keys of one layer, behind which its values lie.
    SANDERLING_INLINE int64_t half_bytes() const { return pages * page_tokens * token_bytes(); }
};

// One step's tokens: N rows, each of one sequence. tables [S, table_width].
struct Step {
    int64_t tokens, table_width;
    const int64_t *positions, *slots, *sequences, *tables;
    const float *cosines, *sines;  // [N, head_dim / 2]
};

// qkv lies in one matrix, or in up to three, one below the other, where its parts are of unlike kinds.
struct LayerWeights {
    Matrix qkv[3];
    int qkv_parts;
    Matrix out, gate_up, down;
    const float *mixer_norm, *feedforward_norm;
    const float* qkv_bias;  // nullptr for none
};

struct Table {
    const char* name;
    bool (*supported)();
    // y[m, rows] = x[m, columns] W^T for one matrix after another, of the first columns of the same x
    // [m, widest] into the same y, or dropped where y is nullptr.
    // invariant: a row's bits shall not depend on how many rows there are.
    void (*linears)(Pool&, const Matrix*, int64_t count, const float* x, int64_t widest, int64_t m, float* y,
                    Precision, bool invariant);
    // out[M, columns] = the M rows of W that ids name.
    void (*gather)(Pool&, const Matrix&, const int64_t* ids, int64_t m, float* out);
    // Layers first..first + count of x[N, hidden], in place; kv holds all layers.
    void (*layers)(Pool&, const Shape&, const Step&, const LayerWeights*, int64_t count, uint8_t* kv,
                   float* x, Precision, bool invariant);
    // The attention of one layer: qkv[N, heads + 2 kv_heads, head_dim] is rotated in place, keys and values
    // are written to the layer's kv, and out[N, heads, head_dim] is attended.
    void (*attention)(Pool&, const Shape&, const Step&, float* qkv, uint8_t* kv, float* out, bool invariant);
    void (*norm)(Pool&, const float* weight, float eps, int64_t size, const float* x, int64_t m, float* y);
    // What the machine can do at most: read `bytes` (a multiple of 64 per thread), or multiply and add
    // rounds * PEAK_MACS pairs of bytes on each thread. Both return a sum that nothing may leave out.
    int64_t (*read)(Pool&, const uint8_t* data, int64_t bytes);
    int64_t (*multiply)(Pool&, int64_t rounds);
};

const Table& table_amx();
const Table& table_vnni();
const Table& table_avx512();
const Table& table_avx2();
const Table& table_dotprod();
const Table& table_neon();
const Table& table_portable();

}  // namespace sanderling
