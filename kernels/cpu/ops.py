"""The compiled ops of kernels/cpu as Python sees them: packed matrices, and functions over them.

A matrix keeps the numbers of its GGUF blocks, in another order. Activations are float32 outside
and quantised inside, by groups of 32: `accurate` to 15 bits, `fast` to 8, `float32` not at all
(slower: weights are decoded). A row's result depends neither on the other rows, nor on the number
of threads, nor on the instruction set.

With batch_invariant = False it may depend on how many rows there are: from FEWEST_FIXED_ROWS on, a
processor with AMX multiplies in 16-bit fixed point, with one scale for each row of activations and
of weights, and attends to prompts with pairs of bfloat16 numbers. That is faster; `accurate` and
`fast` are then one and the same. float32 and other processors do as with True.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch

LIBRARY = Path(__file__).parent / "native.so"
# affine 4-bit, signed 8-bit, and 4-, 8- and 5-bit (in bytes) with scales that are themselves scaled
# (GGUF's K-quants)
KINDS = {"Q4_0": 0, "Q4_1": 0, "Q5_0": 1, "Q8_0": 1, "Q4_K": 2, "Q6_K": 3, "Q5_K": 4}
TILE_ROWS = 16
# Columns and their bytes.
TILE_BYTES = {0: (32, 320), 1: (32, 544), 2: (256, 2368), 3: (256, 4384), 4: (256, 4416)}
LINE_BYTES = 64  # a tile is a whole number of them
LAYOUT_VERSION = 3  # of packed data, where it is kept in files
# Of a step in fixed point; with fewer, lanes are as fast. See src/fixed.inc.
FEWEST_FIXED_ROWS = {"accurate": 6, "fast": 10}
Activations = Literal["accurate", "fast", "float32"]


@cache
def _ops() -> Any:
    """The library's ops. RuntimeError, with what to do, when it was not compiled."""
    if not LIBRARY.exists():
        raise RuntimeError(
            f"the CPU kernels are not compiled ({LIBRARY.name} is missing): run `make install` or "
            "`python -m kernels.cpu.build`, or take engine.kernels = 'reference'"
        )
    torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call]
    _register_fakes()
    return torch.ops.sanderling_cpu


