// The ops as torch sees them: checks of shapes and types, the choice of an instruction set and of a
// pool of threads. kernels/cpu/ops.py registers their fakes.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "pack.h"
#include "table.h"
#include "weights.h"

namespace sanderling {
namespace {

std::vector<const Table*> tables() {
#if defined(__x86_64__)
    return {&table_amx(), &table_vnni(), &table_avx512(), &table_avx2(), &table_portable()};
#elif defined(__aarch64__)
    return {&table_dotprod(), &table_neon(), &table_portable()};
#else
    return {&table_portable()};
#endif
}

// The named instruction set, or for "auto" the best that this machine has.
const Table& choose(const std::string& isa) {
    std::string known;
    for (const Table* table : tables()) {
        if (isa == "auto" ? table->supported() : isa == table->name) {
            TORCH_CHECK_VALUE(table->supported(), "this machine has no ", isa);
            return *table;
        }
        known += std::string(known.empty() ? "" : ", ") + table->name;
    }
    TORCH_CHECK_VALUE(false, "instruction set '", isa, "' is not known; auto and ", known, " are");
}

Precision precision_of(const std::string& activations) {
    if (activations == "accurate") return Precision::accurate;
    if (activations == "fast") return Precision::fast;
    TORCH_CHECK_VALUE(activations == "float32", "activations is '", activations,
                      "'; accurate, fast and float32 are accepted");
    return Precision::float32;
}

// One pool for each number of threads, kept: an op is called hundreds of times a second.
Pool& pool_of(int64_t threads) {
    TORCH_CHECK_VALUE(threads >= 1 && threads <= 1024, "threads is ", threads, "; 1 to 1024 are accepted");
    static std::mutex mutex;
    static std::map<int64_t, std::unique_ptr<Pool>> pools;
    std::lock_guard<std::mutex> lock(mutex);
    auto& pool = pools[threads];
    if (!pool) pool = std::make_unique<Pool>(int(threads));
    return *pool;
}

// Ops share a pool's threads, so only one is computed at a time.
std::mutex& computing() {
    static std::mutex mutex;
    return mutex;
}

const int64_t* indices(const at::Tensor& t, int64_t count, const char* name) {
    TORCH_CHECK_VALUE(t.scalar_type() == at::kLong && t.is_contiguous() && t.numel() == count, name,
                      " should be ", count, " contiguous int64 values");
    return t.const_data_ptr<int64_t>();
}

at::Tensor pack(const at::Tensor& blocks, std::string format, int64_t rows, int64_t columns) {
    return pack_blocks(blocks, format, rows, columns);
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& packed, int64_t kind, int64_t rows,
                  std::string activations, int64_t threads, std::string isa, bool invariant) {
    check_float(x, "x");
    TORCH_CHECK_VALUE(x.dim() == 2, "x should have two dimensions");
    const Matrix w = matrix(packed, kind, rows, x.size(1));
    const Precision precision = precision_of(activations);
    at::Tensor y = at::empty({x.size(0), rows}, x.options());
    const Table& table = choose(isa);
    std::lock_guard<std::mutex> lock(computing());
    if (x.size(0) > 0)
        table.linears(pool_of(threads), &w, 1, x.const_data_ptr<float>(), x.size(1), x.size(0), y.data_ptr<float>(),
                      precision, invariant);
    return y;
}

// All products of a step and nothing else: a benchmark's. x [m, the widest's columns].
void linears(const at::Tensor& x, const std::vector<at::Tensor>& packed, at::IntArrayRef kinds,
             at::IntArrayRef rows, at::IntArrayRef columns, std::string activations, int64_t threads,
             std::string isa, bool invariant) {
    check_float(x, "x");
    TORCH_CHECK_VALUE(x.dim() == 2 && x.size(0) > 0, "x should have two dimensions and at least one row");
    TORCH_CHECK_VALUE(kinds.size() == packed.size() && rows.size() == packed.size() && columns.size() == packed.size(),
                      "a kind, rows and columns are wanted for each of ", packed.size(), " matrices");
    std::vector<Matrix> matrices;
    for (size_t i = 0; i < packed.size(); i++) {
        matrices.push_back(matrix(packed[i], kinds[i], rows[i], columns[i]));
        TORCH_CHECK_VALUE(columns[i] <= x.size(1), "x has too few columns for a matrix of ", columns[i]);
    }
    const Precision precision = precision_of(activations);
    const Table& table = choose(isa);
    std::lock_guard<std::mutex> lock(computing());
    table.linears(pool_of(threads), matrices.data(), int64_t(matrices.size()), x.const_data_ptr<float>(), x.size(1),
                  x.size(0), nullptr, precision, invariant);
}

at::Tensor gather(const at::Tensor& ids, const at::Tensor& packed, int64_t kind, int64_t rows, int64_t columns,
                  int64_t threads, std::string isa) {
    const int64_t* at = indices(ids, ids.numel(), "ids");
    const Matrix w = matrix(packed, kind, rows, columns);
    for (int64_t i = 0; i < ids.numel(); i++)
        TORCH_CHECK_INDEX(at[i] >= 0 && at[i] < rows, "id ", at[i], " is not one of ", rows, " rows");
    at::Tensor out = at::empty({ids.numel(), columns}, ids.options().dtype(at::kFloat));
    const Table& table = choose(isa);
    std::lock_guard<std::mutex> lock(computing());
    table.gather(pool_of(threads), w, at, ids.numel(), out.data_ptr<float>());
    return out;
}

at::Tensor norm(const at::Tensor& x, const at::Tensor& weight, double eps, int64_t threads, std::string isa) {
    check_float(x, "x");
    check_float(weight, "weight");
    const int64_t size = weight.numel();
    TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) == size && size % 16 == 0,
                      "x should be [rows, ", size, "], and the size a multiple of 16");
    at::Tensor y = at::empty_like(x);
    const Table& table = choose(isa);
    std::lock_guard<std::mutex> lock(computing());
    table.norm(pool_of(threads), weight.const_data_ptr<float>(), float(eps), size, x.const_data_ptr<float>(),
               x.size(0), y.data_ptr<float>());
    return y;
}

