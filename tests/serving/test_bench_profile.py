"""`bench profile`: on an engine whose clock is its work, the rows are that work; what is written is
what the catalogue reads."""

import datetime
from pathlib import Path

import pytest

from autoscale.catalog.steps import read_profile
from autoscale.placement.plan import ReplicaShape
from cluster.settings import Settings
from serve import bench_profile, build
from serve.bench_profile import Case, Decode, Measured, Prefill, fitting, run_case, to_toml
from serve.engine.engine import Engine
from tests.serving.tiny import random_model

MODEL = random_model()
VOCAB = MODEL.decoder.config.vocab
SIZES = {"engine": {"kv_tokens": 2048, "page_tokens": 16, "budget_tokens": 64}}


class Work:
    """A clock of computed tokens: 1 ms each, and 10 ms a step."""

    def __init__(self, engine: Engine):
        self.now_s, run = 0.0, engine.runner.run

        def counted(slices):
            self.now_s += 0.01 + 0.001 * sum(piece.stop - piece.start for piece in slices)
            return run(slices)

        engine.runner.run = counted  # type: ignore[method-assign]

    def __call__(self) -> float:
        return self.now_s


def test_rows_are_the_work_of_their_steps():
    engine, storage = build.engine(Settings.model_validate(SIZES), MODEL, None)
    clock = Work(engine)
    for round_number in range(2):  # no prefix of the first round may be found in the second
        name = f"{round_number}"
        assert run_case(engine, Prefill(32), VOCAB, name, clock) == pytest.approx(0.042)
        # More than a step's budget: a prompt in several steps takes the time of them all.
        long_s = run_case(engine, Prefill(256), VOCAB, name, clock)
        assert long_s >= 0.256 + 4 * 0.01
        for sequences in (1, 3, 8):
            step_s = run_case(engine, Decode(sequences, 48), VOCAB, name, clock)
            assert step_s == pytest.approx(0.01 + 0.001 * sequences)
        assert not engine.has_work
    engine.check()
    storage.close()


def test_cases_that_do_not_fit_are_left_out():
    small = Settings.model_validate({"engine": {"kv_tokens": 512, "max_running": 4}})
    cases = fitting(small)
    assert Prefill(512) not in cases and Prefill(256) in cases
    assert {c.sequences for c in cases if isinstance(c, Decode)} <= {1, 2, 4}
    assert not [c for c in cases if isinstance(c, Decode) and c.context_tokens == 512]


def test_what_is_written_is_what_the_catalogue_reads(tmp_path: Path):
    seconds: dict[Case, float] = {
        Prefill(64): 0.1,
        Prefill(512): 0.9,
        Decode(1, 64): 0.01,
        Decode(8, 64): 0.03,
    }
    measured = Measured(seconds, "a model", 4096, 2)
    path = tmp_path / "p.toml"
    path.write_text(to_toml(measured, "cpu", datetime.date(2026, 1, 2)))
    profile, shape = read_profile(path), ReplicaShape("cpu")
    assert profile.source.startswith("measured on ") and "2026-01-02" in profile.source
    assert profile.source.endswith("(model a model)")
    assert profile.kv_tokens(shape) == 4096
    for case, wanted_s in seconds.items():
        if isinstance(case, Prefill):
            assert profile.step_s(shape, case.tokens, 0, 0) == pytest.approx(wanted_s)
        else:
            step_s = profile.step_s(shape, 0, case.sequences, case.context_tokens)
            assert step_s == pytest.approx(wanted_s)


def test_the_whole_of_it_on_a_tiny_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build, "load", lambda settings: MODEL)
    monkeypatch.setattr(bench_profile, "PROMPTS", (16, 64))
    monkeypatch.setattr(bench_profile, "SEQUENCES", (1, 4))
    monkeypatch.setattr(bench_profile, "CONTEXTS", (32,))
    measured = bench_profile.measure(Settings.model_validate(SIZES), rounds=1)
    assert set(measured.seconds) == {Prefill(16), Prefill(64), Decode(1, 32), Decode(4, 32)}
    assert all(seconds > 0 for seconds in measured.seconds.values())
