"""Reads kinds of accelerator: the product's own (data_sheets/*.toml), and a user's."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from autoscale.catalog.kind import GpuKind
from cluster.reading import Strict, read_toml, validated

OWN = Path(__file__).parent / "data_sheets"

Positive = Annotated[float, Field(gt=0)]


class KindFile(Strict):
    """One TOML: the figures of a data sheet, with its source. Units are in the names; link: one
    way, to the other accelerators of the machine (of a lone CPU machine: to other machines)."""

    name: str = Field(min_length=1)
    source: str = Field(min_length=1)
    memory_gb: Positive
    bf16_tflops: Positive
    memory_gb_per_s: Positive
    link_gb_per_s: Positive
    sm: int | None = Field(default=None, ge=50)
    int8_tops: Positive | None = None
    fp8_tflops: Positive | None = None
    power_w: Positive | None = None

    def kind(self) -> GpuKind:
        rest = self.model_dump(exclude={"memory_gb"})
        return GpuKind(memory_bytes=round(self.memory_gb * 1e9), **rest)


def read_kind(path: Path) -> GpuKind:
    """The kind of one file. ValueError names the key that is wrong."""
    return validated(KindFile, read_toml(path), str(path)).kind()


def read_kinds(folders: Iterable[Path] = ()) -> Mapping[str, GpuKind]:
    """The product's kinds and those of `folders` by name; a later one takes the place of an earlier
    one of its name."""
    kinds: dict[str, GpuKind] = {}
    for folder in (OWN, *folders):
        if not folder.is_dir():
            raise ValueError(f"there is no folder of kinds at {folder}")
        for path in sorted(folder.glob("*.toml")):
            kind = read_kind(path)
            kinds[kind.name] = kind
    return kinds
