"""Small states whose every element is known from name, step and place alone."""

import torch
from torch import Tensor

from train.checkpoint.piece import share
from train.checkpoint.storage import Storage
from train.checkpoint.writer import CheckpointWriter

SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "param/embed": ((37, 16), torch.bfloat16),
    "master/embed": ((37, 16), torch.float32),
    "exp_avg/embed": ((37, 16), torch.float64),
    "param/norm": ((5,), torch.float32),
    "scale": ((), torch.float32),
    "none": ((0, 4), torch.int64),
}


def state(step: int, shapes=SHAPES) -> dict[str, Tensor]:
    """Every tensor of the state after a step."""
    tensors = {}
    for place, (name, (shape, dtype)) in enumerate(sorted(shapes.items())):
        count = torch.Size(shape).numel()
        values = (torch.arange(count) * 7 + step * 13 + place * 101) % 251
        tensors[name] = values.to(dtype).view(shape)
    return tensors


def save(storage: Storage, step: int, attempt: str, size: int = 1, keep: int = 2) -> None:
    """A whole checkpoint of `state(step)` by `size` ranks, one after the other."""
    for rank in range(size):
        writer = CheckpointWriter(storage, attempt, keep)
        writer.write(step, {"step": step}, share(state(step), rank, size), rank, size)
    CheckpointWriter(storage, attempt, keep).commit(step, size, timeout_s=0)


def is_state(tensors: dict[str, Tensor], step: int) -> bool:
    """Whether these are exactly `state(step)`."""
    wanted = state(step)
    return tensors.keys() == wanted.keys() and all(
        tensors[name].dtype == wanted[name].dtype and torch.equal(tensors[name], wanted[name])
        for name in wanted
    )
