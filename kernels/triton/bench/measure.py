"""How calls are timed on a GPU: contenders in turns, in CUDA graphs, medians.

A call of some microseconds is shorter than Python takes to launch it; so each contender's calls
are captured as one graph, which walks over several copies of its tensors: what a step reads comes
from memory there too, not from a cache that the call before has filled. Where a call cannot be
captured it is timed as it is, and said to be.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

COPY_BYTES = 1 << 30
ROTATED_BYTES = 160 << 20  # more than the last cache of any card in the catalogue
GRAPH_S = 1e-3  # a graph holds calls for about so long
MOST_CALLS = 64

Call = Callable[[int], object]


@dataclass(frozen=True)
class Contender:
    """One way to compute a row. call(i) runs it on copy i of its tensors, of `copies`.

    ours: a kernel of this project, the others are peers. check: error of its result, as root mean
    square relative to that of an oracle.
    """

    name: str
    call: Call
    ours: bool
    copies: int = 1
    check: Callable[[], float] | None = None


@dataclass(frozen=True)
class Row:
    """One comparison. moved_bytes: by our kernel, at least. operations: multiplications and
    additions. make allocates the contenders' tensors, which are gone when the row is done."""

    group: str
    case: str
    make: Callable[[], list[Contender]]
    moved_bytes: int = 0
    operations: int = 0


@dataclass
class Timing:
    """Of one contender: median seconds of a call, or why there are none."""

    name: str
    ours: bool
    seconds: float | None = None
    captured: bool = True
    error: float | None = None
    failure: str = ""
    taken_s: list[float] = field(default_factory=list)


def copies_for(size_bytes: int) -> int:
    """How many copies of tensors of this size are more than a cache holds."""
    return max(1, min(32, -(-ROTATED_BYTES // max(size_bytes, 1))))


def measure(contenders: Sequence[Contender], rounds: int) -> list[Timing]:
    """Every round runs each contender once. A failure is told in its Timing and stops nobody."""
    timings = [Timing(each.name, each.ours) for each in contenders]
    runs: list[tuple[Timing, Callable[[], object], int]] = []
    for contender, timing in zip(contenders, timings, strict=True):
        try:
            runs.append((timing, *_prepared(contender, timing)))
        except Exception as failure:
            _failed(timing, failure)
    for _ in range(rounds):
        for timing, run, calls in runs:
            if timing.failure:
                continue
            try:
                timing.taken_s.append(_events_s(run) / calls)
            except Exception as failure:
                _failed(timing, failure)
    for timing in timings:
        if timing.taken_s and not timing.failure:
            timing.seconds = statistics.median(timing.taken_s)
    return timings


def _failed(timing: Timing, failure: Exception) -> None:
    lines = str(failure).strip().splitlines() or [""]
    timing.failure = f"{type(failure).__name__}: {lines[0][:160]}"


def _prepared(contender: Contender, timing: Timing) -> tuple[Callable[[], object], int]:
    """What a round runs, and how many calls that is; the result was checked, if it can be."""
    contender.call(0)
    torch.cuda.synchronize()
    if contender.check is not None:
        timing.error = contender.check()
    one_s = min(_events_s(lambda: contender.call(0)) for _ in range(2))
    wanted = max(contender.copies, min(MOST_CALLS, int(GRAPH_S / max(one_s, 1e-7))))

    def calls() -> None:
        for number in range(wanted):
            contender.call(number % contender.copies)

    graph = _graph(calls)
    if graph is None:
        timing.captured = False
        return calls, wanted
    graph.replay()
    return graph.replay, wanted


def _graph(calls: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
    """None where something in the calls cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            calls()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def _events_s(run: Callable[[], object]) -> float:
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begun.record()
    run()
    ended.record()
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1e3


def host_s(call: Call, calls: int = 200) -> float:
    """Seconds of this process's time for one launch: what a step without a graph pays."""
    for _ in range(5):
        call(0)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(calls):
        call(0)
    taken = time.perf_counter() - begun
    torch.cuda.synchronize()
    return taken / calls


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s that torch's copy reads and writes together: the bandwidth that others are shares
    of."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    taken = [_events_s(lambda: target.copy_(source)) for _ in range(7)]
    return 2 * COPY_BYTES / statistics.median(taken)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of what is wanted."""
    difference = (got.float() - wanted.float()).square().mean().sqrt()
    return float(difference / wanted.float().square().mean().sqrt().clamp(min=1e-30))
