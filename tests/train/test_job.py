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
    "optimizer.name = 'sgd'": "'adamw' or 'adafactor'",
    "model.heads = 5": "hidden must be a multiple of 2 x heads = 10",
    "model.kv_heads = 3": "heads must be a multiple of kv_heads = 3",
    "run.micro_batch_tokens = 8": "must be at least data.sequence_tokens = 256",
    "budget.usd = 1.0": "usd needs usd_per_worker_h",
    "workers.count = 0": "greater than or equal to 1",
    "schedule = {name = 'wsd', warmup = 0.9}": "at most 1",
    "name = '../elsewhere'": "name",
    "optimizer.learning_rate = nan": "learning_rate",
    "optimizer.name = 'adafactor'\nsharding.stage = 1": "sharding.stage needs optimizer.name",
    "x = ": "not valid TOML",
}


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
