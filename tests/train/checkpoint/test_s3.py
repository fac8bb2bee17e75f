"""S3 through moto: whole checkpoints, and what throttling, errors and cut uploads leave."""

from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from botocore.awsrequest import AWSResponse
from botocore.config import Config
from moto import mock_aws

from tests.train.checkpoint.samples import is_state, save
from train.checkpoint import s3
from train.checkpoint.reader import CheckpointReader
from train.checkpoint.s3 import S3Storage, open_s3
from train.checkpoint.storage import Missing, StorageError

ANSWERS = {
    "SlowDown": 503,
    "InternalError": 500,
    "RequestTimeout": 400,
    "AccessDenied": 403,
    "InvalidPart": 400,
}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda seconds: None)


@pytest.fixture
def client() -> Iterator[Any]:
    with mock_aws():
        config = Config(retries={"mode": "standard", "max_attempts": 4})
        made = boto3.client(
            "s3",
            region_name="us-east-1",
            aws_access_key_id="k",
            aws_secret_access_key="s",
            config=config,
        )
        made.create_bucket(Bucket="bucket")
        yield made


class Faults:
    """Answers chosen requests (by method and place in the order) with an error instead of S3."""

    def __init__(self, client: Any, wrong: Callable[[int, Any], str | None]):
        self.count = self.faults = 0
        self.wrong = wrong
        client.meta.events.register_first("before-send.s3", self)

    def __call__(self, request: Any, **_: Any) -> AWSResponse | None:
        number, self.count = self.count, self.count + 1
        code = self.wrong(number, request)
        if code is None:
            return None
        self.faults += 1
        text = f"<Error><Code>{code}</Code><Message>told to</Message></Error>".encode()
        return AWSResponse(request.url, ANSWERS[code], {}, Raw(text))


class Raw:
    """What urllib3 hands on."""

    def __init__(self, text: bytes):
        self.text = text

    def stream(self, *_: Any, **__: Any) -> Iterator[bytes]:
        yield self.text


def newest_step(client: Any, prefix: str = "runs/x") -> int:
    """The step of the newest, which must be exact."""
    found = CheckpointReader(S3Storage(client, "bucket", prefix)).newest()
    assert found is not None
    assert is_state({name: found.tensor(name) for name in found.names}, found.step)
    return found.step


def test_written_and_read(client: Any):
    storage = S3Storage(client, "bucket", "/runs/x/")
    for step in (1, 2, 3):
        save(storage, step, "a", 3, keep=2)
    assert newest_step(client) == 3
    keys = [entry["Key"] for entry in client.list_objects_v2(Bucket="bucket")["Contents"]]
    assert {key.split("/")[2] for key in keys} == {"step-00000002.a", "step-00000003.a"}
    with pytest.raises(Missing, match="s3://bucket/runs/x/none is not there"):
        storage.get("none")


def test_large_parts_go_up_in_pieces(client: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    storage = S3Storage(client, "bucket")
    data = bytes(range(256)) * (12 << 12)
    blocks = [memoryview(data)[at : at + 1_000_003] for at in range(0, len(data), 1_000_003)]
    assert storage.put("big", blocks) == len(data)
    assert storage.get("big") == data
    assert storage.get("big", 5_000_000, 5_300_000) == data[5_000_000:5_300_000]
    assert storage.get("big", len(data)) == b""


@pytest.mark.parametrize("code", ["SlowDown", "InternalError"])
def test_two_in_three_requests_fail(client: Any, code: str):
    """Throttling and server errors are asked again, and nothing is lost."""
    faults = Faults(client, lambda number, _: code if number % 3 else None)
    save(S3Storage(client, "bucket", "runs/x"), 1, "a", 2)
    assert newest_step(client) == 1
    assert faults.faults > 10


def test_without_asking_again_it_would_fail(client: Any):
    """The mutation."""
    config = Config(retries={"mode": "standard", "max_attempts": 1})
    once = boto3.client(
        "s3",
        region_name="us-east-1",
        aws_access_key_id="k",
        aws_secret_access_key="s",
        config=config,
    )
    Faults(once, lambda number, _: "SlowDown" if number % 3 else None)
    with pytest.raises(StorageError, match="could not be written.*SlowDown"):
        save(S3Storage(once, "bucket", "runs/x"), 1, "a", 2)


def fails_from(client: Any, limit: int, code: str) -> tuple[bool, int]:
    """Whether a second checkpoint is written although all requests from this one on fail; the step
    of the newest one afterwards."""
    prefix = f"runs/{code}{limit}"
    save(S3Storage(client, "bucket", prefix), 1, "a")
    faults = Faults(client, lambda number, _: code if number >= limit else None)
    done = True
    try:
        save(S3Storage(client, "bucket", prefix), 2, "b", 2)
    except StorageError as error:
        done = False
        assert code in str(error)
    client.meta.events.unregister("before-send.s3", faults)
    return done, newest_step(client, prefix)


def test_whatever_request_fails_for_good(client: Any):
    """For every n, when requests fail from the n-th of a write on, the newest whole one is the old
    one, or the new one once its manifest is there."""
    found = []
    for limit in range(60):
        done, step = fails_from(client, limit, "AccessDenied")
        found.append(step)
        if done:
            break
    assert done and found[0] == 1 and found[-1] == 2 and found == sorted(found)


@pytest.mark.parametrize("code", ["SlowDown", "InternalError"])
def test_a_server_that_stays_away(client: Any, code: str):
    assert fails_from(client, 2, code) == (False, 1)


def test_an_upload_that_is_cut_leaves_nothing(client: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    storage = S3Storage(client, "bucket")
    storage.put("big", [b"old"])

    def wrong(number: int, request: Any) -> str | None:
        return "AccessDenied" if "partNumber=2" in request.url else None

    faults = Faults(client, wrong)
    with pytest.raises(StorageError, match="s3://bucket/big could not be written"):
        storage.put("big", [b"n" * (16 << 20)])
    assert faults.faults == 1
    assert storage.get("big") == b"old"
    assert client.list_multipart_uploads(Bucket="bucket").get("Uploads", []) == []


def test_a_writer_that_dies_in_an_upload(client: Any, monkeypatch: pytest.MonkeyPatch):
    """As a killed process: nobody aborts. The parts stay, the object is the old one."""
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    monkeypatch.setattr(client, "abort_multipart_upload", lambda **_: None)
    storage = S3Storage(client, "bucket")

    def blocks() -> Iterator[bytes]:
        yield b"n" * (11 << 20)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.put("big", blocks())
    assert client.list_multipart_uploads(Bucket="bucket")["Uploads"]
    assert storage.names() == []


def test_what_is_needed_is_said(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="need a bucket"):
        open_s3("")
    monkeypatch.setitem(__import__("sys").modules, "boto3", None)
    with pytest.raises(ValueError, match=r"need boto3: pip install sanderling\[s3\]"):
        open_s3("bucket/x")
