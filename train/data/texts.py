"""Documents by the names of their sources: corpora that this project knows, files, and folders."""

from collections.abc import Iterator
from pathlib import Path

from train.data import brown
from train.job import KNOWN_SOURCES

SUFFIXES = (".txt", ".md", ".rst", ".py")


def documents(sources: tuple[str, ...]) -> Iterator[str]:
    """Every document of every source, in an order that does not depend on the machine.

    sources: "brown", "python" (the help of Python itself), or a file or folder. ValueError for
    what is not there or not UTF-8.
    """
    for source in sources:
        if source == "brown":
            yield from brown.documents()
        elif source == "python":
            yield from python_help()
        else:
            yield from _files(Path(source), source)


def python_help() -> Iterator[str]:
    """The topics of Python's own `help()`, which every Python has."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"{name}\n\n{topics[name].strip()}\n"


def _files(path: Path, source: str) -> Iterator[str]:
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    else:
        found = [path] if path.is_file() else []
    if not found:
        raise ValueError(
            f"data.sources: {source!r} is neither {', '.join(KNOWN_SOURCES)} nor a file, nor a "
            f"folder with files that end in {', '.join(SUFFIXES)}."
        )
    for file in found:
        try:
            yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"data.sources: {file} is not UTF-8 text.") from None
