"""Shared-out state in checkpoints (train/checkpoint): what `PeerMemory` asks of a store."""

from torch import Tensor

from train.checkpoint.piece import Piece, dtype_name
from train.checkpoint.reader import Checkpoint, CheckpointReader
from train.checkpoint.states import new_attempt
from train.checkpoint.storage import Storage
from train.checkpoint.writer import CheckpointWriter
from train.data.stream import share
from train.elastic.messages import Version
from train.elastic.trainee import Flat
from train.state import TrainState
from train.world import World


class StoredShards:
    """A `ShardStore` on any storage. flats: the job's vectors. keep: whole versions kept."""

    def __init__(self, storage: Storage, flats: dict[str, Flat], keep: int = 2) -> None:
        self._storage, self._flats, self._keep = storage, flats, keep
        self._open: Checkpoint | None = None

    def newest(self) -> Version | None:
        """See `ShardStore`."""
        found = self._open = CheckpointReader(self._storage).newest()
        if found is None:
            return None
        meta = found.meta
        return Version(step=found.step, samples=meta["samples"], shards=meta["shards"])

    def read(self, version: Version, name: str, first: int, count: int) -> Tensor:
        """See `ShardStore`. FileNotFoundError if the version is not there (any more)."""
        if self._open is None or self._open.step != version.step:
            self.newest()
        if self._open is None or self._open.step != version.step:
            raise FileNotFoundError(f"the store has no whole version of step {version.step}")
        return self._open.read(name, first, first + count)

    def write(self, version: Version, world: World, state: TrainState) -> None:
        """See `ShardStore`. Nobody waits for the receipt of a rank that died: all have written
        before rank 0 looks."""
        writer = CheckpointWriter(self._storage, new_attempt(world), self._keep)
        pieces = []
        for name, flat in self._flats.items():
            mine = share(0, flat.length, world.rank, world.size)
            stop = mine.first + mine.samples
            data = state.tensors[name].detach()
            pieces.append(
                Piece(name, (flat.length,), dtype_name(flat.dtype), mine.first, stop, data)
            )
        meta = {"samples": version.samples, "shards": version.shards}
        writer.write(version.step, meta, pieces, world.rank, world.size)
        world.barrier()
        if world.rank == 0:
            writer.commit(version.step, world.size)
        world.barrier()
