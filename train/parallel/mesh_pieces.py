"""A mesh's training state as pieces of a checkpoint, and back: the names and stretches that all
others write, so any mesh goes on from any other, from one worker, and the other way round.

Of what several ranks hold alike each writes some rows. Most parts are rows of the whole matrix and
lie in one stretch of it; where tensor ranks have columns (`ROW`), they exchange them first, so that
each writes some rows whole. Of experts each rank has whole ones.
"""

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from train.checkpoint.piece import Piece, dtype_name
from train.checkpoint.reader import Checkpoint, read_checked
from train.parallel.mesh import Axis
from train.parallel.mesh_model import (
    COLUMN,
    COLUMN_BIAS,
    EXPERTS,
    ROW,
    VOCABULARY,
    MeshLlama,
)
from train.parallel.mesh_state import MASTER, Held, MeshState
from train.parallel.vocabulary import rows_of
from train.parallel.zero_flat import best_name

Shapes = Mapping[str, tuple[int, ...]]
"""Of the whole model's parameters, by name."""


def mesh_pieces(
    state: MeshState, model: MeshLlama, shapes: Shapes, compute: torch.dtype
) -> list[Piece]:
    """What this rank writes of a checkpoint; called by all ranks. compute: of weights, which are
    masters of that dtype, or written beside them."""
    everywhere, experts = set(model.whole_everywhere), set(model.expert_names)
    made: list[Piece] = []
    for held in state.held():
        data = model.mesh.replicas if held.name in experts else model.mesh.data
        copies = [model.mesh.sequence, *([] if state.shared else [data])]
        if held.name in everywhere:
            copies.append(model.mesh.tensor)
        row, block = _written(held, copies, model, shapes[held.name])
        if block.numel():
            made += _of_kinds(held, row, block, shapes[held.name], compute)
    return made


def _written(
    held: Held, copies: list[Axis], model: MeshLlama, whole: tuple[int, ...]
) -> tuple[int, Tensor]:
    """This rank's rows of what it holds like others: the first one's place in the whole, and them.
    copies: axes whose ranks hold the same."""
    index, size = 0, 1
    for alike in copies:
        index, size = index * alike.size + alike.rank, size * alike.size
    rows = len(held.data)
    first, last = rows * index // size, rows * (index + 1) // size
    block, row, axis = held.data[first:last], held.first + first, model.mesh.tensor
    if held.name.endswith(ROW) and axis.size > 1:
        block, moved = whole_rows(block, axis)
        return row + moved, block
    return row + _rows_before(held.name, whole, model), block


def whole_rows(block: Tensor, axis: Axis) -> tuple[Tensor, int]:
    """block (rows, some columns): of the same rows on every rank, of which each has its columns.
    Some of the rows with all columns, a new tensor, and the place of the first of them in block."""
    rows, width = block.shape
    cuts = [rows * rank // axis.size for rank in range(axis.size + 1)]
    sent = [(last - first) * width for first, last in pairwise(cuts)]
    mine = sent[axis.rank]
    received = block.new_empty(axis.size * mine)
    flat = block.reshape(-1)
    dist.all_to_all_single(received, flat, [mine] * axis.size, sent, group=axis.group)
    return torch.cat(list(received.view(axis.size, -1, width)), 1), cuts[axis.rank]


def _of_kinds(
    held: Held, row: int, block: Tensor, whole: tuple[int, ...], compute: torch.dtype
) -> Iterator[Piece]:
    kinds = {held.kind: block}
    if held.kind == MASTER:
        kinds = {"param": block.to(compute)}
        if block.dtype != compute:
            kinds[MASTER] = block
    start = row * math.prod(whole[1:])
    for kind, rows in kinds.items():
        data, name = rows.reshape(-1), f"{kind}/{held.name}"
        yield Piece(name, whole, dtype_name(data.dtype), start, start + data.numel(), data)


def load_pieces(state: MeshState, model: MeshLlama, shapes: Shapes, found: Checkpoint) -> None:
    """Goes on from a checkpoint, whoever wrote it. ValueError, and nothing changed, when it is of
    another model or optimizer."""
    for held in state.held():
        name, whole = _name_in(found, held), shapes[held.name]
        if name not in found.names or found.shape(name) != whole:
            read_checked(found, name, whole)  # says what is amiss
    axis = model.mesh.tensor
    for held in state.held():
        whole = shapes[held.name]
        width = math.prod(whole[1:])
        row = held.first + _rows_before(held.name, whole, model)
        span = (row * width, (row + len(held.data)) * width)
        rows = found.read(_name_in(found, held), *span).view(-1, *whole[1:])
        held.data.copy_(rows.chunk(axis.size, 1)[axis.rank] if held.name.endswith(ROW) else rows)
    state.publish()


def _name_in(found: Checkpoint, held: Held) -> str:
    return best_name(found, held.name) if held.kind == MASTER else f"{held.kind}/{held.name}"


def _rows_before(name: str, whole: tuple[int, ...], model: MeshLlama) -> int:
    """Rows of the whole parameter that tensor ranks before this one have, or experts that ranks
    before it have."""
    axis, expert = model.mesh.tensor, model.mesh.expert
    if name.endswith(EXPERTS):
        return whole[0] // expert.size * expert.rank
    if name.endswith(VOCABULARY):
        return int(rows_of(whole[0], axis).start)
    if name.endswith(COLUMN + COLUMN_BIAS):
        return whole[0] // axis.size * axis.rank
    return 0
