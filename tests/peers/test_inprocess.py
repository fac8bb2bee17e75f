"""The lines that measured processes speak, how a rate follows from steps, and what the table of
engines in process makes of figures."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.peers.inprocess import compare as comparison
from tests.peers.inprocess.children import Asked, ChildError, LlamaCpp, child
from tests.peers.inprocess.compare import CELLS, ROUNDS, STEP, Best, Source, Table, compare
from tests.peers.inprocess.contenders import OURS, SAME_FILE, Contender
from tests.peers.inprocess.protocol import Cell, Mark, decode_rate, stepped
from tests.peers.inprocess.report import draw, plain, text
from tests.prove.kernel_peers import BEST, verdicts

TALKATIVE = """
import os, sys, time
from tests.peers.inprocess.protocol import serve
def measure(cell):
    print("a library says something")
    os.write(1, b"so does its C++\\n")
    if cell.batch == 2: raise RuntimeError("first line\\nlast line")
    if cell.batch == 3: os._exit(3)
    if cell.batch == 4: time.sleep(60)
    return {"engine": cell.batch * cell.new_tokens + 0.5}
print("before it is ready")
serve(lambda: ("1.2", measure))
"""


def test_a_child_answers_cells_whatever_it_prints():
    with child([sys.executable, "-c", TALKATIVE], {}, 60) as one:
        assert one.version == "1.2"
        assert one.figures(Cell(1, 8, 4)) == {"engine": 4.5}
        with pytest.raises(ChildError, match="RuntimeError: last line"):
            one.figures(Cell(2, 8, 4))
        assert one.figures(Cell(5, 8, 2)) == {"engine": 10.5}  # an error is not its end
        assert one.cpu_s() > 0
        with pytest.raises(ChildError, match="so does its C"):
            one.figures(Cell(3, 8, 4))
        with pytest.raises(ChildError, match="it ended"):
            one.figures(Cell(1, 8, 4))


def test_a_late_child_is_ended():
    with child([sys.executable, "-c", TALKATIVE], {}, 60) as one:
        with pytest.raises(ChildError, match="no answer within 0.2 s"):
            one.figures(Cell(4, 8, 4), deadline_s=0.2)
        with pytest.raises(ChildError, match="it ended"):
            one.figures(Cell(1, 8, 4))


def test_a_child_that_cannot_load_says_why():
    broken = "from tests.peers.inprocess.protocol import serve\nserve(lambda: 1 / 0)"
    for script, said in ((broken, "division by zero"), ("raise SystemExit('no such')", "no such")):
        with (
            pytest.raises(ChildError, match=said),
            child([sys.executable, "-c", script], {}, 60),
        ):
            pass


def test_prompts_are_new_in_every_turn():
    seen = [tuple(p) for turn in range(4) for p in Cell(32, 128, 1, turn).prompts()]
    assert len({p[:16] for p in seen}) == len(seen) == 128
    assert all(len(p) == 128 and min(p) >= 1000 and max(p) < 41_000 for p in seen)


def test_a_rate_is_of_the_steps_that_all_sequences_share():
    marks = [
        Mark(1.0, (1, 0)),  # the second one's prompt is not done
        Mark(2.0, (2, 1)),
        Mark(2.5, (3, 2)),
        Mark(3.0, (4, 3)),  # the first one is done
        Mark(9.0, (4, 4)),
    ]
    assert decode_rate(marks, 4) == 4.0
    with pytest.raises(ValueError, match="2 new tokens each are too few"):
        decode_rate(marks[:3], 2)
    with pytest.raises(ValueError, match="0 sequences"):
        decode_rate([], 2)


def test_steps_are_timed_by_the_clock(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 1.0, 2.0, 4.0])  # the beginning, then the end of each step
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    script = iter([(0, 0), (1, 0), (1, 1)])

    def step(counts: list[int]) -> bool:
        counts[:] = next(script, (-1, -1))
        return counts[0] >= 0

    assert stepped(Cell(2, 10, 0), step) == 20 / 4.0


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """llama.cpp's benchmarks as shell scripts that note how they were called."""
    lines = {"llama-batched-bench": '{"speed_tg": 61.5}', "llama-bench": '{"avg_ts": 300.5}'}
    for name, line in lines.items():
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\necho \"$@\" > {file}.called\necho loading\necho '{line}'\n")
        file.chmod(0o755)
    return tmp_path


