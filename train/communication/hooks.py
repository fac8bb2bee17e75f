"""Compressors as torch DDP communication hooks: for models that torch trains, not a job.

    hook = DdpHook(PowerSgd(rank=2, warmup_steps=10, seed=0), GlooWorld(group))
    model.register_comm_hook(hook, compressed)

Buckets are compressed and sent on one thread, in their order, while the backward pass goes on.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor

from train.communication.compressor import Compressor, Part
from train.communication.transport import Transport
from train.world import World


class DdpHook:
    """One model's state. sent_bytes of `transport`: what this rank has sent so far.

    momentum: for 1-bit Adam after `compressor.warmup_steps`, which sends momenta: what DDP leaves
    in `.grad` then is the mean momentum, which the caller applies over its frozen variance's root.
    None: gradients. compressor and world are the same kinds on every rank.
    """

    def __init__(self, compressor: Compressor, world: World, momentum: float | None = None) -> None:
        self.compressor, self.transport = compressor, Transport(world)
        self.momentum = momentum
        self.step = 0
        self._momenta: dict[str, Tensor] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="gradient")

    def send(self, part: Part, buffer: Tensor, first: bool, last: bool) -> Tensor:
        """The mean over ranks of a bucket's buffer, in place. On the hook's thread."""
        if first:
            self.step += 1
        size, beta, late = self.transport.size, self.momentum, False
        local = buffer
        if beta is not None:
            kept = self._momenta.get(part.key, torch.zeros_like(buffer))
            late = self.step > self.compressor.warmup_steps
            local = kept * beta + buffer * (1 - beta) if late else buffer
        mean = self.compressor.reduce(part, local, self.transport, self.step) / size
        if beta is not None:
            self._momenta[part.key] = mean if late else kept * beta + mean * (1 - beta)
        buffer.copy_(mean)
        if last:
            self.compressor.memory.commit()
        return buffer


def compressed(
    state: DdpHook,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """The hook itself, for `register_comm_hook`."""
    shapes = tuple(tuple(gradient.shape) for gradient in bucket.gradients())
    number, buffer, last = bucket.index(), bucket.buffer(), bucket.is_last()
    # DDP makes its buckets anew after the first pass: another layout is another part.
    layout = "-".join("x".join(map(str, shape)) for shape in shapes)
    part = Part(f"{number}:{layout}", shapes)
    answer: torch.futures.Future[Tensor] = torch.futures.Future()

    def run() -> None:
        try:
            answer.set_result(state.send(part, buffer, number == 0, last))
        except BaseException as error:
            answer.set_exception(error)  # type: ignore[arg-type]

    state._pool.submit(run)
    return answer
