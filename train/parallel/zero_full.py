"""ZeRO's stage 3 by torch's FSDP2: each layer's weights are put together before it is computed,
forward and backward, and let go after it.

What is ours: the exchange (gloo's own sends a third more), the update of each rank's rows, and the
names and stretches of a checkpoint.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from train.checkpoint.piece import Piece, dtype_name
from train.optimizer import Decay, adamw_update
from train.parallel.collectives import Collectives, ExactReduceScatter
from train.parallel.zero_flat import Source, best_name, squares
from train.precision import master_dtype


@dataclass(frozen=True, eq=False)
class Rows:
    """This rank's rows of a parameter, as elements [start, stop) of it; moments beside them."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    parameter: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class FullShards:
    """A `train.parallel.zero.Sharded` of stage 3. Layers are the members of the ModuleLists;
    all else is one unit more. Computed by `forward` or `loss`, never by a layer called alone."""

    def __init__(
        self,
        model: nn.Module,
        group: dist.ProcessGroup | None,
        compute: torch.dtype,
        decay: Decay,
    ) -> None:
        assert group is not None, "stage 3 of a world of one is stage 2"
        self._collectives, self._decay, self._compute = Collectives(group), decay, compute
        model.to(master_dtype(compute))
        mesh = DeviceMesh.from_group(group, "cpu")
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=compute)
        layers = [m for held in model.modules() if isinstance(held, nn.ModuleList) for m in held]
        for unit in [*layers, model]:
            fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
            assert isinstance(unit, FSDPModule)
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_custom_reduce_scatter(ExactReduceScatter())  # type: ignore[arg-type]
        if hasattr(model, "loss"):
            register_fsdp_forward_method(model, "loss")
        self._model = model
        self.rows = [self._rows(name, parameter) for name, parameter in _sharded(model)]

    def _rows(self, name: str, parameter: DTensor) -> Rows:
        shape = tuple(parameter.shape)
        width = math.prod(shape[1:])
        rows = -(-shape[0] // self._collectives.size)
        start = min(self._collectives.rank * rows, shape[0]) * width
        local = parameter.to_local().detach()
        stop = start + local.numel()
        moments = [torch.zeros(local.numel(), dtype=local.dtype) for _ in range(2)]
        return Rows(name, shape, start, stop, parameter, *moments)

    def clear_gradient(self) -> None:
        """See `Sharded`."""
        for parameter in self._model.parameters():
            parameter.grad = None

    def reduce(self) -> None:
        """See `Sharded`. FSDP2 has done it in the backward pass."""

    def clip(self, limit: float) -> float:
        """See `Sharded`."""
        shares = [local for rows in self.rows if (local := gradient(rows)) is not None]
        norm = math.sqrt(self._collectives.sum(squares(shares)))
        if limit and norm > limit:
            for share in shares:
                share.mul_(limit / (norm + 1e-6))
        return norm

    def update(self, step: int, learning_rate: float) -> None:
        """See `Sharded`."""
        for rows in self.rows:
            found = gradient(rows)
            decay = self._decay if len(rows.shape) > 1 else replace(self._decay, weight_decay=0.0)
            local = master(rows)
            adamw_update(
                local,
                torch.zeros_like(local) if found is None else found,
                (rows.exp_avg, rows.exp_avg_sq),
                step=step,
                learning_rate=learning_rate,
                decay=decay,
            )

    def pieces(self) -> list[Piece]:
        """See `Sharded`. Weights in the compute dtype are made for it."""
        return [piece for rows in self.rows if rows.start < rows.stop for piece in self._of(rows)]

    def _of(self, rows: Rows) -> Iterator[Piece]:
        local = master(rows)
        kinds = {"param": local, "exp_avg": rows.exp_avg, "exp_avg_sq": rows.exp_avg_sq}
        if self._compute != local.dtype:
            kinds |= {"master": local, "param": local.to(self._compute)}
        for kind, data in kinds.items():
            dtype = dtype_name(data.dtype)
            yield Piece(f"{kind}/{rows.name}", rows.shape, dtype, rows.start, rows.stop, data)

    def load(self, source: Source) -> None:
        """See `Sharded`."""
        for rows in self.rows:
            span = (rows.start, rows.stop)
            master(rows).copy_(source.read(best_name(source, rows.name), *span))
            rows.exp_avg.copy_(source.read(f"exp_avg/{rows.name}", *span))
            rows.exp_avg_sq.copy_(source.read(f"exp_avg_sq/{rows.name}", *span))


def master(rows: Rows) -> Tensor:
    """This rank's rows, flat, live."""
    assert isinstance(rows.parameter, DTensor)
    return rows.parameter.to_local().detach().view(-1)


def gradient(rows: Rows) -> Tensor | None:
    """Their summed gradient, flat, live; None where no pass has reached them."""
    found = rows.parameter.grad
    if found is None:
        return None
    assert isinstance(found, DTensor)
    return found.to_local().view(-1)


def _sharded(model: nn.Module) -> Iterator[tuple[str, DTensor]]:
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        yield name, parameter