void check_places(const Step& step, const Shape& shape, int64_t sequences) {
    for (int64_t row = 0; row < step.tokens; row++) {
        TORCH_CHECK_INDEX(step.slots[row] >= 0 && step.slots[row] < shape.pages * shape.page_tokens, "slot ",
                          step.slots[row], " is not in the cache");
        TORCH_CHECK_INDEX(step.sequences[row] >= 0 && step.sequences[row] < sequences, "sequence ",
                          step.sequences[row], " has no page table");
        TORCH_CHECK_INDEX(step.positions[row] >= 0 &&
                              step.positions[row] < step.table_width * shape.page_tokens,
                          "position ", step.positions[row], " is in no page of its table");
    }
    for (int64_t i = 0; i < sequences * step.table_width; i++)
        TORCH_CHECK_INDEX(step.tables[i] >= 0 && step.tables[i] < shape.pages, "page ", step.tables[i],
                          " is not in the cache");
}

Step step_of(const at::Tensor& positions, const at::Tensor& slots, const at::Tensor& sequences,
             const at::Tensor& tables_, const at::Tensor& cosines, const at::Tensor& sines, const Shape& shape) {
    const int64_t tokens = positions.numel(), angles = tokens * shape.head_dim / 2;
    check_float(cosines, "cosines");
    check_float(sines, "sines");
    TORCH_CHECK_VALUE(cosines.numel() == angles && sines.numel() == angles,
                      "cosines and sines should be [tokens, head_dim / 2]");
    const Step step{tokens, tables_.size(1), indices(positions, tokens, "positions"),
                    indices(slots, tokens, "slots"), indices(sequences, tokens, "sequences"),
                    indices(tables_, tables_.numel(), "tables"), cosines.const_data_ptr<float>(),
                    sines.const_data_ptr<float>()};
    check_places(step, shape, tables_.size(0));
    return step;
}

// How a cache of [.., kv_heads, elements] stores a head of head_dim values.
KvFormat format_of(const at::Tensor& kv, int64_t head_dim) {
    TORCH_CHECK_VALUE(kv.is_contiguous() && kv.device().is_cpu(), "kv should be contiguous, on the CPU");
    for (KvFormat format : {KvFormat::float32, KvFormat::float16, KvFormat::int8, KvFormat::int4}) {
        const auto type = format == KvFormat::float32   ? at::kFloat
                          : format == KvFormat::float16 ? at::kHalf
                                                        : at::kByte;
        if (kv.scalar_type() == type && kv.size(-1) * kv.element_size() == kv_bytes(format, head_dim)) return format;
    }
    TORCH_CHECK_VALUE(false, "kv of ", kv.scalar_type(), " with ", kv.size(-1), " elements is no cache of heads of ",
                      head_dim, " values; kernels/kv_formats.py says which there are");
}

