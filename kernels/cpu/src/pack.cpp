#include "pack.h"

#include <cstring>

#include "table.h"

namespace sanderling {
namespace {

void put_nibble(uint8_t* group, int lane, int k, int value) {
    uint8_t& byte = group[64 * (k / 8) + 4 * lane + k % 4];
    byte = uint8_t(k % 8 < 4 ? (byte & 0xf0) | value : (byte & 15) | (value << 4));
}

void put_byte(uint8_t* tile, int lane, int column, int value) {
    tile[column / GROUP * int(SIGNED8_BYTES) + column % GROUP / 4 * 64 + 4 * lane + column % 4] = uint8_t(value);
}

uint16_t half_at(const uint8_t* p) {
    uint16_t half;
    std::memcpy(&half, p, 2);
    return half;
}

void put_half(uint8_t* scales, int lane, uint16_t half) { std::memcpy(scales + 2 * lane, &half, 2); }

// -8 times a half: exact, but where that is beyond what a half can hold.
uint16_t minus_eight_times(uint16_t half, bool& exact) {
    const int exponent = (half >> 10) & 31;
    if ((half & 0x7fff) == 0) return half ^ 0x8000;
    if (exponent == 0) {  // subnormal: three bits to the left, into the normal range if need be
        uint32_t mantissa = uint32_t(half & 1023) << 3, power = 0;
        for (power = 1; mantissa >= 2048; power++) mantissa >>= 1;
        uint16_t made = mantissa >= 1024 ? uint16_t((power << 10) | (mantissa & 1023)) : uint16_t(mantissa);
        return made | uint16_t((half & 0x8000) ^ 0x8000);
    }
    exact = exact && exponent + 3 < 31;
    return uint16_t((half ^ 0x8000) + (3 << 10));
}

// One block of a row; it begins at `column` of lane `lane` of a tile of `columns`.
struct Place {
    uint8_t* tile;
    int lane;
    int64_t column, columns;
};

void pack_affine(const uint8_t* block, const Place& to, bool with_minimum, bool& exact) {
    const uint8_t* nibbles = block + (with_minimum ? 4 : 2);
    uint8_t* group = to.tile + to.column / GROUP * int64_t(AFFINE4_BYTES);
    for (int k = 0; k < 16; k++) {  // k and k + 16 are in one byte
        put_nibble(group, to.lane, k, nibbles[k] & 15);
        put_nibble(group, to.lane, k + 16, nibbles[k] >> 4);
    }
    const uint16_t scale = half_at(block);
    put_half(group + 256, to.lane, scale);
    put_half(group + 288, to.lane, with_minimum ? half_at(block + 2) : minus_eight_times(scale, exact));
}

void pack_signed(const uint8_t* block, const Place& to) {
    const int64_t group = to.column / GROUP;
    uint8_t* bytes = to.tile + group * int64_t(SIGNED8_BYTES);
    for (int k = 0; k < GROUP; k++) put_byte(bytes, to.lane, k, block[2 + k]);
    put_half(to.tile + to.columns / GROUP * int64_t(SIGNED8_BYTES) + group * int64_t(SCALES_BYTES), to.lane, half_at(block));
}

// Q5_0: a half, a word of fifth bits, and nibbles. Values are 16 less than what is stored.
void pack_q5_0(const uint8_t* block, const Place& to) {
    const int64_t group = to.column / GROUP;
    uint8_t* bytes = to.tile + group * int64_t(SIGNED8_BYTES);
    for (int k = 0; k < GROUP; k++) {
        const int low = block[6 + k % 16] >> (k / 16 * 4) & 15, fifth = block[2 + k / 8] >> (k % 8) & 1;
        put_byte(bytes, to.lane, k, (low | fifth << 4) - 16);
    }
    put_half(to.tile + to.columns / GROUP * int64_t(SIGNED8_BYTES) + group * int64_t(SCALES_BYTES), to.lane, half_at(block));
}

// Scales and minima of Q4_K and Q5_K: two halves, then eight scales and eight minima of 6 bits in 12 bytes.
// Minima are subtracted.
void pack_nested_scales(const uint8_t* block, int lane, uint8_t* inner) {
    const uint8_t* six = block + 4;
    for (int g = 0; g < SUPER_GROUPS; g++) {
        inner[32 * g + lane] = g < 4 ? six[g] & 63 : uint8_t((six[g + 4] & 15) | (six[g - 4] >> 6 << 4));
        inner[32 * g + 16 + lane] = g < 4 ? six[g + 4] & 63 : uint8_t((six[g + 4] >> 4) | (six[g] >> 6 << 4));
    }
    uint8_t* outer = inner + SUPER_GROUPS * 32;
    put_half(outer, lane, half_at(block));
    put_half(outer + SCALES_BYTES, lane, half_at(block + 2) ^ 0x8000);
}

// Q4_K: scales, and nibbles: each 32 bytes have one group in their low halves and the next in their high ones.
void pack_q4_k(const uint8_t* block, const Place& to) {
    uint8_t* super = to.tile + to.column / SUPER * int64_t(NESTED4_BYTES);
    const uint8_t* nibbles = block + 16;
    for (int k = 0; k < SUPER; k++) {
        const int g = k / GROUP;
        put_nibble(super + 256 * g, to.lane, k % GROUP, (nibbles[g / 2 * 32 + k % GROUP] >> (g % 2 * 4)) & 15);
    }
    pack_nested_scales(block, to.lane, super + NESTED4_SCALES);
}

// Q5_K: as Q4_K, with 32 bytes of fifth bits before the nibbles, bit g of each those of group g.
void pack_q5_k(const uint8_t* block, const Place& to) {
    uint8_t* super = to.tile + to.column / SUPER * int64_t(NESTED5_BYTES);
    const uint8_t *fifths = block + 16, *nibbles = block + 48;
    for (int k = 0; k < SUPER; k++) {
        const int g = k / GROUP, at = k % GROUP;
        const int low = nibbles[g / 2 * 32 + at] >> (g % 2 * 4) & 15;
        put_byte(super, to.lane, k, low | (fifths[at] >> g & 1) << 4);
    }
    pack_nested_scales(block, to.lane, super + NESTED5_SCALES);
}

// Q6_K: of each 128 values 64 bytes with low nibbles of the first and the last 64, 32 bytes with two high
// bits of each 32; then sixteen scales of 8 bits, and a half. Values are 32 less than what is stored.
void pack_q6_k(const uint8_t* block, const Place& to) {
    uint8_t* bytes = to.tile + to.column / GROUP * int64_t(SIGNED8_BYTES);
    for (int k = 0; k < SUPER; k++) {
        const int part = k / 128, at = k % 128;
        const int low = (block[64 * part + at % 64] >> (at / 64 * 4)) & 15;
        const int high = (block[128 + 32 * part + at % 32] >> (at / 32 * 2)) & 3;
        put_byte(bytes, to.lane, k, (low | high << 4) - 32);
    }
    uint8_t* super = to.tile + to.columns / GROUP * int64_t(SIGNED8_BYTES) + to.column / SUPER * int64_t(NESTED8_BYTES);
    for (int i = 0; i < 16; i++) super[16 * i + to.lane] = block[192 + i];
    put_half(super + NESTED8_BYTES - SCALES_BYTES, to.lane, half_at(block + 208));
}

struct Format {
    const char* name;
    Kind kind;
    int64_t values, bytes;  // of a block
};

constexpr Format FORMATS[] = {{"Q4_0", Kind::affine4, 32, 18},
                              {"Q4_1", Kind::affine4, 32, 20},
                              {"Q5_0", Kind::signed8, 32, 22},
                              {"Q8_0", Kind::signed8, 32, 34},
                              {"Q4_K", Kind::nested4, 256, 144},
                              {"Q5_K", Kind::nested5, 256, 176},
                              {"Q6_K", Kind::nested8, 256, 210}};

void pack_block(const Format& format, const uint8_t* block, const Place& to, bool& exact) {
    switch (format.kind) {
        case Kind::affine4: return pack_affine(block, to, format.bytes == 20, exact);
        case Kind::signed8: return format.bytes == 22 ? pack_q5_0(block, to) : pack_signed(block, to);
        case Kind::nested4: return pack_q4_k(block, to);
        case Kind::nested5: return pack_q5_k(block, to);
        case Kind::nested8: return pack_q6_k(block, to);
    }
}

}  // namespace

at::Tensor pack_blocks(const at::Tensor& blocks, const std::string& name, int64_t rows, int64_t columns) {
    const Format* format = nullptr;
    for (const Format& known : FORMATS)
        if (name == known.name) format = &known;
    TORCH_CHECK_VALUE(format != nullptr, "format ", name, " is not packed; Q4_0, Q4_1, Q5_0, Q8_0, Q4_K, Q5_K and Q6_K are");
    TORCH_CHECK_VALUE(rows > 0 && columns > 0 && columns % format->values == 0, "columns should be a multiple of ",
                      format->values, ", not ", columns);
    const int64_t in_row = columns / format->values, tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    TORCH_CHECK_VALUE(blocks.scalar_type() == at::kByte && blocks.is_contiguous() &&
                          blocks.numel() == rows * in_row * format->bytes,
                      "blocks should be ", rows * in_row * format->bytes, " contiguous bytes");
    const int64_t bytes = int64_t(Matrix{nullptr, format->kind, rows, columns}.tile_bytes());
    at::Tensor packed = at::zeros({tiles * bytes}, blocks.options());
    const uint8_t* from = blocks.const_data_ptr<uint8_t>();
    uint8_t* to = packed.data_ptr<uint8_t>();
    bool exact = true;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < in_row; i++, from += format->bytes)
            pack_block(*format, from, {to + row / TILE_ROWS * bytes, int(row % TILE_ROWS), i * format->values, columns},
                       exact);
    TORCH_CHECK_VALUE(exact, "a scale of the matrix is too large to be packed without loss");
    return packed;
}

}  // namespace sanderling
