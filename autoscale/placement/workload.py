"""Reads a workload file: what is asked, what can be bought, how fast it is, and who is to plan.

Paths in it are relative to the file. Read by `sanderling plan`; docs/examples has worked ones.
"""

import csv
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationInfo, field_validator

from autoscale.catalog.catalog import PricedCatalog, read_catalog
from autoscale.catalog.model import ModelSize
from autoscale.catalog.profile import remembered
from autoscale.catalog.profiles import ProfileTable, open_profile
from autoscale.placement.demand import Bucket, Demand, Slo
from autoscale.placement.plan import ReplicaShape, Role
from autoscale.placement.planner import Problem, ThroughputProfile
from cluster.reading import Strict, read_toml, validated

LARGEST_TENSOR = 8


class ModelTable(Strict):
    """The fields of `ModelSize`."""

    name: str = Field(min_length=1)
    layers: int = Field(ge=1)
    hidden: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    feed_forward: int = Field(ge=1)
    vocab: int = Field(ge=1)
    feed_forward_matrices: int = Field(default=3, ge=1)
    tied_head: bool = False
    kv_bits: int = Field(default=16, ge=1)


class SloTable(Strict):
    """Seconds; what is left out has no limit."""

    ttft_s: float | None = Field(default=None, gt=0)
    tpot_s: float | None = Field(default=None, gt=0)
    attained: float = Field(default=0.9, gt=0, lt=1)


class BucketTable(Strict):
    """Requests of about so many tokens."""

    input_tokens: int = Field(ge=1)
    output_tokens: int = Field(ge=1)
    requests_per_s: float = Field(gt=0)


class TraceTable(Strict):
    """A CSV with ContextTokens and GeneratedTokens (Azure's columns), as shares of
    `requests_per_s`. Edges: the buckets; a request counts as the next longer one."""

    file: Path
    requests_per_s: float = Field(gt=0)
    input_edges: tuple[int, ...] = (128, 512, 1024, 2048, 4096, 8192)
    output_edges: tuple[int, ...] = (16, 64, 256, 1024)

    @field_validator("input_edges", "output_edges")
    @classmethod
    def _ascend(cls, edges: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        if not edges or edges[0] < 1 or list(edges) != sorted(set(edges)):
            raise ValueError(f"{info.field_name} have to ascend from 1 or more")
        return edges


class OffersTable(Strict):
    """file: of offers. prices: over time, with `at_s` the moment. kinds: folders of one's own."""

    file: Path
    prices: Path | None = None
    at_s: float | None = None
    kinds: tuple[Path, ...] = ()


class ShapesTable(Strict):
    """What may be built; every combination that an offer holds and in which the model has room."""

    tensor: tuple[int, ...] = (1, 2, 4, 8)
    pipeline: tuple[int, ...] = (1,)
    roles: tuple[Role, ...] = ("mixed",)
    weight_bits: tuple[int, ...] = (16,)


class PlannerTable(Strict):
    """name: in placement/registry.py."""

    name: str = "aggregate"
    deadline_s: float = Field(default=10.0, gt=0)


class WorkloadFile(Strict):
    """The whole file."""

    model: ModelTable
    slo: SloTable = SloTable()
    bucket: tuple[BucketTable, ...] = ()
    trace: TraceTable | None = None
    offers: OffersTable
    profile: ProfileTable = ProfileTable()
    shapes: ShapesTable = ShapesTable()
    planner: PlannerTable = PlannerTable()


@dataclass(frozen=True)
class Workload:
    """A problem, and who is to solve it."""

    problem: Problem
    planner: str
    deadline_s: float


def read_workload(path: Path) -> Workload:
    """The problem that a file describes. ValueError names what in it is not accepted."""
    file = validated(WorkloadFile, read_toml(path), str(path))
    folder = path.parent
    offers = file.offers
    catalog = read_catalog(
        folder / offers.file,
        folder / offers.prices if offers.prices else None,
        [folder / each for each in offers.kinds],
    )
    model = ModelSize(**file.model.model_dump())
    profile = remembered(open_profile(file.profile, folder, catalog.kinds, model))
    problem = Problem(
        demand=Demand(_rates(file, folder, str(path)), Slo(**file.slo.model_dump())),
        catalog=catalog,
        profile=profile,
        shapes=_shapes(file.shapes, catalog, offers.at_s, profile, model),
        at_s=offers.at_s,
        model=model,
    )
    return Workload(problem, file.planner.name, file.planner.deadline_s)


def _rates(file: WorkloadFile, folder: Path, where: str) -> Mapping[Bucket, float]:
    if bool(file.bucket) == (file.trace is not None):
        raise ValueError(f"{where}: it takes either [[bucket]] tables or a [trace]")
    if file.trace is not None:
        return histogram(folder / file.trace.file, file.trace)
    rates: dict[Bucket, float] = {}
    for table in file.bucket:
        bucket = Bucket(table.input_tokens, table.output_tokens)
        rates[bucket] = rates.get(bucket, 0.0) + table.requests_per_s
    return rates


def histogram(path: Path, table: TraceTable) -> Mapping[Bucket, float]:
    """The trace's requests by bucket, scaled to the table's rate. ValueError for a request that is
    longer than the last edges."""
    counts = Counter(
        Bucket(_edge(tokens_in, table.input_edges, path), _edge(made, table.output_edges, path))
        for tokens_in, made in _trace(path)
    )
    total = sum(counts.values())
    return {b: table.requests_per_s * n / total for b, n in sorted(counts.items())}


def _edge(tokens: int, edges: Sequence[int], path: Path) -> int:
    edge = next((edge for edge in edges if tokens <= edge), None)
    if edge is None:
        raise ValueError(f"{path}: a request of {tokens} tokens is beyond the edges {list(edges)}")
    return edge


def _trace(path: Path) -> Iterator[tuple[int, int]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows:
            raise ValueError("it has no requests")
        yield from ((int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in rows)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"cannot read {path} as a trace: {error}") from None


def _shapes(
    table: ShapesTable,
    catalog: PricedCatalog,
    at_s: float | None,
    profile: ThroughputProfile,
    model: ModelSize,
) -> tuple[ReplicaShape, ...]:
    """What some offer holds, heads divide, and has room."""
    most: dict[str, int] = {}
    for offer in catalog.offers(at_s=at_s):
        most[offer.kind] = max(offer.count, most.get(offer.kind, 0))
    every = (
        ReplicaShape(kind, tensor, pipeline, role, bits)
        for kind, count in most.items()
        for tensor in table.tensor
        for pipeline in table.pipeline
        for role in table.roles
        for bits in table.weight_bits
        if tensor <= count and math.gcd(tensor, model.heads) == tensor
    )
    return tuple(shape for shape in every if profile.kv_tokens(shape) > 0)
