"""What has to move for a new layout, from where, and in which order.

Keys and values go first, then layers from the front, so that early stages start while later ones
are still on their way (Miao et al., "SpotServe", ASPLOS 2024, section 3.4). A layer whose coming
would put an accelerator above its limit waits until others have been given up. What nobody holds
any more comes from storage. A machine under notice still sends, and takes nothing.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from autoscale.placement.migration import Device, Live, Mapped, Place, Sizes

What = Literal["weights", "kv"]
Part = tuple[What, int]
Span = tuple[float, float]
STORAGE = None


@dataclass(frozen=True)
class Move:
    """The part low..high of one layer to one accelerator; source None: from storage."""

    what: What
    layer: int
    low: float
    high: float
    source: Device | None
    target: Device
    bytes: float


@dataclass(frozen=True)
class Migration:
    """steps: moves that may run together, one step after the other. peak_bytes: most that any
    accelerator holds at a time. ready_after: of each (replica, first layer of a stage), the step
    after which it can start; -1: at once."""

    steps: tuple[tuple[Move, ...], ...]
    peak_bytes: float
    ready_after: Mapping[tuple[int, int], int]
    lost_kv_tokens: int

    def moved_bytes(self, what: What | None = None) -> float:
        return sum(m.bytes for step in self.steps for m in step if what in (None, m.what))

    def duration_s(self, gb_per_s: float) -> float:
        """With links of this speed per accelerator and direction, steps in turn."""
        total = 0.0
        for step in self.steps:
            busy: dict[tuple[Device | None, bool], float] = defaultdict(float)
            for move in step:
                busy[move.target, True] += move.bytes
                if move.source is not None:
                    busy[move.source, False] += move.bytes
            total += max(busy.values(), default=0.0)
        return total / (gb_per_s * 1e9)


def migrate(
    old: Mapping[Device, Place],
    mapped: Mapped,
    sizes: Sizes,
    *,
    limit_bytes: float,
    live: Live | None = None,
) -> Migration:
    """The order of moves under a limit of bytes per accelerator. ValueError with the smallest limit
    reached where no order of whole layers keeps it."""
    live = live or Live()
    moves: dict[Part, list[Move]] = defaultdict(list)
    for move in _moves(old, mapped.places, sizes, live):
        moves[move.what, move.layer].append(move)
    held = _Held(old, mapped.places, sizes, live)
    kinds: tuple[What, What] = ("kv", "weights")
    every: list[Part] = [(what, layer) for what in kinds for layer in range(sizes.layers)]
    waiting = [part for part in every if part in moves]
    held.release(part for part in every if part not in moves)
    steps: list[tuple[Move, ...]] = []
    while waiting:
        part = _next(held, moves, waiting, limit_bytes)
        waiting.remove(part)
        held.take(moves[part], limit_bytes)
        held.release([part])
        steps.append(tuple(moves[part]))
    lost = set(live.tokens) - set(live.inherits.values())
    tokens = sum(live.tokens[replica] for replica in lost)
    return Migration(tuple(steps), held.peak_bytes, _ready(steps, mapped.places), tokens)


def _moves(
    old: Mapping[Device, Place], new: Mapping[Device, Place], sizes: Sizes, live: Live
) -> Iterator[Move]:
    """Every part that a device needs and does not hold, from whoever has sent least so far."""
    sent: dict[Device | None, float] = defaultdict(float)
    for target, place in sorted(new.items()):
        before = live.inherits.get(place.replica)
        for layer in range(place.start, place.stop):
            was = old.get(target)
            mine = _part(was, layer)
            theirs = {d: _part(p, layer) for d, p in old.items() if d != target}
            own = [mine] if mine else []
            parts = _split(place.low, place.high, own)
            for piece in _sourced(parts, theirs, target, sent):
                size = (piece[1] - piece[0]) * sizes.layer_bytes
                sent[piece[2]] += size
                yield Move("weights", layer, *piece, target, size)
            tokens = live.tokens.get(before, 0) if before is not None else 0
            if not tokens:
                continue
            holders = {d: s for d, s in theirs.items() if old[d].replica == before}
            kept = own if was and was.replica == before else []
            for piece in _sourced(_split(place.low, place.high, kept), holders, target, sent):
                if piece[2] is not STORAGE:
                    size = (piece[1] - piece[0]) * sizes.kv_bytes * tokens
                    sent[piece[2]] += size
                    yield Move("kv", layer, *piece, target, size)


def _part(place: Place | None, layer: int) -> Span | None:
    if place is None or not place.start <= layer < place.stop:
        return None
    return place.low, place.high


def _split(low: float, high: float, without: Sequence[Span]) -> list[Span]:
    """low..high without the spans."""
    left = [(low, high)]
    for a, b in without:
        left = [
            piece
            for x, y in left
            for piece in ((x, min(y, a)), (max(x, b), y))
            if piece[1] - piece[0] > 1e-12
        ]
    return left


def _sourced(
    parts: Sequence[Span],
    holders: Mapping[Device, Span | None],
    target: Device,
    sent: Mapping[Device | None, float],
) -> Iterator[tuple[float, float, Device | None]]:
    """Each part from a holder of (some of) it: of the same machine if there is one, else from the
    one that has sent least; the rest from storage."""
    todo = list(parts)
    while todo:
        low, high = todo.pop()
        having = [
            (device.machine != target.machine, sent[device], device, span)
            for device, span in holders.items()
            if span and min(high, span[1]) - max(low, span[0]) > 1e-12
        ]
        if not having:
            yield low, high, STORAGE
            continue
        _, _, device, span = min(having)
        a, b = max(low, span[0]), min(high, span[1])
        yield a, b, device
        todo += _split(low, high, [(a, b)])


class _Held:
    """What every accelerator holds while the moves are made."""

    def __init__(
        self,
        old: Mapping[Device, Place],
        new: Mapping[Device, Place],
        sizes: Sizes,
        live: Live,
    ):
        self._bytes: dict[Device, float] = defaultdict(float)
        self._given_up: dict[Part, list[tuple[Device, float]]] = defaultdict(list)
        for device, place in old.items():
            to = new.get(device)
            goes_on = to is not None and live.inherits.get(to.replica) == place.replica
            for layer in range(place.start, place.stop):
                width = place.high - place.low
                kept = _common(place, to, layer)
                each_kv = sizes.kv_bytes * live.tokens.get(place.replica, 0)
                self._bytes[device] += width * (sizes.layer_bytes + each_kv)
                gone = (width - kept) * sizes.layer_bytes
                self._given_up["weights", layer].append((device, gone))
                gone_kv = (width - (kept if goes_on else 0.0)) * each_kv
                self._given_up["kv", layer].append((device, gone_kv))
        self.peak_bytes = max(self._bytes.values(), default=0.0)

    def needed(self, step: Sequence[Move]) -> float:
        """Most bytes on any receiver while the step runs: new beside old."""
        arriving: dict[Device, float] = defaultdict(float)
        for move in step:
            arriving[move.target] += move.bytes
        return max((self._bytes[d] + size for d, size in arriving.items()), default=0.0)

    def take(self, step: Sequence[Move], limit_bytes: float) -> None:
        """Make the step."""
        needed = self.needed(step)
        if needed > limit_bytes * (1 + 1e-9):
            raise ValueError(
                f"limit_bytes is {limit_bytes:.3g}; moving layer by layer needs {needed:.3g}"
            )
        self.peak_bytes = max(self.peak_bytes, needed)
        for move in step:
            self._bytes[move.target] += move.bytes

    def release(self, parts: Iterable[Part]) -> None:
        """Give up what the new layout does not want of these."""
        for part in parts:
            for device, gone in self._given_up.pop(part, ()):
                self._bytes[device] -= gone


def _common(place: Place, to: Place | None, layer: int) -> float:
    part = _part(to, layer)
    return max(0.0, min(place.high, part[1]) - max(place.low, part[0])) if part else 0.0


def _next(
    held: _Held, moves: Mapping[Part, Sequence[Move]], waiting: Sequence[Part], limit_bytes: float
) -> Part:
    """The first that fits; where none does, the one that needs least."""
    needs = []
    for at, part in enumerate(waiting):
        need = held.needed(moves[part])
        if need <= limit_bytes * (1 + 1e-9):
            return part
        needs.append((need, at))
    return waiting[min(needs)[1]]


def _ready(
    steps: Sequence[Sequence[Move]], new: Mapping[Device, Place]
) -> dict[tuple[int, int], int]:
    ready = {(place.replica, place.start): -1 for place in new.values()}
    for number, step in enumerate(steps):
        for move in step:
            place = new[move.target]
            ready[place.replica, place.start] = number
    return ready
