"""The model that a run starts from: fresh weights drawn by name and seed, or those of a model that
exists. And its text side: the tokenizer that the data is spelled with.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.rope import RopeConfig
from models.config import ModelConfig
from models.load.folder import open_folder
from models.load.folder import read_text as read_folder_text
from models.load.gguf import read_config as read_gguf_config
from models.load.gguf import read_text as read_gguf_text
from models.load.gguf_file import open_gguf
from models.load.gguf_weights import GGUFWeights
from models.load.text import TextModel
from models.load.weights import WeightSource
from models.resolve import resolve
from train.data.corpus import Encode, encode_bytes
from train.data.spelling import END_ID, VOCABULARY
from train.job import Job
from train.model import INITIAL_STD, Llama

RESIDUAL = ("o_proj.weight", "down_proj.weight", "experts.down")
"""Matrices that write to the residual stream."""


@dataclass(frozen=True)
class Start:
    """The shape that a job trains, and its text side (None: one token per byte)."""

    config: ModelConfig
    text: TextModel | None

    @property
    def encode(self) -> Encode:
        """Text to token ids."""
        return encode_bytes if self.text is None else self.text.tokenizer.encode

    @property
    def end_id(self) -> int:
        """The token that stands between documents."""
        return END_ID if self.text is None else self.config.eos_token_ids[0]


def read_start(job: Job) -> Start:
    """What the job's model table describes. ValueError when it names a model that cannot be
    trained here."""
    table = job.model
    if not table.start_from:
        return Start(_fresh_config(job), None)
    path = resolve(table.start_from)
    text = read_folder_text(path) if path.is_dir() else read_gguf_text(open_gguf(path))
    config = text.config
    if not config.eos_token_ids:
        raise ValueError(f"model.start_from: {table.start_from} names no token that ends a text.")
    if config.rope.kind not in ("default", "linear"):
        raise ValueError(
            f"model.start_from: {table.start_from} has {config.rope.kind} rotary positions; "
            "default and linear ones are trained."
        )
    return Start(config, text)


def _fresh_config(job: Job) -> ModelConfig:
    table = job.model
    return ModelConfig(
        name=job.name,
        layers=table.layers,
        hidden=table.hidden,
        heads=table.heads,
        kv_heads=table.kv_heads,
        head_dim=table.hidden // table.heads,
        ff=table.feed_forward,
        vocab=VOCABULARY,
        context_tokens=job.data.sequence_tokens,
        rms_eps=1e-5,
        rope=RopeConfig(theta=table.rope_theta),
        tied_head=table.tied_head,
        bos_token_id=END_ID,
        eos_token_ids=(END_ID,),
    )


def build_model(job: Job, start: Start) -> Llama:
    """The model with its first weights, in float32 (float64 for a job that computes in it)."""
    with torch.device("meta"):
        model = Llama(start.config)
    model.to_empty(device="cpu")
    model.tie()
    if job.precision.compute == "float64":
        model.double()
    fill(job, start, dict(model.named_parameters()))
    return model


def fill(job: Job, start: Start, parameters: Mapping[str, Tensor]) -> None:
    """Sets parameters, by their names in the whole model, to the values that the job begins with:
    some of them, or all."""
    first = first_values(job, start)
    with torch.no_grad():
        for name, parameter in parameters.items():
            first(name, parameter)


def first_values(job: Job, start: Start) -> Callable[[str, Tensor], None]:
    """Sets one parameter, by name, to its first values; each by itself, so that a model need not be
    in memory as a whole."""
    if not job.model.start_from:
        return lambda name, place: draw(name, place, job.run.seed, start.config.layers)
    source = _source(job, start.config)
    return lambda name, place: _read(source, name, place)


def draw(name: str, parameter: Tensor, seed: int, layers: int) -> None:
    """Fills a fresh parameter: ones for norms, zeros for biases, normal numbers for matrices, which
    depend on seed and name alone."""
    if parameter.dim() < 2:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        return
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    std = INITIAL_STD / math.sqrt(2 * layers) if name.endswith(RESIDUAL) else INITIAL_STD
    numbers = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
    parameter.copy_(numbers * std)


def _source(job: Job, config: ModelConfig) -> WeightSource:
    path = resolve(job.model.start_from)
    if path.is_dir():
        return open_folder(path)[1]
    file = open_gguf(path)
    return GGUFWeights(file, read_gguf_config(file))


def _read(source: WeightSource, name: str, parameter: Tensor) -> None:
    found = source.shape(name)
    if found != tuple(parameter.shape):
        raise ValueError(f"{name} has shape {found}, {tuple(parameter.shape)} is wanted.")
    out = torch.empty(parameter.shape, dtype=torch.float32)
    source.read(name, out)
    parameter.copy_(out)
