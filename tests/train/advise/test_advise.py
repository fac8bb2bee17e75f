"""What is advised can be run, is ranked by what it costs, and says where its figures are from."""

from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from click.testing import CliRunner

from tests.train import tiny
from train.advise.amp import DeviceKind, Links
from train.advise.cost import Pricer
from train.advise.machines import Machines, machines_of, parse_devices
from train.advise.options import options
from train.advise.ranking import advise
from train.combine import refused
from train.commands import train
from train.job import Job
from train.parallel.mesh_cost import matrices
from train.weights import read_start

SAMPLE_S = 0.01


def machines(*kinds: DeviceKind, network: float = 1e9) -> Machines:
    """Where a micro-batch takes 1 ms and each of its samples 10 ms more."""
    links = Links(network, 1e-5)
    return Machines(kinds, links, lambda n: 1e-3 + SAMPLE_S * n, ("made up",), 1e10)


def alike(count: int, memory: float = 1e12, **more: float) -> Machines:
    return machines(DeviceKind("d", count, 1.0, memory, 1e9, **more))


def job(workers: int = 4, **tables: Any) -> Job:
    """32 samples a step of a model whose layers share no weights."""
    return tiny.job(
        model={"layers": 4, "tied_head": False, "heads": 4, "kv_heads": 4},
        run={"tokens": 16 * 32 * 10, "batch_tokens": 16 * 32, "micro_batch_tokens": 16 * 4},
        precision={"compute": "float32"},
        workers={"count": workers},
        **tables,
    )


def test_every_form_that_is_offered_is_a_job() -> None:
    """As its settings say, written into a file or not; and all kinds of forms are among them."""
    wanted = job()
    accepted = [option for option in options(wanted, 4) if not option.why]
    for option in accepted:
        assert list(refused(option.job)) == []
        for name, value in option.settings.items():
            table, field = name.split(".")
            assert getattr(getattr(option.job, table), field) == value
    names = {name for option in accepted for name in option.settings}
    assert names >= {
        *("sharding.stage", "pipeline.stages", "mesh.tensor", "mesh.sequence", "mesh.full_shard"),
        *("memory.activations", "memory.offload", "run.micro_batch_tokens"),
    }
    why = {option.why for option in options(wanted, 4) if option.why}
    assert any("pipeline" in sentence for sentence in why)


def test_the_first_is_the_fastest_and_free_links_make_micro_batches_large() -> None:
    found = advise(job(), read_start(job()), alike(4))
    times = [advised.step_s for advised in found.ranked]
    assert times == sorted(times) and len(times) > 50
    best = found.ranked[0]
    assert best.job.micro_samples == 8 and best.job.memory.plain and not best.job.pipeline.stages
    assert found.asked is not None and found.asked.step_s > best.step_s


def test_a_step_is_counted_by_hand() -> None:
    """Data parallel, 4 workers, micro-batches of 4: two passes; a ring; 10 numbers of a weight."""
    wanted = job()
    start = read_start(wanted)
    seconds = Pricer(start, alike(4, memory_bytes_per_s=1e9)).cost(wanted).seconds
    weights = 4 * matrices(start.config, 1).elements
    assert seconds.compute == pytest.approx(2 * (1e-3 + 4 * SAMPLE_S))
    assert seconds.exchange == pytest.approx(2 * 3 / 4 * weights / 1e9 + 6e-5)
    assert seconds.update == pytest.approx(10 * weights / 1e9)
    assert seconds.bubble == seconds.moved == 0


def test_a_slow_network_prefers_what_sends_less() -> None:
    """Between lone machines, what lies between a pipeline's stages is less than the gradient."""
    lone = [DeviceKind(f"m{n}", 1, 1.0, 1e12, 1e11) for n in range(4)]
    start = read_start(job())
    quick, slow = (advise(job(), start, machines(*lone, network=rate)) for rate in (1e11, 1e5))
    assert not quick.ranked[0].job.pipeline.stages
    assert slow.ranked[0].job.pipeline.stages > 1


