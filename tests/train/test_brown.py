"""The Brown corpus' word/tag pairs as text, and what happens when the corpus cannot be had."""

import io
import tarfile
from pathlib import Path

import httpx
import pytest

from train.data import brown

TAGGED = (
    "\n\n\tThe/at jury/nn said/vbd ``/`` no/at evidence/nn ''/'' (/( it/pps was/bedz his/pp$ own/jj"
    " )/) ,/, or/cc 3/4/cd of/in it/ppo ./.\n\n\n\tA/at second/od :/: Why/wrb ?/. ?/.\n"
)


def test_tags_go_and_punctuation_returns_to_its_word():
    assert brown.plain(TAGGED) == (
        'The jury said "no evidence" (it was his own), or 3/4 of it.\nA second: Why?\n'
    )


def archive(path: Path) -> bytes:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in {"cb02": "B/x\n", "ca01": "A/x\n", "README": "no"}.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return path.read_bytes()


def test_documents_come_by_name_from_an_archive_fetched_once(tmp_path: Path, monkeypatch):
    import hashlib

    packed = archive(tmp_path / "made.tgz")
    monkeypatch.setattr(brown, "SHA256", hashlib.sha256(packed).hexdigest())
    asked = []

    def get(url, **_):
        asked.append(url)
        return httpx.Response(200, content=packed, request=httpx.Request("GET", url))

    monkeypatch.setattr(httpx, "get", get)
    for _ in range(2):
        assert list(brown.documents(tmp_path / "cache" / "brown.tgz")) == ["A\n", "B\n"]
    assert asked == [brown.URL]


def test_a_damaged_archive_is_refused(tmp_path: Path):
    archive(tmp_path / "made.tgz")
    with pytest.raises(ValueError, match="damaged"):
        list(brown.documents(tmp_path / "made.tgz"))


def test_without_a_network_the_way_out_is_named(tmp_path: Path, monkeypatch):
    def get(url, **_):
        raise httpx.ConnectError("no route to host")

    monkeypatch.setattr(httpx, "get", get)
    with pytest.raises(ValueError, match=r"data.sources = \['python'\]"):
        list(brown.documents(tmp_path / "none.tgz"))
