"""What each of several processes measures of ZeRO: live bytes, bytes on the wire, and equality with
one process's Adam. One start of the processes for all of it."""

import gc
import os
import socket
import struct
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.checkpoint.local import LocalStorage
from train.checkpoint.reader import CheckpointReader
from train.checkpoint.writer import CheckpointWriter
from train.optimizer import Decay
from train.parallel.zero import Sharded, shard
from train.world import GlooWorld, LocalWorld, World

DECAY = Decay(0.9, 0.95, 1e-8, 0.1)
BYTES_SENT = 200
"""Where tcpi_bytes_sent is in Linux's struct tcp_info."""
STEPS = 20
SAMPLES = 24
RATE = 3e-3


class Small(nn.Module):
    """A few layers with a residual; its widths divide by nothing in particular."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        normed: Tensor = self.norm(x)
        return normed


def build(width: int, layers: int, dtype: torch.dtype) -> Small:
    torch.manual_seed(7)
    return Small(width, layers).to(dtype)


def batch(step: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return tuple(  # type: ignore[return-value]
        torch.randn(SAMPLES, width, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(2)
    )


def backward(model: nn.Module, step: int, width: int, dtype: torch.dtype, of: slice) -> None:
    x, y = batch(step, width, dtype)
    (model(x[of]) - y[of]).square().sum().div(SAMPLES * width).backward()


def part(rank: int, size: int) -> slice:
    return slice(SAMPLES * rank // size, SAMPLES * (rank + 1) // size)


def train(
    model: nn.Module, sharded: Sharded, world: World, steps: range, width: int, clip: float
) -> None:
    dtype = torch.float64
    for step in steps:
        sharded.clear_gradient()
        mine = part(world.rank, world.size)
        middle = (mine.start + mine.stop) // 2
        for half in (slice(mine.start, middle), slice(middle, mine.stop)):
            backward(model, step, width, dtype, half)
        sharded.reduce()
        sharded.clip(clip)
        sharded.update(step + 1, RATE)


def plain(width: int, layers: int, steps: int, clip: float) -> dict[str, Tensor]:
    """torch.optim.AdamW on one process, and torch's own clipping."""
    model = build(width, layers, torch.float64)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8)
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, step, width, torch.float64, slice(0, SAMPLES))
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def farthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference of any element."""
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted)


def live_bytes() -> int:
    """Of all tensors' memory in this process."""
    gc.collect()
    held: dict[int, int] = {}
    for found in gc.get_objects():
        if issubclass(type(found), Tensor):
            local = getattr(found, "_local_tensor", found)
            for tensor in (local, local.grad if local.is_leaf else None):
                if tensor is not None:
                    tensor = getattr(tensor, "_local_tensor", tensor)
                    storage = tensor.untyped_storage()
                    held[storage.data_ptr()] = storage.nbytes()
    held.pop(0, None)
    return sum(held.values())


def wire_bytes() -> int:
    """Sent over TCP by this process's open connections, as the kernel has counted it."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:
            continue
        if len(told) >= BYTES_SENT + 8:
            total += struct.unpack_from("<Q", told, BYTES_SENT)[0]
    return total


def sizes(world: GlooWorld, stage: int) -> dict[str, float]:
    """In bfloat16: live bytes a parameter, all gradients there, and sent bytes a weight byte."""
    width, layers, dtype = 192, 4, torch.bfloat16
    before = live_bytes()
    model = build(width, layers, torch.float32)
    count = sum(parameter.numel() for parameter in model.parameters())
    sharded = shard(model, world, stage, "bfloat16", DECAY)
    sent = 0
    for step in range(2):
        world.barrier()
        begun = wire_bytes()
        sharded.clear_gradient()
        inputs = dtype if stage < 3 else torch.float32
        backward(model, step, width, inputs, part(world.rank, world.size))
        live = live_bytes() - before
        sharded.reduce()
        sharded.update(step + 1, RATE)
        world.barrier()
        sent = wire_bytes() - begun
    share = 2 * count * (world.size - 1) / world.size
    return {"live": live / count, "sent": sent / share, "elements": count}


def measured(world: GlooWorld, folder: str) -> dict[str, Any]:
    """All that is asked of ZeRO, on every rank of the world."""
    found: dict[str, Any] = {"sizes": {s: sizes(world, s) for s in (1, 2, 3)}, "equal": {}}
    fewer = dist.new_group(list(range(world.size - 1)))
    width, layers, clip = 30, 3, 0.05
    wanted = plain(width, layers, STEPS, clip)
    for stage in (1, 2, 3):
        model = build(width, layers, torch.float64)
        sharded = shard(model, world, stage, "float64", DECAY)
        train(model, sharded, world, range(STEPS), width, clip)
        storage = LocalStorage(Path(folder) / f"stage{stage}")
        writer = CheckpointWriter(storage, "a")
        writer.write(STEPS, {}, sharded.pieces(), world.rank, world.size)
        world.barrier()
        if world.rank == 0:
            writer.commit(STEPS, world.size)
        world.barrier()
        checkpoint = CheckpointReader(storage).newest()
        assert checkpoint is not None
        after = {name: checkpoint.tensor(f"param/{name}") for name in wanted}
        found["equal"][stage] = farthest(after, wanted)
    found["moved"] = moved(world, fewer, folder) if world.rank < world.size - 1 else {}
    world.barrier()
    return found


def moved(world: GlooWorld, group: dist.ProcessGroup, folder: str) -> dict[int, float]:
    """Five steps more on one rank fewer than have written, each stage from another's, against one
    process's 25 steps; the largest difference."""
    smaller = GlooWorld(group) if world.size > 2 else LocalWorld()
    width, layers, clip = 30, 3, 0.05
    wanted = plain(width, layers, STEPS + 5, clip)
    answers = {}
    for stage in (1, 2, 3):
        origin = stage % 3 + 1
        model = build(width, layers, torch.float64)
        sharded = shard(model, smaller, stage, "float64", DECAY)
        checkpoint = CheckpointReader(LocalStorage(Path(folder) / f"stage{origin}")).newest()
        assert checkpoint is not None
        sharded.load(checkpoint)
        train(model, sharded, smaller, range(STEPS, STEPS + 5), width, clip)
        differences = [0.0]
        for piece in sharded.pieces():
            kind, _, name = piece.name.partition("/")
            if kind == "param":
                theirs = wanted[name].flatten()[piece.start : piece.stop]
                differences.append(float((piece.data - theirs).abs().max()))
        answers[stage] = max(differences)
    return answers
