#include "pack.h"

#include <cstring>

#include "table.h"

namespace sanderling {
namespace {

// The nibble of value k in a block of 32: ggml keeps k and k + 16 in one byte.
uint8_t nibble(const uint8_t* nibbles, int k) { return k < 16 ? nibbles[k] & 15 : nibbles[k - 16] >> 4; }

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

void pack_affine(const uint8_t* block, int lane, bool with_minimum, uint8_t* to, bool& exact) {
    const uint8_t* nibbles = block + (with_minimum ? 4 : 2);
    for (int k = 0; k < GROUP; k++) {
        uint8_t& byte = to[64 * (k / 8) + 4 * lane + k % 4];
        byte = uint8_t(k % 8 < 4 ? (byte & 0xf0) | nibble(nibbles, k) : (byte & 15) | (nibble(nibbles, k) << 4));
    }
    uint16_t scale, minimum;
    std::memcpy(&scale, block, 2);
    if (with_minimum)
        std::memcpy(&minimum, block + 2, 2);
    else
        minimum = minus_eight_times(scale, exact);
    std::memcpy(to + 256 + 2 * lane, &scale, 2);
    std::memcpy(to + 288 + 2 * lane, &minimum, 2);
}

void pack_signed(const uint8_t* block, int lane, uint8_t* bytes, uint8_t* scales) {
    for (int k = 0; k < GROUP; k++) bytes[64 * (k / 4) + 4 * lane + k % 4] = block[2 + k];
    std::memcpy(scales + 2 * lane, block, 2);
}

}  // namespace

at::Tensor pack_blocks(const at::Tensor& blocks, const std::string& format, int64_t rows, int64_t columns) {
    const int64_t size = format == "Q4_0" ? 18 : format == "Q4_1" ? 20 : format == "Q8_0" ? 34 : 0;
    TORCH_CHECK_VALUE(size != 0, "format ", format, " is not packed; Q4_0, Q4_1 and Q8_0 are");
    TORCH_CHECK_VALUE(rows > 0 && columns > 0 && columns % GROUP == 0, "columns should be a multiple of 32, not ", columns);
    const int64_t groups = columns / GROUP, tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    TORCH_CHECK_VALUE(blocks.scalar_type() == at::kByte && blocks.is_contiguous() && blocks.numel() == rows * groups * size,
                      "blocks should be ", rows * groups * size, " contiguous bytes");
    const bool affine = format != "Q8_0";
    const int64_t bytes = int64_t(Matrix{nullptr, affine ? Kind::affine4 : Kind::signed8, rows, columns}.tile_bytes());
    at::Tensor packed = at::zeros({tiles * bytes}, blocks.options());
    const uint8_t* from = blocks.const_data_ptr<uint8_t>();
    uint8_t* to = packed.data_ptr<uint8_t>();
    bool exact = true;
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t g = 0; g < groups; g++) {
            const uint8_t* block = from + (row * groups + g) * size;
            uint8_t* tile = to + row / TILE_ROWS * bytes;
            const int lane = int(row % TILE_ROWS);
            if (affine)
                pack_affine(block, lane, format == "Q4_1", tile + g * int64_t(AFFINE4_BYTES), exact);
            else
                pack_signed(block, lane, tile + g * int64_t(SIGNED8_BYTES),
                            tile + groups * int64_t(SIGNED8_BYTES) + g * int64_t(SCALES_BYTES));
        }
    }
    TORCH_CHECK_VALUE(exact, "a scale of the matrix is too large to be packed without loss");
    return packed;
}

}  // namespace sanderling