uint8_t* bytes_of(at::Tensor& kv) { return static_cast<uint8_t*>(kv.data_ptr()); }

// kv: one layer's, without the dimension of layers.
at::Tensor attention(at::Tensor& qkv, at::Tensor& kv, int64_t heads, const at::Tensor& positions,
                     const at::Tensor& slots, const at::Tensor& sequences, const at::Tensor& tables_,
                     const at::Tensor& cosines, const at::Tensor& sines, int64_t threads, std::string isa, bool invariant) {
    check_float(qkv, "qkv");
    TORCH_CHECK_VALUE(kv.dim() == 5 && kv.size(0) == 2, "kv should be [2, pages, page_tokens, heads, elements]");
    const int64_t dim = 2 * cosines.size(-1);
    const Shape shape{0, heads, kv.size(3), dim, 0, kv.size(1), kv.size(2), 0.f, format_of(kv, dim)};
    TORCH_CHECK_VALUE(shape.head_dim % 32 == 0 && heads % shape.kv_heads == 0,
                      "head_dim should be a multiple of 32, heads of kv_heads");
    TORCH_CHECK_VALUE(qkv.dim() == 2 && qkv.size(1) == (heads + 2 * shape.kv_heads) * shape.head_dim &&
                          qkv.size(0) == positions.numel(),
                      "qkv should be [tokens, (heads + 2 kv_heads) * head_dim]");
    const Step step = step_of(positions, slots, sequences, tables_, cosines, sines, shape);
    at::Tensor out = at::empty({step.tokens, heads * shape.head_dim}, qkv.options());
    const Table& table = choose(isa);
    std::lock_guard<std::mutex> lock(computing());
    if (step.tokens > 0)
        table.attention(pool_of(threads), shape, step, qkv.data_ptr<float>(), bytes_of(kv),
                        out.data_ptr<float>(), invariant);
    return out;
}

void layers(at::Tensor& x, at::Tensor& kv, const std::vector<at::Tensor>& packed,
            at::IntArrayRef kinds, at::IntArrayRef rows, at::IntArrayRef qkv_parts,
            const std::vector<at::Tensor>& norms, const std::vector<at::Tensor>& biases, int64_t heads, int64_t ff, double eps,
            const at::Tensor& positions, const at::Tensor& slots, const at::Tensor& sequences,
            const at::Tensor& tables_, const at::Tensor& cosines, const at::Tensor& sines,
            std::string activations, int64_t threads, std::string isa, bool invariant) {
    check_float(x, "x");
    TORCH_CHECK_VALUE(kv.dim() == 6 && kv.size(1) == 2,
                      "kv should be [layers, 2, pages, page_tokens, heads, elements]");
    const int64_t count = kv.size(0), dim = 2 * cosines.size(-1), tokens = x.size(0), hidden = x.size(1);
    const Shape shape{hidden, heads, kv.size(4), dim, ff, kv.size(2), kv.size(3), float(eps), format_of(kv, dim)};
    TORCH_CHECK_VALUE(dim % 32 == 0 && hidden % 32 == 0 && ff % 32 == 0 && heads % shape.kv_heads == 0,
                      "head_dim, hidden and ff should be multiples of 32, heads of kv_heads");
    TORCH_CHECK_VALUE(kinds.size() == packed.size() && rows.size() == packed.size(),
                      "a kind and rows are wanted for each of ", packed.size(), " matrices");
    TORCH_CHECK_VALUE(int64_t(norms.size()) == 2 * count && int64_t(biases.size()) == count &&
                          int64_t(qkv_parts.size()) == count,
                      "two norms, a bias and the parts of qkv are wanted for each of ", count, " layers");
    const Precision precision = precision_of(activations);
    const Step step = step_of(positions, slots, sequences, tables_, cosines, sines, shape);
    TORCH_CHECK_VALUE(step.tokens == tokens, "x should have as many rows as there are positions");
    const int64_t wide = heads * dim + 2 * shape.kv_heads * dim;
    Matrices matrices{packed, kinds, rows};
    std::vector<LayerWeights> weights;
    for (int64_t layer = 0; layer < count; layer++) {
        for (int part = 0; part < 2; part++) {
            check_float(norms[2 * layer + part], "a norm");
            TORCH_CHECK_VALUE(norms[2 * layer + part].numel() == hidden, "a norm should have ", hidden, " values");
        }
        const at::Tensor& bias = biases[size_t(layer)];
        check_float(bias, "a bias");
        TORCH_CHECK_VALUE(bias.numel() == 0 || bias.numel() == wide, "a bias should have 0 or ", wide, " values");
        LayerWeights of_layer = weights_of(shape, matrices, qkv_parts[size_t(layer)]);
        of_layer.mixer_norm = norms[2 * layer].const_data_ptr<float>();
        of_layer.feedforward_norm = norms[2 * layer + 1].const_data_ptr<float>();
        of_layer.qkv_bias = bias.numel() == 0 ? nullptr : bias.const_data_ptr<float>();
        weights.push_back(of_layer);
    }
    TORCH_CHECK_VALUE(matrices.taken == packed.size(), "there are more packed matrices than ", count, " layers have");
    const Table& table = choose(isa);
    std::lock_guard<std::mutex> lock(computing());
    if (tokens > 0)
        table.layers(pool_of(threads), shape, step, weights.data(), count, bytes_of(kv),
                     x.data_ptr<float>(), precision, invariant);
}

