"""The `[profile]` table of a workload file, and the profile that it stands for."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, cast

from pydantic import Field, model_validator

from autoscale.catalog.coefficients import read_distserve, read_helix
from autoscale.catalog.grid import RateGrid, read_rate_table
from autoscale.catalog.kind import GpuKind
from autoscale.catalog.memory import MemoryRoom
from autoscale.catalog.model import ModelSize
from autoscale.catalog.profile import NOISE
from autoscale.catalog.roofline import OF_COMPUTE, OF_MEMORY, Roofline
from autoscale.catalog.steps import read_profile, read_splitwise
from autoscale.placement.planner import ThroughputProfile
from cluster.reading import Strict

From = Literal["roofline", "measured", "rates", "splitwise", "helix", "distserve"]
NEEDS: Mapping[From, tuple[str, ...]] = {
    "roofline": (),
    "measured": ("file",),
    "rates": ("files",),
    "splitwise": ("file", "model"),
    "helix": ("file",),
    "distserve": ("file", "kv_file", "model"),
}


class ProfileTable(Strict):
    """from: where the figures come from. file: the table (helix: the folder); files: of `rates`,
    one for each kind; model: its name in the table; noise: by how much measured figures may
    contradict each other before the table is refused; of_compute, of_memory: of the roofline."""

    source: From = Field(default="roofline", alias="from")
    file: Path | None = None
    files: Mapping[str, Path] = Field(default_factory=dict)
    kv_file: Path | None = None
    model: str | None = None
    noise: float = Field(default=NOISE, ge=0, lt=1)
    of_compute: float = Field(default=OF_COMPUTE, gt=0, le=1)
    of_memory: float = Field(default=OF_MEMORY, gt=0, le=1)

    @model_validator(mode="after")
    def _complete(self) -> "ProfileTable":
        for name in NEEDS[self.source]:
            if not getattr(self, name):
                raise ValueError(f'from = "{self.source}" needs {name} too')
        return self


def open_profile(
    table: ProfileTable, folder: Path, kinds: Mapping[str, GpuKind], model: ModelSize
) -> ThroughputProfile:
    """The profile, its files being relative to `folder`. ValueError, or TableError with the row."""
    openers: Mapping[From, Callable[..., ThroughputProfile]] = {
        "roofline": _roofline,
        "measured": _measured,
        "rates": _rates,
        "splitwise": _splitwise,
        "helix": _helix,
        "distserve": _distserve,
    }
    return openers[table.source](table, folder, MemoryRoom(kinds, model))


def _roofline(table: ProfileTable, folder: Path, room: MemoryRoom) -> ThroughputProfile:
    return Roofline(room.kinds, room.model, table.of_compute, table.of_memory)


def _measured(table: ProfileTable, folder: Path, room: MemoryRoom) -> ThroughputProfile:
    return read_profile(folder / cast(Path, table.file), table.noise)


def _rates(table: ProfileTable, folder: Path, room: MemoryRoom) -> ThroughputProfile:
    tables = {
        kind: read_rate_table(folder / path, table.noise) for kind, path in table.files.items()
    }
    names = ", ".join(sorted(path.name for path in table.files.values()))
    return RateGrid(tables, f"table of highest rates ({names})", room)


def _splitwise(table: ProfileTable, folder: Path, room: MemoryRoom) -> ThroughputProfile:
    path, model = folder / cast(Path, table.file), cast(str, table.model)
    return read_splitwise(path, model, room, table.noise)


def _helix(table: ProfileTable, folder: Path, room: MemoryRoom) -> ThroughputProfile:
    return read_helix(folder / cast(Path, table.file), room.model.layers, room, table.noise)


def _distserve(table: ProfileTable, folder: Path, room: MemoryRoom) -> ThroughputProfile:
    file, kv = folder / cast(Path, table.file), folder / cast(Path, table.kv_file)
    return read_distserve(file, kv, cast(str, table.model))
