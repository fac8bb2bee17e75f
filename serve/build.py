"""From settings to the plain objects of one replica: storage, pool, tree, scheduler, engine.

Called by the actor shells and the one-process mode; the only place that knows how they fit.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cluster.clock import Clock
from cluster.settings import Settings
from cluster.settings.losses import quality_cost
from models.detokenize import Detokenizer
from serve.clients import ConnectParking, ConnectPrefill
from serve.computing import Computing, computing, on_cpu
from serve.engine.cost import StepCost
from serve.engine.engine import Engine
from serve.engine.runner import ModelRunner
from serve.engine.scheduler import Scheduler
from serve.grammar.compiler import Compiler
from serve.kv.device import DeviceStorage, Storage
from serve.kv.pool import PagePool
from serve.kv.prefix import PrefixTree
from serve.kv.storage import KVShape, KVStorage
from serve.migrate.keep import open_policy
from serve.peers import PrefillPeers
from serve.prefixes import placed_prefixes
from serve.transport import open_transport

if TYPE_CHECKING:
    from models.config import ModelConfig
    from models.decoder import Decoder
    from models.device.decoder import DeviceDecoder
    from models.load import TextModel
    from models.packed import PackedDecoder
    from serve.decode import DecodeReplica
    from serve.engine.device_runner import DeviceRunner
    from serve.migrate.depart import Rules
    from serve.prefill import PrefillReplica

log = logging.getLogger(__name__)

# Multiply-adds of attention run at about half the rate of those of the linears on a CPU.
ATTENTION_RATE = 0.5


class Model(NamedTuple):
    """Weights and text parts; replicas of one process may share both."""

    decoder: "Decoder | PackedDecoder | DeviceDecoder"
    text: "TextModel"


def load(settings: Settings) -> Model:
    """Read the model that the settings name. ValueError with a sentence when it cannot be."""
    from models.load import NotForDeviceError, load_for_device, load_text

    chosen = computing(settings)
    if chosen.kernels == "triton":
        try:
            device = load_for_device(settings.model, chosen.device, chosen.dtype)
            return Model(device, load_text(settings.model))
        except NotForDeviceError as refusal:
            if settings.engine.kernels != "auto" or settings.engine.device != "auto":
                raise
            log.info("engine.kernels = 'auto' does not take triton: %s", refusal)
            chosen = on_cpu(settings)
    return _load_for_cpu(settings, chosen)


def _load_for_cpu(settings: Settings, chosen: Computing) -> Model:
    from models.load import NotForCpuError, load_for_cpu, load_text

    options, cost = settings.engine, quality_cost(settings)
    if cost:
        log.warning("%s", cost)
    if chosen.kernels == "reference":
        return _load_reference(settings, chosen.dtype)
    try:
        decoder = load_for_cpu(
            settings.model,
            options.activations,
            batch_invariant=options.batch_invariant,
            cache_dir=_weights_folder(settings),
        )
    except NotForCpuError as refusal:
        asked = (options.activations, options.batch_invariant, options.kv_dtype)
        asked_for_more = asked != ("accurate", True, "auto")
        if chosen.kernels == "cpu" or asked_for_more:
            raise
        log.info("engine.kernels = 'auto' takes the reference kernels: %s", refusal)
        return _load_reference(settings, chosen.dtype)
    if not options.batch_invariant and not decoder.has_matrix_units:
        log.warning(
            "engine.batch_invariant = false changes nothing here: this processor has no AMX, and "
            "every row is computed as with true"
        )
    return Model(decoder, load_text(settings.model))


def _load_reference(settings: Settings, dtype: str) -> Model:
    from kernels.reference.stable import rows_agree
    from models.load import load_model, load_text

    if dtype == "float32" and not rows_agree():
        log.warning(
            "this machine's matrix library gives a request other last bits in other company, so a "
            "close decision may fall differently when it is busy (MKL_CBWR=%s; AUTO,STRICT is what "
            "Intel's library needs)",
            os.environ.get("MKL_CBWR"),
        )
    cache = _weights_folder(settings)
    return Model(
        load_model(settings.model, dtype=dtype, cache_dir=cache), load_text(settings.model)
    )


def _weights_folder(settings: Settings) -> Path:
    return Path(settings.data_dir) / "weights"


def kernels(model: Model) -> str:
    """What computes: "triton", "cpu" or "reference"."""
    from models.device.decoder import DeviceDecoder
    from models.packed import PackedDecoder

    if isinstance(model.decoder, DeviceDecoder):
        return "triton"
    return "cpu" if isinstance(model.decoder, PackedDecoder) else "reference"


def step_cost(config: "ModelConfig") -> StepCost:
    """The cost of context for a model's shape (multiply-adds per token, per context token)."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    linears = config.hidden * (2 * queries + 2 * keys + 3 * config.ff)
    return StepCost(ATTENTION_RATE * linears / (2 * queries))


