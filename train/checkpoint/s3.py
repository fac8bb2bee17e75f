"""Checkpoints in an S3 bucket. An object appears whole or not at all, and is durable when its
upload returns, so there is nothing to sync or rename. Needs boto3 (pip install sanderling[s3]).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from train.checkpoint.storage import Missing, StorageError

PART_BYTES = 16 << 20
"""Of an upload in parts; S3 takes 5 MiB to 5 GiB, and 10,000 parts: 160 GB an object."""
ATTEMPTS = 8
"""Of one request that is throttled, refused by a busy server or cut off, with growing pauses."""
GONE = ("404", "NoSuchKey", "NotFound")
DELETED_AT_ONCE = 1000


class S3Storage:
    """A `Storage` under `prefix` in a bucket; client: boto3's."""

    def __init__(self, client: Any, bucket: str, prefix: str = "") -> None:
        self._client, self._bucket = client, bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""

    def _place(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + name}

    def put(self, name: str, blocks: Iterable[bytes | memoryview]) -> int:
        """See `Storage`. One request when it is small, else an upload in parts, which is aborted
        when it cannot be completed."""
        with _explained("written", self.where(name)):
            parts = _joined(blocks)
            first = next(parts, b"")
            second = next(parts, None)
            if second is None:
                self._client.put_object(**self._place(name), Body=first)
                return len(first)
            return self._put_parts(name, first, second, parts)

    def _put_parts(self, name: str, first: bytes, second: bytes, rest: Iterator[bytes]) -> int:
        place = self._place(name)
        upload = self._client.create_multipart_upload(**place)["UploadId"]
        tags: list[dict[str, Any]] = []
        count = 0
        try:
            for body in (first, second):
                count += self._put_part(place, upload, body, tags)
            for body in rest:
                count += self._put_part(place, upload, body, tags)
            self._client.complete_multipart_upload(
                **place, UploadId=upload, MultipartUpload={"Parts": tags}
            )
        except BaseException:
            with suppress(Exception):  # the first error is the one to tell
                self._client.abort_multipart_upload(**place, UploadId=upload)
            raise
        return count

    def _put_part(
        self, place: dict[str, str], upload: str, body: bytes, tags: list[dict[str, Any]]
    ) -> int:
        number = len(tags) + 1
        answer = self._client.upload_part(**place, UploadId=upload, PartNumber=number, Body=body)
        sums = {key: value for key, value in answer.items() if key.startswith("Checksum")}
        sums.pop("ChecksumType", None)
        tags.append({"PartNumber": number, "ETag": answer["ETag"], **sums})
        return len(body)

    def get(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See `Storage`."""
        if stop is not None and stop <= start:
            return b""
        span = f"bytes={start}-" if stop is None else f"bytes={start}-{stop - 1}"
        extra = {"Range": span} if start or stop is not None else {}
        with _explained("read", self.where(name)):
            try:
                data: bytes = self._client.get_object(**self._place(name), **extra)["Body"].read()
            except Exception as error:
                if _code(error) == "InvalidRange":  # it ends before
                    return b""
                raise
            return data

    def names(self, prefix: str = "") -> list[str]:
        """See `Storage`."""
        with _explained("listed", self.where(prefix)):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            found = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return sorted(key.removeprefix(self._prefix) for key in found)

    def folders(self) -> list[str]:
        """See `Storage`."""
        names = self.names()
        return sorted({name.partition("/")[0] for name in names if "/" in name})

    def drop(self, folder: str, first: str) -> None:
        """See `Storage`."""
        keys = [self._prefix + name for name in self.names(f"{folder}/")]
        with _explained("removed", self.where(folder)):
            head = f"{self._prefix}{folder}/{first}"
            if head in keys:
                self._client.delete_object(Bucket=self._bucket, Key=head)
                keys.remove(head)
            for at in range(0, len(keys), DELETED_AT_ONCE):
                batch = [{"Key": key} for key in keys[at : at + DELETED_AT_ONCE]]
                answer = self._client.delete_objects(
                    Bucket=self._bucket, Delete={"Objects": batch, "Quiet": True}
                )
                for error in answer.get("Errors", ()):
                    raise StorageError(f"{error['Key']} could not be removed: {error['Code']}")

    def where(self, name: str = "") -> str:
        """See `Storage`."""
        return f"s3://{self._bucket}/{self._prefix}{name}"


def open_s3(place: str) -> S3Storage:
    """bucket/prefix, with credentials and region as boto3 finds them. ValueError without boto3 or
    a bucket."""
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        raise ValueError(
            f"checkpoints at s3://{place} need boto3: pip install sanderling[s3]"
        ) from None
    bucket, _, prefix = place.partition("/")
    if not bucket:
        raise ValueError("checkpoints at s3:// need a bucket: s3://bucket/prefix")
    config = Config(retries={"mode": "standard", "max_attempts": ATTEMPTS})
    return S3Storage(boto3.client("s3", config=config), bucket, prefix)


def _joined(blocks: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """The same bytes in blocks of PART_BYTES, the last one shorter."""
    held = bytearray()
    for block in blocks:
        held += block
        while len(held) >= PART_BYTES:
            yield bytes(held[:PART_BYTES])
            del held[:PART_BYTES]
    if held:
        yield bytes(held)


def _code(error: Exception) -> str:
    response = getattr(error, "response", None)
    return str(response["Error"].get("Code", "")) if isinstance(response, dict) else ""


@contextmanager
def _explained(act: str, place: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        if _code(error) in GONE:
            raise Missing(f"{place} is not there") from error
        raise StorageError(f"{place} could not be {act}: {error}") from error
