// Packed matrices as torch hands them over, checked: one, or those of a layer. Part of ops.cpp.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "table.h"

namespace sanderling {

inline void check_float(const at::Tensor& t, const char* name) {
    TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat && t.is_contiguous() && t.device().is_cpu(), name,
                      " should be a contiguous float32 tensor on the CPU");
}

inline Matrix matrix(const at::Tensor& packed, int64_t kind, int64_t rows, int64_t columns) {
    TORCH_CHECK_VALUE(kind >= 0 && kind < KINDS, "kind is ", kind, "; 0 to ", KINDS - 1, " are accepted");
    const int multiple = Kind(kind) == Kind::affine4 || Kind(kind) == Kind::signed8 ? GROUP : SUPER;
    TORCH_CHECK_VALUE(rows > 0 && rows % TILE_ROWS == 0 && columns > 0 && columns % multiple == 0,
                      "a packed matrix of kind ", kind, " has a multiple of 16 rows and of ", multiple,
                      " columns, not ", rows, " x ", columns);
    Matrix made{packed.const_data_ptr<uint8_t>(), Kind(kind), rows, columns};
    int64_t bytes = rows / TILE_ROWS * int64_t(made.tile_bytes());
    TORCH_CHECK_VALUE(packed.is_contiguous() && packed.numel() == bytes, "a packed matrix of ", rows, " x ",
                      columns, " has ", bytes, " bytes, not ", packed.numel());
    return made;
}

// Takes the matrices of one layer after another, as they are asked for.
struct Matrices {
    const std::vector<at::Tensor>& packed;
    at::IntArrayRef kinds, rows;
    size_t taken = 0;

    Matrix next(int64_t columns) {
        TORCH_CHECK_VALUE(taken < packed.size(), "there are too few packed matrices for the layers");
        const size_t at = taken++;
        return matrix(packed[at], kinds[at], rows[at], columns);
    }
    Matrix next(int64_t wanted_rows, int64_t columns) {
        const Matrix made = next(columns);
        TORCH_CHECK_VALUE(made.rows == wanted_rows, "a matrix of ", wanted_rows, " rows is wanted, not of ", made.rows);
        return made;
    }
};

inline LayerWeights weights_of(const Shape& shape, Matrices& matrices, int64_t qkv_parts) {
    const int64_t inner = shape.heads * shape.head_dim, wide = inner + 2 * shape.kv_heads * shape.head_dim;
    TORCH_CHECK_VALUE(qkv_parts >= 1 && qkv_parts <= 3, "qkv_parts is ", qkv_parts, "; 1 to 3 are accepted");
    LayerWeights made{};
    made.qkv_parts = int(qkv_parts);
    int64_t rows = 0;
    for (int part = 0; part < made.qkv_parts; part++) {
        made.qkv[part] = matrices.next(shape.hidden);
        rows += made.qkv[part].rows;
    }
    TORCH_CHECK_VALUE(rows == wide, "the parts of qkv should have ", wide, " rows together, not ", rows);
    made.out = matrices.next(shape.hidden, inner);
    made.gate_up = matrices.next(2 * shape.ff, shape.hidden);
    made.down = matrices.next(shape.hidden, shape.ff);
    return made;
}

}  // namespace sanderling