def test_llama_cpp_is_read(programs: Path):
    one = LlamaCpp(programs, Path("w.gguf"), "b1")
    assert one.figures(Cell(8, 128, 64)) == {"step": 61.5}
    called = (programs / "llama-batched-bench.called").read_text()
    assert "-m w.gguf -npp 128 -ntg 64 -npl 8" in called and "-t 2 -tb 2" in called
    assert one.figures(Cell(1, 512, 0)) == {"step": 300.5}
    assert "-p 512 -n 0" in (programs / "llama-bench.called").read_text()
    (programs / "llama-bench").write_text("#!/bin/sh\necho broken >&2\nexit 4\n")
    with pytest.raises(ChildError, match="ended with 4: broken"):
        one.figures(Cell(1, 512, 0))


class Scripted:
    """An engine that answers by a list, and notes whose turn it is."""

    version = "1"

    def __init__(self, name: str, order: list[str], figures: list[float | str]) -> None:
        self._name, self._order, self._figures = name, order, iter(figures)

    def figures(self, cell: Cell) -> Mapping[str, float]:
        self._order.append(f"{self._name} {cell.turn} {cell.new_tokens}")
        figure = next(self._figures)
        if isinstance(figure, str):
            raise ChildError(figure)
        return {"engine": figure}

    def cpu_s(self) -> float:
        return 0.0


def scripted(name: str, order: list[str], *figures: float | str, kept: bool = True) -> Contender:
    def run() -> AbstractContextManager[Asked]:
        return contextlib.nullcontext(Scripted(name, order, list(figures)))

    return Contender(name, run, new_tokens=8, kept=kept)


