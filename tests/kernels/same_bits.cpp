// A digest of what one object of isa.cpp computes, a line for each case: products in every kind and
// precision, rows, a norm, attention over every cache format, and a layer. test_build.py compares the
// lines of two machines. NAMED: the table's name.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "table.h"

using namespace sanderling;

namespace {

// Numbers of a simple generator; no library, whose own might differ between machines.
struct Chance {
    uint64_t state;
    uint32_t next() { return uint32_t((state = state * 6364136223846793005u + 1442695040888963407u) >> 33); }
    float real() { return float(int32_t(next() % 65536) - 32768) / 8192.f; }
    std::vector<float> reals(int64_t count) {
        std::vector<float> made(static_cast<size_t>(count));
        for (float& each : made) each = real();
        return made;
    }
    // Bytes of which every two are a half below 2, so that scales may be among them.
    std::vector<uint8_t> bytes(size_t count) {
        std::vector<uint8_t> made(count);
        for (uint8_t& each : made) each = uint8_t(next() & 0xbf);
        return made;
    }
};

void say(const char* name, int a, int b, const void* data, size_t bytes) {
    uint64_t digest = 14695981039346656037u;
    for (size_t i = 0; i < bytes; i++) digest = (digest ^ static_cast<const uint8_t*>(data)[i]) * 1099511628211u;
    std::printf("%s %d %d %016llx\n", name, a, b, static_cast<unsigned long long>(digest));
}

void say(const char* name, int a, int b, const std::vector<float>& made) {
    for (float each : made)
        if (!std::isfinite(each)) std::printf("%s %d %d is not finite\n", name, a, b);
    say(name, a, b, made.data(), made.size() * sizeof(float));
}

struct Weights {
    std::vector<uint8_t> data;
    Matrix matrix;
    Weights(Chance& chance, Kind kind, int64_t rows, int64_t columns) : matrix{nullptr, kind, rows, columns} {
        data = chance.bytes(size_t(rows / TILE_ROWS) * matrix.tile_bytes());
        if (kind == Kind::nested5)  // whose levels are bytes below 32
            for (size_t at = 0; at < data.size(); at++)
                if (at % NESTED5_BYTES < NESTED5_SCALES) data[at] &= 31;
        matrix.data = data.data();
    }
};

void products(const Table& table, Pool& pool, Chance& chance) {
    constexpr int64_t ROWS = 48, COLUMNS = 512, M = 7;
    for (int kind = 0; kind < KINDS; kind++) {
        const Weights w(chance, Kind(kind), ROWS, COLUMNS);
        const std::vector<float> x = chance.reals(M * COLUMNS);
        for (int precision = 0; precision < 3; precision++) {
            std::vector<float> y(M * ROWS);
            table.linears(pool, &w.matrix, 1, x.data(), COLUMNS, M, y.data(), Precision(precision), true);
            say("product", kind, precision, y);
        }
        const int64_t ids[] = {0, 17, 47};
        std::vector<float> rows(3 * COLUMNS);
        table.gather(pool, w.matrix, ids, 3, rows.data());
        say("rows", kind, 0, rows);
    }
}

void norm(const Table& table, Pool& pool, Chance& chance) {
    const std::vector<float> x = chance.reals(3 * 96), weight = chance.reals(96);
    std::vector<float> y(x.size());
    table.norm(pool, weight.data(), 1e-5f, 96, x.data(), 3, y.data());
    say("norm", 0, 0, y);
}

// A sequence of TOKENS whose pages lie in order.
struct Sequence {
    static constexpr int64_t TOKENS = 21, PAGE = 8, PAGES = 3, DIM = 64;
    std::vector<int64_t> positions, sequences, tables{0, 1, 2};
    std::vector<float> cosines, sines;
    explicit Sequence(Chance& chance) : sequences(size_t(TOKENS), 0), cosines(chance.reals(TOKENS * DIM / 2)) {
        for (int64_t at = 0; at < TOKENS; at++) positions.push_back(at);
        sines = chance.reals(TOKENS * DIM / 2);
    }
    Step step() const {
        return {TOKENS, PAGES, positions.data(), positions.data(), sequences.data(), tables.data(), cosines.data(), sines.data()};
    }
};

void attention(const Table& table, Pool& pool, Chance& chance) {
    const Sequence sequence(chance);
    for (int format = 0; format < 4; format++) {
        const Shape shape{0, 4, 2, Sequence::DIM, 0, Sequence::PAGES, Sequence::PAGE, 0.f, KvFormat(format)};
        std::vector<float> qkv = chance.reals(Sequence::TOKENS * 8 * Sequence::DIM);
        std::vector<uint8_t> kv(size_t(2 * shape.half_bytes()));
        std::vector<float> out(size_t(Sequence::TOKENS * 4 * Sequence::DIM));
        table.attention(pool, shape, sequence.step(), qkv.data(), kv.data(), out.data(), true);
        say("attention", format, 0, out);
        say("kv", format, 0, kv.data(), kv.size());
    }
}

void layer(const Table& table, Pool& pool, Chance& chance) {
    constexpr int64_t HIDDEN = 256, FF = 256, INNER = 4 * Sequence::DIM, KV = 2 * Sequence::DIM;
    const Sequence sequence(chance);
    const Shape shape{HIDDEN, 4, 2, Sequence::DIM, FF, Sequence::PAGES, Sequence::PAGE, 1e-5f, KvFormat::float16};
    const Weights qk(chance, Kind::nested4, INNER + KV, HIDDEN), v(chance, Kind::nested8, KV, HIDDEN);
    const Weights out(chance, Kind::affine4, HIDDEN, INNER), gate_up(chance, Kind::nested4, 2 * FF, HIDDEN);
    const Weights down(chance, Kind::signed8, HIDDEN, FF);
    const std::vector<float> norms = chance.reals(HIDDEN), start = chance.reals(Sequence::TOKENS * HIDDEN);
    const std::vector<float> bias = chance.reals(INNER + 2 * KV);
    const LayerWeights weights{{qk.matrix, v.matrix, {}}, 2,            out.matrix,   gate_up.matrix,
                               down.matrix,               norms.data(), norms.data(), bias.data()};
    for (int precision = 0; precision < 3; precision++) {
        std::vector<float> x = start;
        std::vector<uint8_t> kv(size_t(2 * shape.half_bytes()));
        table.layers(pool, shape, sequence.step(), &weights, 1, kv.data(), x.data(), Precision(precision), true);
        say("layer", precision, 0, x);
    }
}

}  // namespace

int main() {
    const Table& table = NAMED();
    if (!table.supported()) return 77;
    Pool pool(2);
    Chance chance{1};
    products(table, pool, chance);
    norm(table, pool, chance);
    attention(table, pool, chance);
    layer(table, pool, chance);
    return 0;
}
