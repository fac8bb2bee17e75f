"""The ranks of a job as a grid: data, sequence and tensor parallelism, a group of each for a rank.

Ranks that talk most are neighbours: tensor parallelism is the innermost dimension, data parallelism
the outermost.
"""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

NAMES = ("replicas", "expert", "sequence", "tensor")


@dataclass(frozen=True)
class Axis:
    """One dimension of the grid as a rank sees it; group is None where it has only one rank."""

    group: dist.ProcessGroup | None
    rank: int
    size: int


ALONE = Axis(None, 0, 1)


@dataclass(frozen=True)
class Mesh:
    """A rank's place in the grid. data: replicas of the model, each with samples of its own;
    sequence: parts of each sequence; tensor: parts of each matrix.

    Of the data ranks, those of `expert` share a set of experts, and those of `replicas` have the
    same ones.
    """

    data: Axis = ALONE
    sequence: Axis = ALONE
    tensor: Axis = ALONE
    expert: Axis = ALONE
    replicas: Axis = ALONE

    @property
    def size(self) -> int:
        """Ranks of the grid."""
        return self.data.size * self.sequence.size * self.tensor.size


def build_mesh(
    world_size: int, *, data: int = 0, sequence: int = 1, tensor: int = 1, expert: int = 1
) -> Mesh:
    """This rank's place, in the default process group; called by all ranks. data 0: what is left.
    expert: how many data ranks share a set of experts.

    ValueError unless the dimensions multiply to the number of ranks, and expert divides data.
    """
    data = data or world_size // (sequence * tensor)
    if data % expert:
        raise ValueError(f"mesh.expert = {expert} is not a divisor of mesh.data = {data}")
    if data * sequence * tensor != world_size:
        raise ValueError(
            f"mesh.data x mesh.sequence x mesh.tensor = {data} x {sequence} x {tensor} are not the "
            f"{world_size} workers that there are"
        )
    if world_size == 1:
        return Mesh()
    shape = (data // expert, expert, sequence, tensor)
    grid = init_device_mesh("cpu", shape, mesh_dim_names=NAMES)
    grid["replicas", "expert"]._flatten("data")
    names = ("data", "sequence", "tensor", "expert", "replicas")
    return Mesh(*(_axis(grid.get_group(name)) for name in names))


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(group, group.rank(), group.size()) if group.size() > 1 else ALONE
