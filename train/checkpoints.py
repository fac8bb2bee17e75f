"""Where a run's state survives its processes, as the run sees it."""

import json
import shutil
from pathlib import Path
from typing import Protocol

from safetensors import safe_open
from safetensors.torch import save_file

from train.state import TrainState
from train.world import World


class Checkpoints(Protocol):
    """States of one run by step. `save` is called by all workers of a world, `newest` by each."""

    def save(self, state: TrainState, world: World) -> None:
        """Keeps a copy of the state; when it returns on rank 0, the state is durable."""
        ...

    def newest(self) -> TrainState | None:
        """The newest whole one, or None."""
        ...


class FolderCheckpoints:
    """One safetensors file per state in a local folder, written by rank 0 and renamed."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(self, state: TrainState, world: World) -> None:
        """See `Checkpoints`."""
        if world.rank:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        facts = {"step": state.step, "samples": state.samples, "meta": state.meta}
        part = self.folder / ".part"
        save_file(
            {name: tensor.contiguous().clone() for name, tensor in state.tensors.items()},
            part,
            metadata={"facts": json.dumps(facts)},
        )
        part.replace(self.folder / f"step-{state.step:08d}.safetensors")
        for old in self._files()[: -self.keep]:
            old.unlink()

    def newest(self) -> TrainState | None:
        """See `Checkpoints`."""
        files = self._files()
        if not files:
            return None
        with safe_open(files[-1], framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return TrainState(facts["step"], facts["samples"], tensors, facts["meta"])

    def clear(self) -> None:
        """Forgets all."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))