def test_engines_take_turns_and_a_failure_takes_all_figures_with_it(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(comparison, "busy_cores", lambda: 0.25)
    order: list[str] = []
    cells = {"x": Cell(1, 4, 64), "y": Cell(1, 4, 0)}
    engines = [
        scripted("a", order, 0, 0, 1, 2, 3, 4, 9, 6),
        scripted("b", order, 0, 0, 1, 2, 3, "it ended: killed"),
        scripted("c", order, "no such file"),
        scripted("d", order, 5, 6, 7, 8, 5, 6, kept=False),
    ]
    table = compare(engines, cells, rounds=3)
    warm = ["a 0 16", "a 0 0", "b 0 16", "b 0 0", "c 0 16"]
    both = ["a {0} 8", "b {0} 8", "d {0} 8", "a {0} 0", "b {0} 0", "d {0} 0"]
    last = ["a 3 8", "d 3 8", "a 3 0", "d 3 0"]
    assert order == warm + [o.format(t) for t in (1, 2) for o in both] + last
    assert table.values == {
        "x": {Source("a", "engine"): [1, 3, 9], Source("d", "engine"): [5, 7, 5]},
        "y": {Source("a", "engine"): [2, 4, 6], Source("d", "engine"): [6, 8, 6]},
    }
    assert table.failed == {"b": "y: it ended: killed", "c": "ChildError: no such file"}
    assert table.median("x", Source("a", "engine")) == 3
    assert table.foreign == [0.25] * 6  # before each cell of each round


def test_a_round_without_time_is_not_begun(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comparison, "WHOLE_S", -1.0)
    table = compare([scripted("a", [], 0, 1)], {"y": Cell(1, 4, 0)}, rounds=3)
    assert table.rounds == 1
    assert not next(verdicts(table, ["a"])).ok


PEERS = ("llama.cpp Q4_1", "llama.cpp Q4_0", "vLLM bfloat16")


def measured(step: float, engine: float) -> Table:
    """Of ours `step` and `engine` everywhere; of peers 100, 120 and 130."""
    table = Table(rounds=ROUNDS, foreign=[0.0, 0.2])
    for name in (*OURS.values(), *PEERS):
        table.versions[name] = "1"
    for cell in CELLS:
        for name in OURS.values():
            table.add(cell, Source(name, STEP), step)
            table.add(cell, Source(name, "engine"), engine)
        for name, way, figure in zip(PEERS, (STEP, STEP, "engine"), (100, 120, 130), strict=True):
            table.add(cell, Source(name, way), figure)
    return table


def test_like_is_compared_with_like():
    table = measured(step=240, engine=260)
    best = table.best("decode 8", OURS["fast"], lambda name: name in PEERS)
    assert best == Best(Source("llama.cpp Q4_0", STEP), 120, 240, 2.0)  # and vLLM's 130 with 260
    table = measured(step=240, engine=195)
    best = table.best("decode 8", OURS["fast"], lambda name: name in PEERS)
    assert best == Best(Source("vLLM bfloat16", "engine"), 130, 195, 1.5)
    best = table.best("decode 8", OURS["fast"], lambda name: name == SAME_FILE)
    assert best.ratio == 2.4


def found(table: Table) -> dict[str, bool]:
    return {row.check: row.ok for row in verdicts(table, [*OURS.values(), *PEERS])}


def test_every_target_is_a_row_and_can_be_missed():
    made = found(measured(step=400, engine=400))
    assert len(made) == 3 + 4 * 4 + 4 * 3 and all(made.values())
    assert not any(ok for check, ok in found(measured(80, 80)).items() if "over" in check)
    for mode, cells in BEST.items():
        for cell, target in cells.items():
            just = found(measured(target * 130, target * 130))
            short = found(measured(target * 120, target * 129.9))
            name = f"in process: {cell}, {mode}, over the best peer"
            assert just[name] and not short[name]


def test_what_is_not_there_is_missed():
    table = measured(400, 400)
    table.fail("vLLM bfloat16", "no answer within 90 s")
    first = next(verdicts(table, [*OURS.values(), *PEERS]))
    assert not first.ok and "vLLM bfloat16 failed (no answer" in first.measured
    assert not next(verdicts(measured(400, 400), [*OURS.values(), *PEERS, "d"])).ok
    table = measured(400, 400)
    table.fail(SAME_FILE, "gone")
    assert not any(ok for check, ok in found(table).items() if check.endswith(SAME_FILE))
    table = measured(400, 400)
    table.fail(OURS["fast"], "gone")
    assert not any(ok for check, ok in found(table).items() if ", fast," in check)
    table = measured(400, 400)
    table.idlers = 0.5
    assert not found(table)["the others wait while one is measured"]
    table = measured(400, 400)
    table.foreign.append(0.4)
    assert not found(table)["the machine is otherwise idle"]
    assert not any(found(Table()).values())


def test_busy_cores_are_counted():
    script = "import time\nuntil = time.monotonic() + 20\nwhile time.monotonic() < until: pass"
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        assert 0.2 < comparison.busy_cores(1.0) <= (os.cpu_count() or 1) + 0.1
    finally:
        process.kill()
        process.wait()


def test_the_table_is_told_as_text_json_and_picture(tmp_path: Path):
    table = measured(400, 390.5)
    table.fail("vLLM bfloat16", "killed")
    lines = text(table).splitlines()
    assert lines[0].split() == ["tokens/s", "timed", *" ".join(CELLS).split()]
    assert lines[2].split() == ["sanderling", "accurate", "engine", *["390.5"] * len(CELLS)]
    assert lines[-1] == "vLLM bfloat16: killed"
    assert json.loads(json.dumps(plain(table)))["figures"][0]["tokens_per_s"] == [400]
    draw(table, tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes()[1:4] == b"PNG"
