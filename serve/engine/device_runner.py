"""The runner of a GPU: padded steps as captured where they fit, else launch by launch.

Logits stay on the device, where the sampler draws from them. Used by `serve.build` in place of
ModelRunner.
"""

import logging
import time

import torch

from models.batch import TokenBatch
from models.device.decoder import DeviceDecoder
from models.device.padded import PaddedSteps
from serve.engine.runner import Rows, token_batch
from serve.engine.scheduler import Slice
from serve.kv.device import DeviceStorage

log = logging.getLogger(__name__)

WARMED_ROWS = (2, 17, 65, 257)  # at least one for every entry of the tables of tile sizes


class DeviceRunner:
    """Runs a decoder over paged KV storage on its device. `warm_up` comes first."""

    def __init__(
        self,
        decoder: DeviceDecoder,
        storage: DeviceStorage,
        *,
        budget_tokens: int,
        max_running: int,
    ) -> None:
        self.decoder = decoder
        self.storage = storage
        self.budget_tokens = budget_tokens
        most_rows = max(budget_tokens, max_running)
        self.padded = PaddedSteps(decoder, storage.cache, most_rows, max_running)

    def run(self, slices: list[Slice]) -> Rows:
        return self.compute(token_batch(slices))

    def compute(self, batch: TokenBatch) -> Rows:
        """Logits are those of this step until the next."""
        with torch.inference_mode():
            shape = self.padded.shape(batch)
            if shape is None:
                states = self.decoder.states(batch, self.storage.cache)
            else:
                states = self.padded.states(batch, shape)
            return Rows(self.padded.logits(states), states)

    def warm_up(self) -> None:
        """Compiles every kernel that a step may launch, and captures the padded steps, so that no
        request waits for it. Writes nothing to any page."""
        begun = time.perf_counter()
        with torch.inference_mode():
            rows = sorted({min(each, self.budget_tokens) for each in WARMED_ROWS})
            for count in (*rows, self.budget_tokens):
                for singles in (0, 1):
                    batch = _prompt(count, singles, self.storage.shape.page_tokens)
                    self.decoder(batch, self.storage.cache)
            self.padded.prepare()
        if self.decoder.device.type == "cuda":
            torch.cuda.synchronize(self.decoder.device)
        log.info(
            "%s: kernels compiled and steps of up to %d rows captured in %.1f s",
            self.decoder.device,
            self.padded.sizes[-1],
            time.perf_counter() - begun,
        )


def _prompt(rows: int, singles: int, page_tokens: int) -> TokenBatch:
    """A step of one prompt, beside single tokens of others; all read page 0, nothing is written."""
    every = torch.arange(rows)
    starts = (*range(singles), singles, rows) if rows > singles else (0, rows)
    lengths = [stop - start for start, stop in zip(starts, starts[1:], strict=False)]
    return TokenBatch(
        torch.zeros_like(every),
        every,
        torch.full_like(every, -1),
        starts,
        tuple(lengths),
        torch.zeros(len(lengths), -(-rows // page_tokens), dtype=torch.int64),
        every[-1:],
    )