class Packed(NamedTuple):
    """A matrix [rows, columns] in tiles. data: uint8, its rows padded to a multiple of 16."""

    data: torch.Tensor
    kind: int
    rows: int
    columns: int

    @property
    def padded_rows(self) -> int:
        return -(-self.rows // TILE_ROWS) * TILE_ROWS


def packed_bytes(kind: int, rows: int, columns: int) -> int:
    """The size of a matrix once it is packed; see Matrix::tile_bytes of src/table.h."""
    block_columns, block_bytes = TILE_BYTES[kind]
    tile = columns // block_columns * block_bytes
    return -(-rows // TILE_ROWS) * -(-tile // LINE_BYTES) * LINE_BYTES


def instruction_sets() -> tuple[str, ...]:
    """Those that were compiled and that this machine has, the best first."""
    return tuple(_ops().instruction_sets())


def has_matrix_units() -> bool:
    """Whether this machine has what batch_invariant = False makes use of."""
    return "amx" in instruction_sets()


def pack(blocks: torch.Tensor, form: str, rows: int, columns: int) -> Packed:
    """blocks [uint8]: a matrix as GGUF stores it in format `form`.

    ValueError for a format that is not in KINDS, or a size that is not that of the blocks.
    """
    if form not in KINDS:
        raise ValueError(f"format {form} is not packed for the CPU kernels; {', '.join(KINDS)} are")
    return Packed(_ops().pack(blocks, form, rows, columns), KINDS[form], rows, columns)


def linear(
    x: torch.Tensor,
    weight: Packed,
    *,
    activations: Activations = "accurate",
    threads: int = 1,
    isa: str = "auto",
    batch_invariant: bool = True,
) -> torch.Tensor:
    """x [M, columns] float32 -> [M, rows] float32. ValueError for unknown activations."""
    y = _ops().packed_linear(
        x,
        weight.data,
        weight.kind,
        weight.padded_rows,
        activations,
        threads,
        isa,
        batch_invariant,
    )
    return cast(torch.Tensor, y[:, : weight.rows])


def linears(
    x: torch.Tensor,
    weights: Sequence[Packed],
    *,
    activations: Activations = "accurate",
    threads: int = 1,
    isa: str = "auto",
    batch_invariant: bool = True,
) -> None:
    """The products of x [M, widest] float32 with one matrix after another, in one call, each of as
    many columns as the matrix has. Results are dropped. A benchmark's."""
    _ops().packed_linears(
        x,
        [w.data for w in weights],
        [w.kind for w in weights],
        [w.padded_rows for w in weights],
        [w.columns for w in weights],
        activations,
        threads,
        isa,
        batch_invariant,
    )


def rows(ids: torch.Tensor, weight: Packed, *, threads: int = 1, isa: str = "auto") -> torch.Tensor:
    """The rows that ids [M] int64 name, decoded: [M, columns] float32. IndexError for an id that is
    not one of the matrix's rows."""
    made = _ops().packed_rows(
        ids, weight.data, weight.kind, weight.padded_rows, weight.columns, threads, isa
    )
    return cast(torch.Tensor, made)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, threads: int = 1, isa: str = "auto"
) -> torch.Tensor:
    """x [M, size] float32, size a multiple of 16 -> the same shape."""
    return cast(torch.Tensor, _ops().rms_norm(x, weight, eps, threads, isa))


def read_bytes(data: torch.Tensor, *, threads: int = 1, isa: str = "auto") -> int:
    """Reads data [uint8] once, and does nothing with it: a benchmark's yardstick. Returns a sum."""
    return cast(int, _ops().read_bytes(data, threads, isa))


def multiply_bytes(rounds: int, *, threads: int = 1, isa: str = "auto") -> int:
    """Multiplies bytes in registers as fast as the machine can; how many products were made."""
    return cast(int, _ops().multiply_bytes(rounds, threads, isa))


class LayerWeights(NamedTuple):
    """What one decoder layer computes with; qkv and gate_up as in models.mixers and feedforward.

    qkv: one matrix, or up to three that lie one below the other, where a file has stored queries,
    keys and values in formats of unlike kinds. qkv_bias: [rows of qkv] float32, or empty for none.
    """

    qkv: tuple[Packed, ...]
    out: Packed
    gate_up: Packed
    down: Packed
    mixer_norm: torch.Tensor
    feedforward_norm: torch.Tensor
    qkv_bias: torch.Tensor

    @property
    def matrices(self) -> tuple[Packed, ...]:
        """All packed ones, in the order in which the layer reads them."""
        return (*self.qkv, self.out, self.gate_up, self.down)


class LayerShape(NamedTuple):
    """What the weights do not say of the layers."""

    heads: int
    ff: int
    eps: float


class LayerStep(NamedTuple):
    """N tokens: positions, slots and sequences [N] int64, tables [S, pages] int64, cosines and
    sines [N, head_dim / 2] float32. sequences: which row of tables each token reads through."""

    positions: torch.Tensor
    slots: torch.Tensor
    sequences: torch.Tensor
    tables: torch.Tensor
    cosines: torch.Tensor
    sines: torch.Tensor


def layers(
    x: torch.Tensor,
    kv: torch.Tensor,
    weights: Sequence[LayerWeights],
    shape: LayerShape,
    step: LayerStep,
    *,
    activations: Activations = "accurate",
    threads: int = 1,
    isa: str = "auto",
    batch_invariant: bool = True,
) -> None:
    """Runs x [N, hidden] float32 through a range of layers, in place.

    kv [layers, 2, pages, page_tokens, kv_heads, elements] is the cache of this very range, in any
    format of kernels.kv_formats but bfloat16; it is written at the step's slots, and read up to
    each token's position. Any range will do, so
    an exit or an adapter can sit between two calls. IndexError for a place outside the cache.
    """
    matrices = [m for layer in weights for m in layer.matrices]
    norms = [n for layer in weights for n in (layer.mixer_norm, layer.feedforward_norm)]
    _ops().layers(
        x,
        kv,
        [m.data for m in matrices],
        [m.kind for m in matrices],
        [m.padded_rows for m in matrices],
        [len(layer.qkv) for layer in weights],
        norms,
        [layer.qkv_bias for layer in weights],
        shape.heads,
        shape.ff,
        shape.eps,
        *step,
        activations,
        threads,
        isa,
        batch_invariant,
    )


def attention(
    qkv: torch.Tensor,
    kv: torch.Tensor,
    heads: int,
    step: LayerStep,
    *,
    threads: int = 1,
    isa: str = "auto",
    batch_invariant: bool = True,
) -> torch.Tensor:
    """One layer's attention, as `layers` computes it: [N, heads * head_dim] float32.

    qkv [N, (heads + 2 kv_heads) * head_dim] float32: queries and keys are rotated in place; then
    keys and values are written to the layer's kv [2, pages, page_tokens, kv_heads, elements].
    batch_invariant: False lets matrix units have what brings 16 queries of a key head or more.
    """
    made = _ops().attention(qkv, kv, heads, *step, threads, isa, batch_invariant)
    return cast(torch.Tensor, made)


def _register_fakes() -> None:
    """Shapes without values, so that torch.compile and export can trace through the ops."""
    fakes = {
        "packed_linear": lambda x, packed, kind, rows, *_: x.new_empty(x.shape[0], rows),
        "packed_rows": lambda ids, packed, kind, rows, columns, *_: ids.new_empty(
            ids.shape[0], columns, dtype=torch.float32
        ),
        "packed_linears": lambda *_: None,
        "rms_norm": lambda x, *_: torch.empty_like(x),
        "layers": lambda *_: None,
        "attention": lambda qkv, kv, heads, *_: qkv.new_empty(
            qkv.shape[0], heads * qkv.shape[1] // (heads + 2 * kv.shape[3])
        ),
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"sanderling_cpu::{name}", fake)
