"""Steps of a few fixed sizes, captured as CUDA graphs: one launch for all of a step's kernels.

From Python a launch takes longer than most kernels run, and a step of 30 layers has 300 of them. So
a step is padded to the next of some numbers of rows, whose tensors stay where they are, and what
was captured over them is replayed. Rows that are added have no slot and see nothing, and a row's
result depends on no other row's, so padding changes none that is real. Without CUDA the same steps
run uncaptured, which is how this is tested. Called by serve/engine/device_runner.py.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from models.batch import TokenBatch
from models.device.decoder import DeviceDecoder
from models.device.step import Cache, PagedRows, Step, widened

# Of keys and values that the rows of prompts may read in one layer, each row all of its context:
# half a millisecond of a large GPU. Beyond it, launching every kernel from Python for `Chunks`,
# whose rows share what they read, is the faster way.
MOST_READ_BYTES = 512 << 20
MOST_ROWS = 512
# Contexts are not known when a step is captured, and how many parts they are read in is fixed then:
# a step is captured for each of these lengths that leads to another number of parts.
LONGEST_TOKENS = (256, 2048, 1 << 30)


class _Body(NamedTuple):
    """Of one number of rows: its inputs on the device, and what runs it by the number of parts that
    contexts are read in. numbers int64 [5, rows]: ids, positions, slots, contexts, and the rows
    whose states are wanted; tables int32 [rows, columns]."""

    numbers: torch.Tensor
    tables: torch.Tensor
    runs: Mapping[int, Callable[[], torch.Tensor]]


class _Head(NamedTuple):
    """Of one number of rows: the states that are read, and what makes logits of them."""

    states: torch.Tensor
    run: Callable[[], torch.Tensor]


class PaddedSteps:
    """Steps of up to `most_rows` rows over one cache. Not for two threads at once."""

    def __init__(self, decoder: DeviceDecoder, cache: Cache, most_rows: int, most_logits: int):
        """most_logits: rows of a step whose logits are wanted, at most."""
        self.decoder = decoder
        self.cache = cache
        self.sizes = tuple(powers(min(most_rows, MOST_ROWS)))
        self.head_sizes = tuple(powers(min(most_logits, MOST_ROWS)))
        self.columns = widened(torch.zeros(1, cache.numbers.shape[2])).shape[1]
        config = decoder.config
        self._read_bytes = 2 * config.kv_heads * config.head_dim * decoder.dtype.itemsize
        self._bodies: dict[int, _Body] = {}
        self._heads: dict[int, _Head] = {}

    def prepare(self) -> None:
        """Captures every size, the largest first, whose memory the smaller ones share."""
        pool = torch.cuda.graph_pool_handle() if self._captures else None
        for rows in reversed(self.sizes):
            self._bodies[rows] = self._body(rows, pool)
        for rows in reversed(self.head_sizes):
            self._heads[rows] = self._head(rows, pool)

    def takes(self, batch: TokenBatch) -> bool:
        """Whether a step is one of these: few enough rows, and prompts that are short enough for
        each row to read its own context."""
        starts, contexts = batch.query_starts, batch.context_tokens
        counts = [stop - start for start, stop in zip(starts, starts[1:], strict=False)]
        read = sum(
            n * (2 * context - n + 1) // 2
            for n, context in zip(counts, contexts, strict=True)
            if n > 1
        )
        return len(batch.ids) <= self.sizes[-1] and read * self._read_bytes <= MOST_READ_BYTES

    def states(self, batch: TokenBatch) -> torch.Tensor:
        """[R, hidden] of batch.logit_rows, for a batch that is taken; writes keys and values. What
        is returned is new."""
        size = next(size for size in self.sizes if size >= len(batch.ids))
        body = self._bodies[size]
        self._fill(body, batch)
        made = body.runs[self._splits(size, max(batch.context_tokens))]()
        return made.index_select(0, body.numbers[4, : len(batch.logit_rows)])

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """[R, vocab] float32 of states [R, hidden], until the next call; more rows than any size
        are computed as the decoder does."""
        size = next((each for each in self.head_sizes if each >= len(states)), None)
        if size is None or not len(states):
            return self.decoder.logits(states)
        head = self._heads[size]
        head.states[: len(states)] = states
        return head.run()[: len(states)]

    def _splits(self, rows: int, longest_tokens: int) -> int:
        """Parts that contexts are read in, of those that are captured."""
        longest = next(each for each in LONGEST_TOKENS if each >= longest_tokens)
        return self.decoder.sizes.splits(rows, longest)

    @property
    def _captures(self) -> bool:
        return self.decoder.device.type == "cuda"

    def _fill(self, body: _Body, batch: TokenBatch) -> None:
        """The batch's rows, then rows of nobody."""
        used, size = len(batch.ids), body.numbers.shape[1]
        counts = torch.tensor(batch.query_starts).diff()
        numbers = torch.empty(5, size, dtype=torch.int64, pin_memory=self._captures)
        numbers[:, used:] = torch.tensor([0, 0, -1, 0, 0])[:, None]
        numbers[0, :used] = batch.ids
        numbers[1, :used] = batch.positions
        numbers[2, :used] = batch.slots
        # A row sees what stands before it, itself included, whatever its sequence computes behind.
        numbers[3, :used] = batch.positions + 1
        numbers[4, : len(batch.logit_rows)] = batch.logit_rows
        tables = batch.page_tables.int().repeat_interleave(counts, dim=0)
        if self._captures:
            tables = tables.pin_memory()
        body.numbers.copy_(numbers, non_blocking=True)
        body.tables[:used, : tables.shape[1]].copy_(tables, non_blocking=True)

    def _body(self, rows: int, pool: object) -> _Body:
        device = self.decoder.device
        numbers = torch.zeros(5, rows, dtype=torch.int64, device=device)
        numbers[2] = -1
        tables = torch.zeros(rows, self.columns, dtype=torch.int32, device=device)

        def runs(splits: int) -> Callable[[], torch.Tensor]:
            def compute() -> torch.Tensor:
                paged = PagedRows(None, tables, numbers[3].int(), splits)
                step = Step(numbers[0], numbers[1], numbers[2], paged, None)
                return self.decoder.rows(step, self.cache)

            return self._runs(compute, pool)

        parts = {self._splits(rows, longest) for longest in LONGEST_TOKENS}
        return _Body(numbers, tables, {splits: runs(splits) for splits in parts})

    def _head(self, rows: int, pool: object) -> _Head:
        states = torch.zeros(
            rows, self.decoder.config.hidden, dtype=self.decoder.dtype, device=self.decoder.device
        )
        return _Head(states, self._runs(lambda: self.decoder.logits(states), pool))

    def _runs(
        self, compute: Callable[[], torch.Tensor], pool: object
    ) -> Callable[[], torch.Tensor]:
        return captured(compute, pool) if self._captures else compute


def captured(compute: Callable[[], torch.Tensor], pool: object) -> Callable[[], torch.Tensor]:
    """What replays `compute` as it was captured; its result is overwritten by the next replay.

    compute runs before it is captured, on a stream of its own, so that everything is compiled and
    libraries have their workspaces.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):  # type: ignore[arg-type]
        out = compute()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay


def powers(most: int) -> Iterator[int]:
    """1, 2, 4, ... up to the first that is `most` or more."""
    size = 1
    while size < most:
        yield size
        size *= 2
    yield size
