"""1-bit Adam (Tang et al., ICML 2021): Adam until its variance has settled, then the variance stays
and momenta are sent as signs, with what is lost remembered in both directions.

A momentum is compressed as it will be applied, divided by the root of the frozen variance. In the
paper it is compressed as it is; then every value of a tensor comes out equally large, and one whose
variance is small (a rare token's row of the embedding) takes a step as many times too long.
"""

import torch
from torch import Tensor

from train.communication.compressor import Memory, Part, uncompressed, with_error
from train.communication.freeze import Freeze
from train.communication.signs import decode, encode, sign_layout
from train.communication.transport import Transport, dense_bytes
from train.job import OptimizerTable
from train.layout import FlatModel
from train.optimizer import AdamW

FLOOR = 0.1
"""The frozen root is at least so much of its root mean square over a tensor: gradients that the
warm-up hardly saw have no reliable variance."""


class SignCompressor:
    """Signs both ways: to the rank that decides about a stretch, and its decision to all.

    error_feedback: False forgets what was lost, which the paper shows not to converge.
    """

    clips_locally = True

    def __init__(self, warmup_steps: int, *, error_feedback: bool = True) -> None:
        self.memory = Memory()
        self.warmup_steps, self.error_feedback = warmup_steps, error_feedback

    def reduce(self, part: Part, local: Tensor, transport: Transport, step: int) -> Tensor:
        """See `Compressor`."""
        if (total := uncompressed(self, part, local, transport, step)) is not None:
            return total
        layout, dtype = sign_layout(part.spans, transport.size), local.dtype
        wanted = torch.zeros(layout.width * transport.size, dtype=dtype)
        wanted[: part.elements] = with_error(self.memory, part, local)
        stretches = list(zip(torch.split(wanted, layout.width), layout.lengths, strict=True))
        payloads = torch.stack([encode(x, lengths, layout.scales) for x, lengths in stretches])
        received = transport.all_to_all(payloads)
        for row, (stretch, lengths) in zip(payloads, stretches, strict=True):
            stretch -= decode(row, lengths, layout.scales, dtype)  # what is lost here
        own = layout.lengths[transport.rank]
        decided = torch.zeros(layout.width, dtype=dtype)
        for row in received:
            decided += decode(row, own, layout.scales, dtype)
        name = f"server/{part.key}"
        if name in self.memory.kept:
            decided += self.memory.kept[name]
        answer = encode(decided, own, layout.scales)
        if self.error_feedback:
            self.memory.stage(f"error/{part.key}", wanted[: part.elements])
            self.memory.stage(name, decided - decode(answer, own, layout.scales, dtype))
        answers = zip(transport.all_gather(answer), layout.lengths, strict=True)
        found = [decode(row, lengths, layout.scales, dtype) for row, lengths in answers]
        return torch.cat(found)[: part.elements]

    def formula_bytes(self, part: Part, size: int, item_bytes: int) -> float:
        """A bit a value each way, and scales."""
        layout = sign_layout(part.spans, size)
        return dense_bytes(layout.payload_bytes * size, size)

    def memory_values(self, part: Part, size: int) -> int:
        """What was lost here, and in decisions."""
        return part.elements + sign_layout(part.spans, size).width


class OneBitAdam(AdamW):
    """AdamW for `freeze.steps` steps, then with the variance it has by then.

    After the freeze the model's gradient buffer holds no gradient but the new momentum over the
    frozen root, as `outgoing` of all ranks summed up.
    """

    def __init__(self, flat: FlatModel, table: OptimizerTable, freeze: Freeze) -> None:
        super().__init__(flat, table)
        self.freeze = freeze

    def outgoing(self, start: int, stop: int, size: int) -> Tensor:
        """This rank's part of the new momentum of elements [start, stop), over the frozen root."""
        beta = self.table.beta1
        momentum = self.exp_avg[start:stop] * (beta / size)
        momentum += self.flat.gradient[start:stop] * (1 - beta)
        return momentum.div_(self._root(start, stop))

    def update(self, step: int, learning_rate: float) -> None:
        """See `Optimizer`."""
        if step <= self.freeze.steps:
            super().update(step, learning_rate)
            self.freeze.look(step)
            return
        flat, table = self.flat, self.table
        torch.mul(flat.gradient, self._root(0, self.exp_avg.numel()), out=self.exp_avg)
        flat.masters[: flat.decayed].mul_(1 - learning_rate * table.weight_decay)
        flat.masters.add_(flat.gradient, alpha=-learning_rate / (1 - table.beta1**step))

    def tensors(self) -> dict[str, Tensor]:
        """See `Optimizer`."""
        return super().tensors() | self.freeze.tensors()

    def _root(self, start: int, stop: int) -> Tensor:
        """Of the frozen variance of whole tensors, without its bias towards zero."""
        grown = 1 - self.table.beta2**self.freeze.steps
        root = (self.exp_avg_sq[start:stop] / grown).sqrt_()
        for slot in self.flat.slots:
            if start <= slot.start < stop:
                piece = root[slot.start - start : slot.stop - start]
                piece.clamp_(min=FLOOR * float(piece.norm()) / piece.numel() ** 0.5)
        return root.add_(self.table.epsilon)