def kv_format(settings: Settings, model: Model) -> str:
    """How keys and values are stored, a name in kernels.kv_formats: as the settings say; by default
    in float16 with the CPU kernels, and as the others compute with those."""
    computed = str(model.decoder.dtype).removeprefix("torch.")
    chosen, by = settings.engine.kv_dtype, kernels(model)
    if by == "reference":
        return computed
    if chosen != "auto":
        return chosen
    return computed if by == "triton" else "float16"


def engine(settings: Settings, model: Model, segment: str | None) -> tuple[Engine, Storage]:
    """An engine over fresh KV storage, which `segment` names in shared memory (None: private)."""
    config, options = model.decoder.config, settings.engine
    shape = KVShape(
        layers=config.layers,
        pages=options.kv_tokens // options.page_tokens,
        page_tokens=options.page_tokens,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
    )
    runner, storage = _runner(settings, model, shape, segment)
    pool = PagePool(shape.pages, shape.page_tokens, storage)
    scheduler = Scheduler(
        pool,
        PrefixTree(pool),
        budget_tokens=options.budget_tokens,
        max_running=options.max_running,
        cost=step_cost(config),
        prefix_cache=options.prefix_cache,
    )
    runner.warm_up()
    made = Engine(
        scheduler,
        runner,
        eos_token_ids=model.text.tokenizer.eos_token_ids,
        detokenizer=_detokenizer(model),
        grammars=Compiler(model.text.tokenizer),
    )
    return made, storage


def _runner(
    settings: Settings, model: Model, shape: KVShape, segment: str | None
) -> "tuple[ModelRunner | DeviceRunner, Storage]":
    """What computes steps, and the pages it writes to."""
    from models.device.decoder import DeviceDecoder

    decoder, form, options = model.decoder, kv_format(settings, model), settings.engine
    if not isinstance(decoder, DeviceDecoder):
        storage = KVStorage(shape, form, segment)
        return ModelRunner(decoder, storage), storage
    from serve.engine.device_runner import DeviceRunner

    pages = DeviceStorage(shape, form, decoder.device, segment)
    runner = DeviceRunner(
        decoder, pages, budget_tokens=options.budget_tokens, max_running=options.max_running
    )
    return runner, pages


def prefill_replica(
    settings: Settings, model: Model, replica_id: str, segment: str, clock: Clock
) -> "PrefillReplica":
    """A prefill replica, not yet started."""
    from serve.prefill import PrefillReplica

    made, storage = engine(settings, model, segment)
    transport = open_transport(settings.handoff.transport)
    return PrefillReplica(
        replica_id, made, storage, transport, lease_s=settings.handoff.lease_s, clock=clock
    )


class Connect(NamedTuple):
    """How a decode replica reaches others by id: prefill ones, and what is parked elsewhere."""

    prefill: ConnectPrefill
    parking: ConnectParking


def decode_replica(
    settings: Settings,
    model: Model,
    replica_id: str,
    segment: str,
    connect: Connect,
    clock: Clock,
) -> "DecodeReplica":
    """A decode replica, not yet started. segment: the shared memory of its pages, for others to
    take over what it parks; private where they never do or the bytes travel otherwise."""
    from serve.decode import DecodeReplica

    shared = settings.migrate.pages and settings.handoff.transport == "shared_memory"
    made, storage = engine(settings, model, segment if shared else None)
    return DecodeReplica(
        replica_id,
        made,
        storage,
        open_transport(settings.handoff.transport),
        PrefillPeers(
            connect.prefill,
            prefixes=placed_prefixes(settings),
            deadline_s=settings.handoff.deadline_s,
        ),
        min_remote_tokens=settings.handoff.min_tokens,
        connect=connect.parking,
        rules=migration_rules(settings),
        clock=clock,
    )


def migration_rules(settings: Settings) -> "Rules":
    """What a drain may do. ValueError for a KV policy that does not exist."""
    from serve.migrate.depart import Rules

    chosen = settings.migrate
    return Rules(chosen.pages, chosen.lossy, open_policy(chosen.keep), chosen.link_bytes_per_s)


def _detokenizer(model: Model) -> Callable[[], Detokenizer]:
    return lambda: Detokenizer(model.text.tokenizer)
