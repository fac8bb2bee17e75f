// From GGUF's blocks to tiles of 16 rows: the same numbers in another order, nothing is rounded.
#pragma once

#include <ATen/ATen.h>

#include <string>

namespace sanderling {

// blocks: uint8, `rows` rows of blocks in format Q4_0, Q4_1, Q8_0, Q4_K or Q6_K. Rows are padded with zeros
// to a multiple of 16. ValueError for any other format or size.
at::Tensor pack_blocks(const at::Tensor& blocks, const std::string& format, int64_t rows, int64_t columns);

}  // namespace sanderling
