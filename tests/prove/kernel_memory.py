"""Proof rows of what a replica over the CPU kernels holds: resident memory of one, and of two on
one machine, whose weights are one mapped file.

`python -m tests.prove.kernel_memory FOLDER` is such a replica: it builds the engine as an actor
does, answers a prompt, and tells what it holds for each line it reads. FOLDER keeps the packed
weights. Of the KV pool only what was written counts, for only that is memory.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.prove.row import Row

MIB = 1 << 20
MOST_BESIDES_BYTES = 350 * MIB
PROMPT_TOKENS, ANSWER_TOKENS = 512, 32


class Held(NamedTuple):
    """Bytes of one process: resident, with shared pages divided among their users, and of these
    two the part that is packed weights; how large weights and the written pages of KV are."""

    rss: int
    pss: int
    weights_rss: int
    weights_pss: int
    weights: int
    kv: int


def rows() -> Iterator[Row]:
    """Every row of this module, as it is measured; about a minute."""
    with tempfile.TemporaryDirectory() as folder:
        replica(folder).communicate()  # packs the weights, which the next ones map
        [alone] = hold(folder, 1)
        yield resident(alone)
        yield from shared(hold(folder, 2))


def resident(held: Held) -> Row:
    """One replica against its weights, its written KV and what else it may need."""
    most = held.weights + held.kv + MOST_BESIDES_BYTES
    target = f"<= weights {held.weights >> 20} + KV {held.kv >> 20} + {MOST_BESIDES_BYTES >> 20}"
    measured = f"{held.rss >> 20} MiB"
    return Row("resident memory of a replica, MiB", target, measured, held.rss <= most)


def shared(both: list[Held]) -> Iterator[Row]:
    """Two replicas hold one copy of the weights, each half of it by PSS."""
    total = sum(held.weights_pss for held in both)
    most = 1.05 * both[0].weights
    measured = f"{total / MIB:.0f} of {both[0].weights / MIB:.0f} MiB"
    ok = 0 < total <= most and all(held.weights_rss > held.weights // 2 for held in both)
    yield Row("weights in two replicas on one machine, by PSS", "once", measured, ok)
    besides = max(held.pss - held.weights_pss - held.kv for held in both)
    target = f"<= {MOST_BESIDES_BYTES >> 20} MiB"
    measured = f"{besides / MIB:.0f} MiB"
    yield Row("PSS of each besides weights and KV", target, measured, besides <= MOST_BESIDES_BYTES)


def hold(folder: str, count: int) -> list[Held]:
    """What so many replicas hold while all of them are there."""
    replicas = [replica(folder) for _ in range(count)]
    try:
        for process in replicas:
            _ask(process, "wait")  # answered once it is up
        return [Held(**_ask(process, "tell")) for process in replicas]
    finally:
        for process in replicas:
            process.communicate()


def replica(folder: str) -> "subprocess.Popen[bytes]":
    """A process of `main`; it ends when its input does."""
    command = [sys.executable, "-m", "tests.prove.kernel_memory", folder]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe)


def _ask(process: "subprocess.Popen[bytes]", word: str) -> dict[str, int]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{word}\n".encode())
    process.stdin.flush()
    answer: dict[str, int] = json.loads(process.stdout.readline())
    return answer


def main(folder: str) -> None:
    """A replica: everything that an actor imports, an engine, one answered prompt."""
    import serve.actors  # noqa: F401  Ray and what else an actor's process holds
    from cluster.settings import Settings
    from serve import build
    from serve.engine.sequence import Limits, Request, Sampling, Sequence
    from serve.kv.prefix import CacheKey

    settings = Settings.model_validate({"engine": {"kernels": "cpu"}, "data_dir": folder})
    model = build.load(settings)
    engine, storage = build.engine(settings, model, None)
    limits, prompt = Limits(ANSWER_TOKENS, ignore_eos=True), tuple(range(100, 100 + PROMPT_TOKENS))
    engine.add(Sequence(Request("one", prompt, Sampling(0.0), limits, CacheKey("", "", ""))))
    while engine.has_work:
        engine.step()
    weights = sum(file.stat().st_size for file in Path(folder).rglob("*.weights"))
    kv = storage.token_bytes * (PROMPT_TOKENS + ANSWER_TOKENS)
    for _ in sys.stdin:
        print(json.dumps(_held(weights, kv)._asdict()), flush=True)


def _held(weights: int, kv: int) -> Held:
    total = _sums(Path("/proc/self/smaps_rollup").read_text())
    mapped = _sums("\n".join(_mappings(".weights")))
    return Held(total["Rss"], total["Pss"], mapped["Rss"], mapped["Pss"], weights, kv)


def _mappings(ending: str) -> Iterator[str]:
    """The lines of /proc/self/smaps that belong to files of such a name."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split(maxsplit=1)[0].endswith(":"):  # a mapping's first line, its name last
            inside = line.endswith(ending)
        elif inside:
            yield line


def _sums(text: str) -> dict[str, int]:
    """Rss and Pss in bytes, added up."""
    sums = {"Rss": 0, "Pss": 0}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if name in sums:
            sums[name] += int(rest.split()[0]) * 1024
    return sums


if __name__ == "__main__":
    main(sys.argv[1])