int64_t read_bytes(const at::Tensor& data, int64_t threads, std::string isa) {
    TORCH_CHECK_VALUE(data.scalar_type() == at::kByte && data.is_contiguous(), "data should be contiguous bytes");
    const Table& table = choose(isa);
    std::lock_guard<std::mutex> lock(computing());
    return table.read(pool_of(threads), data.const_data_ptr<uint8_t>(), data.numel());
}

// The number of products that were made.
int64_t multiply_bytes(int64_t rounds, int64_t threads, std::string isa) {
    TORCH_CHECK_VALUE(rounds > 0, "rounds is ", rounds, "; at least 1 is accepted");
    const Table& table = choose(isa);
    std::lock_guard<std::mutex> lock(computing());
    table.multiply(pool_of(threads), rounds);
    return rounds * PEAK_MACS * threads;
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Table* table : tables())
        if (table->supported()) names.emplace_back(table->name);
    return names;
}

}  // namespace
}  // namespace sanderling

TORCH_LIBRARY(sanderling_cpu, m) {
    m.def("pack(Tensor blocks, str format, int rows, int columns) -> Tensor");
    m.def(
        "packed_linear(Tensor x, Tensor packed, int kind, int rows, str activations, int threads, str isa, "
        "bool invariant=True) -> Tensor");
    m.def(
        "packed_linears(Tensor x, Tensor[] packed, int[] kinds, int[] rows, int[] columns, str activations, "
        "int threads, str isa, bool invariant=True) -> ()");
    m.def("packed_rows(Tensor ids, Tensor packed, int kind, int rows, int columns, int threads, str isa) -> Tensor");
    m.def("rms_norm(Tensor x, Tensor weight, float eps, int threads, str isa) -> Tensor");
    m.def(
        "layers(Tensor(a!) x, Tensor(b!) kv, Tensor[] packed, int[] kinds, int[] rows, int[] qkv_parts, "
        "Tensor[] norms, Tensor[] biases, "
        "int heads, int ff, float eps, Tensor positions, Tensor slots, Tensor sequences, Tensor tables, Tensor cosines, Tensor sines, "
        "str activations, int threads, str isa, bool invariant=True) -> ()");
    m.def(
        "attention(Tensor(a!) qkv, Tensor(b!) kv, int heads, Tensor positions, Tensor slots, Tensor sequences, "
        "Tensor tables, Tensor cosines, Tensor sines, int threads, str isa, bool invariant=True) -> Tensor");
    m.def("instruction_sets() -> str[]", sanderling::instruction_sets);
    m.def("multiply_bytes(int rounds, int threads, str isa) -> int", sanderling::multiply_bytes);
    m.def("read_bytes(Tensor data, int threads, str isa) -> int");
}

TORCH_LIBRARY_IMPL(sanderling_cpu, CPU, m) {
    m.impl("pack", sanderling::pack);
    m.impl("packed_linear", sanderling::linear);
    m.impl("packed_linears", sanderling::linears);
    m.impl("packed_rows", sanderling::gather);
    m.impl("rms_norm", sanderling::norm);
    m.impl("layers", sanderling::layers);
    m.impl("attention", sanderling::attention);
    m.impl("read_bytes", sanderling::read_bytes);
}
