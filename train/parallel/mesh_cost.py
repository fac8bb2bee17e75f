"""What a mesh costs each of its workers, by count: bytes that it holds, keeps for a backward pass
and sends. Behind `--dry-run` and whoever compares meshes; measurements are held against it.

Pure arithmetic on a model's shape; imports no torch. Of the ranks of a mesh the one that has most
is counted: the first, which has the most rows of the vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from models.config import ModelConfig
from train.job import Job
from train.parallel.expert_cost import Mixture, kept_bytes, own_elements, own_matrices
from train.parallel.expert_cost import sent_bytes as mixture_sent

WIDTHS_BYTES = {"float32": (4, 4), "bfloat16": (2, 4), "float64": (8, 8)}
"""`precision.compute`: bytes of a number as computed with (narrow), and as masters, moments, sums
and losses are kept (wide)."""
INDEX_BYTES = 8
"""Of a token's id, and of a target's place among logits."""


@dataclass(frozen=True)
class MeshShape:
    """Sizes of a mesh, as `[mesh]` of a job has them. replicas: data parallel, each of
    tensor x sequence workers."""

    replicas: int = 1
    tensor: int = 1
    sequence: int = 1
    sequence_parallel: bool = False
    ring: bool = True
    full_shard: bool = False
    mixture: Mixture | None = None

    @property
    def workers(self) -> int:
        """Of the whole mesh."""
        return self.replicas * self.tensor * self.sequence

    @property
    def shared(self) -> bool:
        """Whether replicas share weights, gradients and moments."""
        return self.full_shard and self.replicas > 1


def shape_of(job: Job) -> MeshShape:
    """The mesh that a job asks for."""
    table = job.mesh
    return MeshShape(
        replicas=job.workers.count // table.replica_workers,
        tensor=table.tensor,
        sequence=table.sequence,
        sequence_parallel=table.sequence_parallel,
        ring=table.sequence_kind == "ring",
        full_shard=table.full_shard,
        mixture=_mixture(job) if job.model.experts else None,
    )


def _mixture(job: Job) -> Mixture:
    model, mesh = job.model, job.mesh
    weights = mesh.expert_travel == "weights"
    return Mixture(model.experts, model.experts_per_token, mesh.expert, weights)


@dataclass(frozen=True)
class Matrices:
    """Parameters of one worker of a replica, whole over replicas. layer: (rows, width) of each
    parameter of one decoder layer; ends: of the embedding, the output matrix and the last norm;
    everywhere: elements, of all layers, that every tensor worker has (norms)."""

    layer: tuple[tuple[int, int], ...]
    ends: tuple[tuple[int, int], ...]
    layers: int
    everywhere: int

    @property
    def elements(self) -> int:
        """Of all parameters."""
        return self.layers * elements(self.layer) + elements(self.ends)

    def share(self, replicas: int) -> int:
        """Elements of the first of so many replicas that share rows of each parameter."""
        return self.layers * elements(self.layer, replicas) + elements(self.ends, replicas)


def matrices(config: ModelConfig, tensor: int, mixture: Mixture | None = None) -> Matrices:
    """What the first of `tensor` workers has of each parameter."""
    hidden, inner = config.hidden, config.ff // tensor
    query = config.heads * config.head_dim // tensor
    key = config.kv_heads * config.head_dim // tensor
    biases = ((query, 1), (key, 1), (key, 1)) if config.qkv_bias else ()
    layer = (
        *((query, hidden), (key, hidden), (key, hidden), (hidden, query)),
        *(
            ((inner, hidden), (inner, hidden), (hidden, inner))
            if mixture is None
            else ((mixture.experts, hidden), *own_matrices(config, mixture))
        ),
        *biases,
        *((hidden, 1), (hidden, 1)),
    )
    rows = (-(-config.vocab // tensor), hidden)
    ends = (rows, (hidden, 1)) if config.tied_head else (rows, rows, (hidden, 1))
    return Matrices(layer, ends, config.layers, (2 * config.layers + 1) * hidden)


@dataclass(frozen=True)
class StateBytes:
    """Of one worker between two steps. weights: as computed with, where masters are others; with
    `full_shard` none, for they are put together when they are used (`mesh_moments`)."""

    weights: int
    masters: int
    gradient: int
    moments: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.masters + self.gradient + self.moments


def state_bytes(
    config: ModelConfig, shape: MeshShape, compute: str, moments: int = 2
) -> StateBytes:
    """moments: numbers that the optimizer keeps of each weight (AdamW 2, SGD with momentum 1)."""
    narrow, wide = WIDTHS_BYTES[compute]
    held = matrices(config, shape.tensor, shape.mixture)
    if shape.shared:
        share = wide * held.share(shape.replicas)
        return StateBytes(0, share, share, moments * share)
    whole = wide * held.elements
    weights = 0 if narrow == wide else narrow * held.elements
    return StateBytes(weights, whole, whole, moments * whole)


@dataclass(frozen=True)
class Batch:
    """What a worker computes of a step. samples: of its replica; micro_samples: at once;
    passes: forward and backward; sequence_tokens: of a sample, over all sequence workers."""

    samples: int
    micro_samples: int
    passes: int
    sequence_tokens: int


def batch_of(job: Job, shape: MeshShape) -> Batch:
    """Of the replica that has most samples."""
    samples = -(-job.batch_samples // shape.replicas)
    micro = min(job.micro_samples, samples)
    return Batch(samples, micro, -(-samples // micro), job.data.sequence_tokens)


def activation_bytes(config: ModelConfig, shape: MeshShape, batch: Batch, compute: str) -> int:
    """What one micro-batch keeps from its forward pass for its backward pass.

    A layer (Korthikanti et al. 2022, equations 2 and 4, with this model's constants): inputs and
    results of two norms, shared by tensor workers only with `sequence_parallel`; queries, keys and
    values as made and as turned, their mix, and sums of attention; gate and up, the opened gate,
    and the product. Then the last norm, exponentials of logits, and where tokens were looked up.
    """
    narrow, wide = WIDTHS_BYTES[compute]
    tokens = batch.micro_samples * batch.sequence_tokens // shape.sequence
    between = shape.tensor if shape.sequence_parallel else 1
    norm = 2 * config.hidden * narrow + wide
    layers = config.layers * layer_bytes(config, shape, compute, tokens)
    logits = wide * -(-config.vocab // shape.tensor)
    ends = norm * tokens // between + tokens * (logits + 2 * INDEX_BYTES + narrow + 1)
    return layers + ends


def layer_bytes(config: ModelConfig, shape: MeshShape, compute: str, tokens: int) -> int:
    """That one layer keeps."""
    narrow, wide = WIDTHS_BYTES[compute]
    between = shape.tensor if shape.sequence_parallel else 1
    norm = 2 * config.hidden * narrow + wide
    split = narrow * _attention(config, shape) + wide * (config.heads // shape.tensor)
    if shape.mixture is not None:
        mixed = kept_bytes(config, shape.mixture, tokens, narrow, wide)
        return tokens * split + 2 * norm * tokens // between + mixed
    split += 4 * narrow * (config.ff // shape.tensor)
    return tokens * split + 2 * norm * tokens // between


def _attention(config: ModelConfig, shape: MeshShape) -> int:
    """Numbers a token that attention keeps on one worker, its sums apart."""
    query = config.heads * config.head_dim // shape.tensor
    key = config.kv_heads * config.head_dim // shape.tensor
    if shape.sequence == 1:
        return 3 * query + 3 * key  # values lie beside queries and keys as they were made
    if shape.ring:
        return 4 * query + 3 * key  # the mix once more, as the next product wants it
    return 3 * query + 2 * _exchanged_key(config, shape)


def _exchanged_key(config: ModelConfig, shape: MeshShape) -> int:
    """Width of a token's keys when heads are exchanged: each so often that all workers get one."""
    heads = config.kv_heads // shape.tensor
    return config.head_dim * (heads if heads % shape.sequence == 0 else shape.sequence)


@dataclass(frozen=True)
class SentBytes:
    """That a worker sends in a step, by who it is sent to: replicas, workers that share sequences,
    workers that share matrices, workers that share experts."""

    data: float
    sequence: float
    tensor: float
    experts: float = 0.0

    @property
    def total(self) -> float:
        """Over all of them."""
        return self.data + self.sequence + self.tensor + self.experts


def sent_bytes(config: ModelConfig, shape: MeshShape, batch: Batch, compute: str) -> SentBytes:
    """By gloo's algorithms: a sum over n workers sends a tensor 2 (n - 1) / n times, a gather of
    it, a scatter or an exchange (n - 1) / n times. Few numbers a step (votes, norms) are left out.
    """
    narrow, wide = WIDTHS_BYTES[compute]
    held, layers = matrices(config, shape.tensor, shape.mixture), config.layers
    tokens = batch.samples * batch.sequence_tokens // shape.sequence
    crossing = _crosses(shape.tensor)
    if shape.sequence_parallel:
        # A layer: two gathers and two scatters each way, two gathers of what was not kept. The
        # embedding scatters and gathers; the output matrix gathers twice and scatters.
        hidden = (10 * layers + 2 + 3) * crossing
    else:
        hidden = 2 * (4 * layers + 1 + 1) * crossing
    tensor = hidden * tokens * config.hidden * narrow
    tensor += 2 * crossing * 3 * tokens * wide  # the greatest logit, a sum, the target's
    if shape.sequence_parallel:
        tensor += 2 * crossing * wide * held.everywhere
    summed = wide * (held.share(shape.replicas) if shape.shared else held.elements)
    own, experts = 0, 0.0
    if shape.mixture is not None:
        own = wide * own_elements(config, shape.mixture)
        experts = mixture_sent(config, shape.mixture, tokens, batch.passes, narrow)
    sequence = layers * tokens * _attention_sent(config, shape, narrow, wide)
    sequence += 2 * _crosses(shape.sequence) * summed
    if shape.shared:  # weights for each pass forward and backward, gradients after it
        data = 3 * batch.passes * _crosses(shape.replicas) * narrow * held.elements
    else:
        data = 2 * _crosses(shape.replicas) * (wide * held.elements - own)
        if shape.mixture is not None:  # summed by those who have the same experts
            data += 2 * _crosses(shape.replicas // shape.mixture.sharers) * own
    return SentBytes(data, sequence, tensor, experts)


def _attention_sent(config: ModelConfig, shape: MeshShape, narrow: int, wide: int) -> float:
    """Bytes a token and layer: keys and values go round forward and backward, then their gradients
    (and home, a turn more); or queries, keys, values and the mix cross once each way."""
    size = shape.sequence
    if size == 1:
        return 0.0
    if shape.ring:
        keys = 2 * config.kv_heads * config.head_dim // shape.tensor
        return float(keys * (2 * (size - 1) * narrow + size * wide))
    query = config.heads * config.head_dim // shape.tensor
    crossing = 2 * query + 2 * _exchanged_key(config, shape)
    return 2 * _crosses(size) * crossing * narrow


def _crosses(size: int) -> float:
    """Share of a tensor that leaves a worker when each of `size` has, or gets, its part."""
    return (size - 1) / size


def elements(parameters: tuple[tuple[int, int], ...], replicas: int = 1) -> int:
    """Of parameters, or of the rows of them that the first of so many replicas has."""
    return sum(_share(parameters, replicas))


def _share(parameters: tuple[tuple[int, int], ...], replicas: int) -> Iterator[int]:
    for rows, width in parameters:
        yield -(-rows // replicas) * width
