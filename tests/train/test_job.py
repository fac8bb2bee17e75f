"""A job's file: what is accepted, and the sentence for what is not."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from tests.train import tiny
from train.data.texts import documents
from train.job import Job, read_job

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def read(path: Path, text: str) -> Job:
    path.write_text(text)
    return read_job(path)


def test_an_empty_file_is_the_demo(tmp_path: Path):
    job = read(tmp_path / "job.toml", "")
    assert job.path == tmp_path / "runs" / "brown" and job.data.sources == ("brown",)
    assert job.steps == -(-job.run.tokens // job.run.batch_tokens)


REFUSED = {
    "run.batch_tokens = 100": "must be a multiple of data.sequence_tokens = 256",
    "run.token = 3": "the nearest is tokens",
    "optimizer.name = 'lion'": "'adamw', 'adafactor' or 'sgd'",
    "model.heads = 5": "hidden must be a multiple of 2 x heads = 10",
    "model.kv_heads = 3": "heads must be a multiple of kv_heads = 3",
    "run.micro_batch_tokens = 8": "must be at least data.sequence_tokens = 256",
    "budget.usd = 1.0": "usd needs usd_per_worker_h",
    "workers.count = 0": "greater than or equal to 1",
    "schedule = {name = 'wsd', warmup = 0.9}": "at most 1",
    "name = '../elsewhere'": "name",
    "optimizer.learning_rate = nan": "learning_rate",
    "sharding.stage = 4": "1, 2 or 3",
    "resilience.mode = 'prayer'": "'bamboo'",
    "x = ": "not valid TOML",
}


ELASTIC = "workers = {count = 4, where = 'elastic'}\n"
PIPELINE = "precision.compute = 'float32'\nmodel.tied_head = false\n"
NO_CHECKPOINTS = "resilience = {mode = 'varuna', checkpoint_every_steps = 0}\n"
ULYSSES = "mesh.sequence_kind = 'ulysses'\n"
APART = {
    "sharding.stage = 2\noptimizer.name = 'adafactor'": 'optimizer.name = "adamw" is accepted',
    ELASTIC + "sharding.stage = 3": '1 with resilience.mode = "gemini"',
    ELASTIC + "sharding.stage = 1": '1 with resilience.mode = "gemini"',
    "resilience.mode = 'gemini'\nsharding.stage = 1": "workers.where = 'local'",
    ELASTIC + "resilience.mode = 'gemini'": "sharding.stage = 0 must be 1",
    ELASTIC + "resilience = {mode = 'gemini', copies = 5}\nsharding.stage = 1": "2 to 4",
    ELASTIC + "resilience.mode = 'bamboo'": "pipeline.stages = 1 or more is accepted",
    ELASTIC + PIPELINE + "resilience.mode = 'bamboo'\npipeline.stages = 1": "must be 2 or more",
    ELASTIC + PIPELINE + "resilience.mode = 'oobleck'\npipeline.stages = 3": "at least 6",
    ELASTIC + PIPELINE + "resilience.mode = 'oobleck'\npipeline.stages = 2": "a micro-batch",
    ELASTIC + PIPELINE + "pipeline.stages = 2": '"bamboo", "oobleck" or "varuna" is accepted',
    ELASTIC + PIPELINE + NO_CHECKPOINTS + "pipeline.stages = 2": "1 or more",
    PIPELINE + "pipeline.stages = 3": "workers.count = 2",
    PIPELINE + "workers.count = 3\npipeline.stages = 2": "a multiple of pipeline.stages = 2",
    PIPELINE + "workers.count = 6\npipeline.stages = 6": "at most 5 are accepted",
    PIPELINE + "pipeline.stages = 2\nsharding.stage = 1": "sharding.stage = 0 is accepted",
    PIPELINE + "pipeline.stages = 2\noptimizer.name = 'adafactor'": '"adamw" is accepted',
    "mesh.tensor = 3\nworkers.count = 4": "mesh.tensor x mesh.sequence = 3 x 1",
    "mesh.tensor = 8\nworkers.count = 8": "cannot share model.kv_heads = 4",
    "mesh.tensor = 2\nmodel.feed_forward = 703": "model.feed_forward = 703",
    "mesh.sequence = 3\nworkers.count = 3": "= 256 must be a multiple of 6",
    ULYSSES + "mesh.sequence = 8\nworkers.count = 8": "cannot share 4 heads of attention",
    ULYSSES: "is read where mesh.sequence is 2",
    "mesh.sequence_parallel = true": "is read where mesh.tensor is 2",
    "mesh.tensor = 2\nworkers.where = 'elastic'": '"local" is accepted',
    "mesh.full_shard = true\nsharding.stage = 3": "mesh.full_shard = true shares the state",
    "mesh.tensor = 2\nmemory.activations = 'mesa'": '"keep" is accepted',
    "mesh.tensor = 2\nmemory.offload = 'cpu'": '"none" is accepted',
    "mesh.tensor = 2\ncompression.kind = 'powersgd'": "compression.kind",
    "mesh.tensor = 2\ncommunication.overlap = true": "false is accepted",
    "mesh.tensor = 2\nworkers.shares = 'measured'": '"equal" is accepted',
    "mesh.tensor = 2\noptimizer.name = 'adafactor'": '"adamw" or "sgd" is accepted',
    "mesh.full_shard = true\noptimizer.name = 'sgd'": '"adamw" is accepted',
    PIPELINE + "mesh.tensor = 2\npipeline.stages = 2": "does not go with pipeline.stages = 2",
    "pipeline.stages = 2": '"float32" or "float64" is accepted',
    "pipeline.stages = 2\nprecision.compute = 'float32'": "model.tied_head = false is accepted",
}


@pytest.mark.parametrize("text", APART)
def test_what_does_not_go_together_is_named(text: str, tmp_path: Path):
    with pytest.raises(ValueError) as error:
        read(tmp_path / "job.toml", text)
    assert APART[text] in str(error.value) and "job.toml" in str(error.value)


TOGETHER = (
    *(f"sharding.stage = {stage}\nresilience.mode = '{mode}'" for stage in range(4)
      for mode in ("none", "checkpoint", "checkfreq")),
    ELASTIC + "resilience.mode = 'checkfreq'",
    *(f"workers.count = 4\nmesh = {{{mesh}}}\nresilience.mode = 'checkfreq'" for mesh in (
        "tensor = 2", "tensor = 4, sequence_parallel = true", "tensor = 2, full_shard = true",
        "sequence = 4", "sequence = 4, sequence_kind = 'ulysses'", "full_shard = true")),
    ELASTIC + "resilience.mode = 'gemini'\nsharding.stage = 1",
    PIPELINE + "pipeline.stages = 2\nresilience.mode = 'checkfreq'",
    *(ELASTIC + PIPELINE + f"pipeline.stages = 2\nrun.micro_batch_tokens = 256\n"
      f"resilience.mode = '{mode}'" for mode in ("bamboo", "oobleck", "varuna")),
)  # fmt: skip


@pytest.mark.parametrize("text", TOGETHER)
def test_what_goes_together_is_accepted(text: str, tmp_path: Path):
    assert read(tmp_path / "job.toml", text).steps > 0


@pytest.mark.parametrize("text", REFUSED)
def test_a_mistake_is_named(text: str, tmp_path: Path):
    with pytest.raises(ValueError) as error:
        read(tmp_path / "job.toml", text)
    assert REFUSED[text] in str(error.value) and "job.toml" in str(error.value)


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("train-*.toml")))
def test_examples_are_jobs(name: str):
    assert read_job(EXAMPLES / name).steps > 0


def test_every_field_is_described():
    def fields(model: type[BaseModel], place: str = "") -> None:
        for name, field in model.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                fields(kind, f"{name}.")
            elif place or name != "name":
                assert field.description and field.description[-1] in ".)", place + name

    fields(Job)


def test_sources_are_relative_to_the_file(tmp_path: Path):
    tiny.write_texts(tmp_path / "texts", 3)
    job = read(tmp_path / "job.toml", "data.sources = ['texts', 'texts/1.txt']")
    found = list(documents(job.data.sources))
    assert found == [tiny.text(20, n) for n in (0, 1, 2, 1)]


def test_a_source_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="nowhere.*brown, python"):
        list(documents((str(tmp_path / "nowhere"),)))


def test_pythons_help_is_always_there():
    found = list(documents(("python",)))
    assert len(found) > 50 and any("try" in text for text in found)
