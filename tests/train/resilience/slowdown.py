"""What checkpoints cost a real training loop: the policy's interval, and a quarter of it."""

import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import nn

from train.checkpoint.background import BackgroundCheckpoints
from train.checkpoint.local import LocalStorage
from train.checkpoint.piece import share
from train.checkpoint.writer import CheckpointWriter
from train.resilience.checkfreq import CheckFreq


class Slowdown(NamedTuple):
    """Medians over rounds: of the interval, and of a quarter of it. Times in seconds."""

    interval: int
    chosen: float
    quarter: float
    iteration_s: float
    persist_s: float
    overhead_s: float


class Loop:
    """A small perceptron that learns; its state is written from within its steps."""

    def __init__(self, root: Path, width: int):
        torch.manual_seed(1)
        self.root = root
        self.model = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.x = torch.randn(192, width)
        self.step = 0
        for _ in range(3):
            self.train(1, None)

    def state(self):
        named = {f"param/{n}": p for n, p in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            kept = self.optimizer.state[parameter]
            named |= {f"{kind}/{name}": kept[kind] for kind in ("exp_avg", "exp_avg_sq")}
        return {}, share(named, 0, 1)

    def train(self, steps: int, background: BackgroundCheckpoints | None) -> float:
        """Seconds for so many steps, until the last checkpoint begun in them is durable."""
        began_s = time.perf_counter()
        for _ in range(steps):
            self.step += 1
            self.optimizer.zero_grad()
            self.model(self.x).square().mean().backward()
            if background is not None:
                background.before_update()
            self.optimizer.step()
            if background is not None:
                background.step_done(self.step, self.state)
        if background is not None:
            background.finish()
        return time.perf_counter() - began_s

    def background(self, name: str, policy: CheckFreq, every: int) -> BackgroundCheckpoints:
        writer = CheckpointWriter(LocalStorage(self.root / name), name, keep=1)
        return BackgroundCheckpoints(writer, 0, 1, policy, every_steps=every)


def measure(root: Path, budget: float, rounds: int, width: int = 640) -> Slowdown:
    """In turns: steps without checkpoints, at the chosen interval, at a quarter of it."""
    torch.set_num_threads(1)
    loop, policy = Loop(root, width), CheckFreq(budget)
    profiling = loop.background("profile", policy, 0)
    while len(profiling.outcomes) < 5:
        loop.train(10, profiling)
    profiling.close()
    chosen = policy.interval()
    steps = 2 * chosen
    ratios: dict[int, list[float]] = {chosen: [], max(1, chosen // 4): []}
    for number in range(rounds):
        took_s = {}
        order = [0, *ratios]
        for every in order[number % 3 :] + order[: number % 3]:
            made = loop.background(f"every{every}", CheckFreq(), every) if every else None
            loop.step = 0
            took_s[every] = loop.train(steps, made)
            if made is not None:
                made.close()
        for every, found in ratios.items():
            found.append(took_s[every] / took_s[0] - 1)
    at_k, at_quarter = (median(found) for found in ratios.values())
    persist_s = median(outcome.persist_s for outcome in profiling.outcomes)
    return Slowdown(chosen, at_k, at_quarter, policy.iteration_s, persist_s, policy.overhead_s)
