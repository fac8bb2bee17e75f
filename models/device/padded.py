"""Steps of a few fixed sizes, captured as CUDA graphs: one launch for all of a step's kernels.

From Python a launch takes longer than most kernels run, and a step of 30 layers has 300 of them. So
a step is padded to the next of some sizes, whose tensors stay where they are, and what was captured
over them is replayed. Rows that are added have no slot and see nothing, and a row's result depends
on no other row's, so padding changes none that is real. Without CUDA the same steps run uncaptured,
which is how this is tested. Called by serve/engine/device_runner.py.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from models.batch import TokenBatch
from models.device.decoder import DeviceDecoder
from models.device.step import Cache, Chunks, PagedRows, Step, chunk_places, single_rows, widened

# Of keys and values that the rows of prompts may read in one layer, each row all of its context:
# a fraction of a millisecond of a large GPU. Beyond it prompts are read in chunks.
MOST_READ_BYTES = 128 << 20
MOST_ROWS = 512
# Contexts are not known when a step is captured, and how many parts they are read in is fixed then:
# a step is captured for each of these lengths that leads to another number of parts.
LONGEST_TOKENS = (256, 2048, 1 << 30)
# Steps with chunks: the two largest numbers of rows, keys of all chunks together, and sequences.
CHUNK_SIZES = 2
CHUNK_KEYS = (2048, 8192, 32_768)
CHUNK_SEQUENCES = 32

Run = Callable[[], torch.Tensor]


class Shape(NamedTuple):
    """What a captured step is for: up to so many rows; contexts that rows read are in `splits`
    parts; keys: of chunks, 0 for a step without."""

    rows: int
    splits: int
    keys: int


class _Inputs(NamedTuple):
    """Of every step, on the device; a smaller one uses the first of each. numbers int64 [5, rows]:
    ids, positions, slots, contexts, and rows whose states are wanted; tables int32 [rows, columns];
    chunks of CHUNK_SEQUENCES."""

    numbers: torch.Tensor
    tables: torch.Tensor
    chunks: Chunks


class PaddedSteps:
    """Steps of up to `most_rows` rows over one cache. Not for two threads at once."""

    def __init__(self, decoder: DeviceDecoder, cache: Cache, most_rows: int, most_logits: int):
        """most_logits: rows of a step whose logits are wanted, at most."""
        self.decoder = decoder
        self.cache = cache
        self.sizes = tuple(powers(min(most_rows, MOST_ROWS)))
        self.head_sizes = tuple(powers(min(most_logits, MOST_ROWS)))
        pages = cache.numbers.shape[2]
        held = pages * cache.page_tokens
        self.key_sizes = tuple(keys for keys in CHUNK_KEYS if keys < held) or (held,)
        columns = widened(torch.zeros(1, pages)).shape[1]
        self._inputs = _inputs(self.sizes[-1], columns, self.key_sizes[-1], decoder.device)
        config = decoder.config
        self._states = torch.zeros(
            self.head_sizes[-1], config.hidden, dtype=decoder.dtype, device=decoder.device
        )
        self._read_bytes = 2 * config.kv_heads * config.head_dim * decoder.dtype.itemsize
        self._steps: dict[Shape, Run] = {}
        self._heads: dict[int, Run] = {}

    def prepare(self) -> None:
        """Captures every step, the largest first, whose memory the smaller ones share."""
        pool = torch.cuda.graph_pool_handle() if self._captures else None
        for shape in self.shapes():
            self._steps[shape] = self._runs(lambda shape=shape: self._rows(shape), pool)  # type: ignore[misc]
        for rows in reversed(self.head_sizes):
            states = self._states[:rows]
            self._heads[rows] = self._runs(lambda of=states: self.decoder.logits(of), pool)  # type: ignore[misc]

    def shapes(self) -> Iterator[Shape]:
        """Of all steps, the largest first."""
        for rows in reversed(self.sizes):
            if rows in self.sizes[-CHUNK_SIZES:]:
                splits = self._splits(rows, LONGEST_TOKENS[-1])
                yield from (Shape(rows, splits, keys) for keys in reversed(self.key_sizes))
            for splits in sorted({self._splits(rows, longest) for longest in LONGEST_TOKENS}):
                yield Shape(rows, splits, 0)

    def shape(self, batch: TokenBatch) -> Shape | None:
        """The step that a batch is padded to; None for one that is too large for any. Short prompts
        are rows that read pages, as tokens are; longer ones are chunks."""
        rows = next((size for size in self.sizes if size >= len(batch.ids)), None)
        if rows is None:
            return None
        if self._read(batch) * self._read_bytes <= MOST_READ_BYTES:
            return Shape(rows, self._splits(rows, max(batch.context_tokens)), 0)
        contexts = batch.context_tokens[single_rows(batch) :]
        keys = next((size for size in self.key_sizes if size >= sum(contexts)), None)
        if keys is None or len(contexts) > CHUNK_SEQUENCES:
            return None
        rows = max(rows, self.sizes[-CHUNK_SIZES:][0])
        return Shape(rows, self._splits(rows, LONGEST_TOKENS[-1]), keys)

    def states(self, batch: TokenBatch, shape: Shape) -> torch.Tensor:
        """[R, hidden] of batch.logit_rows, new; writes keys and values. shape: the batch's own."""
        if shape.keys:
            self._fill_chunks(batch)
        self._fill(batch, shape)
        made = self._steps[shape]()
        return made.index_select(0, self._inputs.numbers[4, : len(batch.logit_rows)])

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """[R, vocab] float32 of states [R, hidden], until the next call; more rows than any size
        are computed as the decoder does."""
        size = next((each for each in self.head_sizes if each >= len(states)), None)
        if size is None or not len(states):
            return self.decoder.logits(states)
        self._states[: len(states)] = states
        return self._heads[size]()[: len(states)]

    def _read(self, batch: TokenBatch) -> int:
        """Tokens that the rows of prompts see, all together."""
        starts = batch.query_starts
        pairs = zip(starts, starts[1:], batch.context_tokens, strict=False)
        counts = ((stop - start, context) for start, stop, context in pairs)
        return sum(n * (2 * context - n + 1) // 2 for n, context in counts if n > 1)

    def _splits(self, rows: int, longest_tokens: int) -> int:
        """Parts that contexts are read in, of those that are captured."""
        longest = next(each for each in LONGEST_TOKENS if each >= longest_tokens)
        return self.decoder.sizes.splits(rows, longest)

    @property
    def _captures(self) -> bool:
        return self.decoder.device.type == "cuda"

    def _fill(self, batch: TokenBatch, shape: Shape) -> None:
        """The batch's rows, then rows of nobody."""
        used = len(batch.ids)
        numbers = torch.empty(5, shape.rows, dtype=torch.int64, pin_memory=self._captures)
        numbers[:, used:] = torch.tensor([0, 0, -1, 0, 0])[:, None]
        numbers[0, :used] = batch.ids
        numbers[1, :used] = batch.positions
        numbers[2, :used] = batch.slots
        # A row sees what stands before it, itself included, whatever its sequence computes behind.
        numbers[3, :used] = batch.positions + 1
        tables = batch.page_tables.int()
        if shape.keys:
            paged = single_rows(batch)
            numbers[3, paged:] = 0
            tables = tables[:paged]
        else:
            counts = torch.tensor(batch.query_starts).diff()
            tables = tables.repeat_interleave(counts, dim=0)
        numbers[4, : len(batch.logit_rows)] = batch.logit_rows
        self._put(self._inputs.numbers[:, : shape.rows], numbers)
        self._put(self._inputs.tables[: len(tables), : tables.shape[1]], tables)

    def _fill_chunks(self, batch: TokenBatch) -> None:
        """The batch's chunks, then sequences of no rows; nobody reads keys behind the last."""
        places = chunk_places(batch, single_rows(batch), self.cache.page_tokens)
        static = self._inputs.chunks
        for fixed, given in zip(static[:2], places[:2], strict=True):
            missing = len(fixed) - len(given)
            self._put(fixed, torch.cat((given, given[-1:].expand(missing))))
        self._put(static.key_slots[: len(places.key_slots)], places.key_slots)

    def _put(self, fixed: torch.Tensor, given: torch.Tensor) -> None:
        if not given.numel():
            return
        if self._captures and not given.is_pinned():
            given = given.pin_memory()
        fixed.copy_(given, non_blocking=True)

    def _rows(self, shape: Shape) -> torch.Tensor:
        """What is captured: the states of all rows."""
        numbers, tables, chunks = self._inputs
        numbers = numbers[:, : shape.rows]
        paged = PagedRows(tables[: shape.rows], numbers[3].int(), shape.splits)
        if shape.keys:
            chunks = chunks._replace(key_slots=chunks.key_slots[: shape.keys])
        step = Step(numbers[0], numbers[1], numbers[2], paged, chunks if shape.keys else None)
        return self.decoder.rows(step, self.cache)

    def _runs(self, compute: Run, pool: object) -> Run:
        return captured(compute, pool) if self._captures else compute


def _inputs(rows: int, columns: int, keys: int, device: torch.device) -> _Inputs:
    """Of nobody."""
    numbers = torch.zeros(5, rows, dtype=torch.int64, device=device)
    numbers[2] = -1
    tables = torch.zeros(rows, columns, dtype=torch.int32, device=device)
    starts = torch.zeros(CHUNK_SEQUENCES + 1, dtype=torch.int32, device=device)
    slots = torch.zeros(keys, dtype=torch.int64, device=device)
    return _Inputs(numbers, tables, Chunks(starts, starts.clone(), slots))


def captured(compute: Run, pool: object) -> Run:
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
