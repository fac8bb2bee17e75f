"""The decoder over packed weights: the same model as decoder.py, computed by kernels/cpu.

All layers of a step are one call, embedding and head one each, and weights stay as quantised as the
checkpoint has them. Built by `models.load.packed`, run by `serve/engine`; fulfils what the engine
asks of a decoder (`states`, `logits`, `config`, `dtype`).
"""

from collections.abc import Sequence

import numpy as np
import torch

from kernels.cpu import ops
from kernels.reference.rope import inverse_frequencies
from models.angles import Angles
from models.batch import TokenBatch
from models.config import ModelConfig


class PackedDecoder:
    """A decoder of `config`'s shape. Holds no state between steps.

    activations: how finely they are quantised before a product, batch_invariant: whether a row's
    bits are the same in any company; see kernels.cpu.ops.
    """

    def __init__(
        self,
        config: ModelConfig,
        embed: ops.Packed,
        layers: Sequence[ops.LayerWeights],
        norm: torch.Tensor,
        head: ops.Packed,
        activations: ops.Activations = "accurate",
        batch_invariant: bool = True,
    ) -> None:
        self.config = config
        self.embed = embed
        self.layers = list(layers)
        self.norm = norm
        self.head = head
        self.activations = activations
        self.batch_invariant = batch_invariant
        self._angles = Angles(inverse_frequencies(config.rope, config.head_dim))
        self._shape = ops.LayerShape(config.heads, config.ff, config.rms_eps)

    @property
    def has_matrix_units(self) -> bool:
        """Whether batch_invariant makes a difference on this machine."""
        return ops.has_matrix_units()

    @property
    def dtype(self) -> torch.dtype:
        """That it computes in. A cache may be in any format of kernels.kv_formats but bfloat16: its
        type and size tell which."""
        return torch.float32

    def forward(self, batch: TokenBatch, kv: torch.Tensor) -> torch.Tensor:
        """Logits [R, vocab] float32 of batch.logit_rows; see Decoder.forward."""
        return self.logits(self.states(batch, kv))

    __call__ = forward

    def states(self, batch: TokenBatch, kv: torch.Tensor) -> torch.Tensor:
        """[R, hidden]: what the head reads at batch.logit_rows; writes keys and values to kv."""
        threads = torch.get_num_threads()
        x = ops.rows(batch.ids, self.embed, threads=threads)
        ops.layers(
            x,
            kv,
            self.layers,
            self._shape,
            self._step(batch),
            activations=self.activations,
            threads=threads,
            batch_invariant=self.batch_invariant,
        )
        wanted = x.index_select(0, batch.logit_rows)
        return ops.rms_norm(wanted, self.norm, self.config.rms_eps, threads=threads)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """[R, vocab] float32 of states [R, hidden]."""
        threads = torch.get_num_threads()
        return ops.linear(
            states,
            self.head,
            activations=self.activations,
            threads=threads,
            batch_invariant=self.batch_invariant,
        )

    def _step(self, batch: TokenBatch) -> ops.LayerStep:
        """NumPy, where torch would go to threads of its own: ours spin for a while after every op
        and want the same cores, so each side would wait for the other."""
        cosines, sines = self._angles.of(batch.positions.numpy(), max(batch.context_tokens))
        lengths = np.diff(batch.query_starts)
        return ops.LayerStep(
            batch.positions,
            batch.slots,
            torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
            batch.page_tables,
            torch.from_numpy(cosines),
            torch.from_numpy(sines),
        )