def test_little_memory_rules_forms_out_and_says_so() -> None:
    start, wanted = read_start(job()), job()
    whole = Pricer(start, alike(4)).cost(wanted).memory.total
    found = advise(wanted, start, alike(4, memory=0.5 * whole))
    assert found.asked is None and found.too_large
    assert all(advised.cost.memory.total <= 0.5 * whole for advised in found.ranked)
    assert any("MiB of a worker that has" in why for _, why in found.too_large)
    with pytest.raises(ValueError, match="no form of the job fits its workers; the smallest needs"):
        advise(wanted, start, alike(4, memory=1000.0))


def test_unlike_speeds_are_worth_unlike_shares() -> None:
    """1 and 0.4: the first is by measured shares, and takes what the speeds together allow."""
    kinds = (DeviceKind("fast", 1, 1.0, 1e12, 1e11), DeviceKind("slow", 1, 0.4, 1e12, 1e11))
    wanted = job(2)
    found = advise(wanted, read_start(wanted), machines(*kinds, network=1e11))
    best = found.ranked[0]
    assert best.job.workers.shares == "measured"
    assert best.cost.seconds.compute == pytest.approx(32 * SAMPLE_S / 1.4, rel=0.15)
    equal = Pricer(read_start(wanted), found.machines).cost(wanted).seconds.compute
    assert equal > 1.25 * best.cost.seconds.compute


def test_devices_are_read_from_data_sheets() -> None:
    """Rates as the sheets have them: bfloat16 70 and 65, float32 a half of one, an eighth of the
    other, which has no TF32."""
    for compute, ratio in (("bfloat16", 65 / 70), ("float32", 65 / 8 / (70 / 2))):
        wanted = tiny.job(precision={"compute": compute})
        found = machines_of(wanted, read_start(wanted), "2xA10G@1.01,1xt4*0.5")
        assert [(k.name, k.count) for k in found.kinds] == [("a10g", 2), ("t4", 1)]
        assert found.kinds[1].speed == pytest.approx(ratio / 2)
        assert found.kinds[0].memory_bytes == 24e9 and found.usd_per_h == pytest.approx(2.02)
        assert "nothing measured" in found.sources[0]


BAD = {
    "2xmoon": "no kind is called 'moon'; known: a100-40g",
    "two a10g": "'two a10g' is none of COUNTxKIND",
    "0xa10g": "'0xa10g' is none of COUNTxKIND",
    "1xhere,1xt4": "'here' does not go with kinds of a data sheet",
}


@pytest.mark.parametrize("text", BAD)
def test_a_wrong_device_is_named(text: str) -> None:
    wanted = tiny.job(precision={"compute": "float32"})
    with pytest.raises(ValueError) as error:
        machines_of(wanted, read_start(wanted), text)
    assert BAD[text] in str(error.value)


def test_terms() -> None:
    assert parse_devices("2xA10G@1.5, 1xhere*0.4") == [
        (2, "a10g", 1.0, 1.5),
        (1, "here", 0.4, None),
    ]


FILE = """
name = "t"
[model]
layers = 2
hidden = 32
heads = 2
kv_heads = 2
feed_forward = 48
tied_head = false
[data]
sequence_tokens = 16
[run]
tokens = 2560
batch_tokens = 256
micro_batch_tokens = 64
[precision]
compute = "float32"
[workers]
count = 2
threads = 1
"""


@pytest.mark.parametrize("devices", ["", "2xhere,1xhere*0.4", "2xa10g@1.01,2xt4@0.5"])
def test_the_command_prints_and_draws(devices: str, tmp_path: Path) -> None:
    file, picture = tmp_path / "job.toml", tmp_path / "advice.png"
    file.write_text(FILE)
    more = ["--devices", devices] if devices else []
    asked = CliRunner(env={"COLUMNS": "160"}).invoke(
        train, ["--advise", str(file), "--plot", str(picture), *more]
    )
    assert asked.exit_code == 0, asked.exception
    for word in ("run.micro_batch_tokens", "MiB", "tokens/s", "Not accepted", "From "):
        assert word in asked.output
    assert ("$" in asked.output) == ("@" in devices)
    pixels = matplotlib.image.imread(picture)[..., :3]
    assert pixels.shape[1] > 800 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    assert not (tmp_path / "runs").exists()


def test_what_only_advice_reads_is_refused_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(FILE)
    asked = CliRunner().invoke(train, [str(file), "--devices", "1xt4"])
    assert "are read with --advise" in str(asked.exception)
