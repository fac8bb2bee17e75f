"""Every setting there is: one frozen model per section, a sentence and bounds for each field.

A description is written for the person who edits the file; `dump.py` prints it, error messages
quote the bounds. The full list of names is frozen by tests/house/test_knobs.py.
"""

import hashlib
import re
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from cluster.settings.autoscale import AutoscaleSettings
from cluster.settings.section import Seconds, Section

DEVICE_PATTERN = r"^(auto|cpu|cuda(:\d{1,3})?)$"
MIB = 1 << 20
GIB = 1 << 30


class HttpSettings(Section):
    """Where and how the OpenAI-compatible API listens."""

    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(8000, ge=1, le=65_535, description="TCP port to listen on.")
    proxy: Literal["auto", "python", "haproxy"] = Field(
        "auto", description="What stands before the ingress; auto takes what fits one machine."
    )
    max_body_bytes: int = Field(
        4 * MIB, ge=1024, le=256 * MIB, description="Longest request body read; more is a 413."
    )
    drain_s: Seconds = Field(
        20.0, description="How long open requests may go on when the service is taken down."
    )
    api_key: str = Field(
        "",
        max_length=512,
        description="A key that every request must send; only its SHA-256 is kept. Empty: none.",
    )
    api_keys_file: str = Field(
        "", description="TOML file of hashed keys by tenant (`sanderling key`). Empty: none."
    )

    machines_key: str = Field(
        "",
        max_length=512,
        description="Key of POST /machines, by which `sanderling autoscale` places replicas; only "
        "its SHA-256 is kept. Empty: there is no such path.",
    )

    @field_validator("api_key", "machines_key")
    @classmethod
    def _hashed(cls, key: str) -> str:
        if not key or re.fullmatch("sha256:[0-9a-f]{64}", key):
            return key
        return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


class AdmissionSettings(Section):
    """How much work may wait before requests are refused with a 429."""

    max_queued_tokens: int = Field(
        65_536, ge=1, description="Most prompt tokens that wait for their first token."
    )
    max_queued_requests: int = Field(
        512, ge=1, description="Most requests that wait for their first token."
    )


class RaySettings(Section):
    """The Ray cluster underneath."""

    address: str = Field(
        "local",
        min_length=1,
        description="'local' starts a Ray of our own and never attaches to another; else host:port "
        "of a running one.",
    )
    auth: Literal["token", "disabled"] = Field(
        "token", description="Whether Ray's own ports ask for a token."
    )
    object_store_bytes: int = Field(
        512 * MIB,
        ge=75 * MIB,
        description="Shared memory for Ray's object store (only address = 'local').",
    )


class EngineSettings(Section):
    """What each replica's engine computes with; the same for prefill and decode."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Number format of activations, KV cache and weights that are not quantised: "
        "auto is bfloat16 on a GPU, else float32; float16 is only for GPUs.",
    )
    kernels: Literal["auto", "cpu", "triton", "reference"] = Field(
        "auto",
        description="What computes: triton on a GPU; cpu in C++ on the quantised weights of a GGUF "
        "file (float32 only); reference is torch on a CPU. auto is triton where torch finds a GPU, "
        "else cpu where it takes the model, and says so where not.",
    )
    device: str = Field(
        "auto",
        pattern=DEVICE_PATTERN,
        description="Where triton computes: cuda is the first GPU, cuda:1 the second, cpu a slow "
        "check of the same operations in torch; auto is cuda.",
    )
    activations: Literal["accurate", "fast", "float32"] = Field(
        "accurate",
        description="Of the CPU kernels: 15-bit activations; 8-bit ones, which cost quality; or "
        "float32 ones, which are not rounded at all and cost speed.",
    )
    batch_invariant: bool = Field(
        True,
        description="Whether a request's bits are the same in any company. If not, the CPU "
        "kernels compute steps of several tokens in 16-bit fixed point where a processor has AMX, "
        "and attend to prompts by it: faster, and a close decision may fall differently when it is "
        "busy.",
    )
    kv_dtype: Literal["auto", "float32", "float16", "int8", "int4"] = Field(
        "auto",
        description="How cpu and triton store keys and values: auto is float16, with triton "
        "engine.dtype; int8 and int4 take about half and a third of that, and cost some quality.",
    )
    page_tokens: int = Field(16, ge=1, le=256, description="Tokens in one page of the KV cache.")
    kv_tokens: int = Field(
        16_384, ge=16, description="Tokens the KV cache of one replica holds; whole pages."
    )
    budget_tokens: int = Field(
        256,
        ge=1,
        description="Most tokens computed in one step; decodes first, then prompt chunks.",
    )
    max_running: int = Field(32, ge=1, description="Most sequences computed in one step.")
    prefix_cache: bool = Field(
        True, description="Keep the pages of finished prompts and reuse them for equal prefixes."
    )

    @model_validator(mode="after")
    def _whole(self) -> "EngineSettings":
        if self.kv_tokens % self.page_tokens:
            raise ValueError(
                f"engine.kv_tokens = {self.kv_tokens} is not a whole number of pages; a multiple "
                f"of engine.page_tokens = {self.page_tokens} is accepted"
            )
        self._computable()
        if self.budget_tokens < self.max_running:
            raise ValueError(
                f"engine.budget_tokens = {self.budget_tokens} leaves no token for some of "
                f"engine.max_running = {self.max_running} sequences; at least as many tokens as "
                "sequences are accepted"
            )
        return self

    def _computable(self) -> None:
        """ValueError where kernels, device and number formats contradict each other."""
        on_gpu = self.kernels == "triton" or self.device.startswith("cuda")
        if self.device.startswith("cuda") and self.kernels in ("cpu", "reference"):
            raise ValueError(
                f"engine.kernels = {self.kernels!r} computes on a CPU, and engine.device is "
                f"{self.device!r}; 'cpu' and 'auto' are accepted with it"
            )
        if self.kernels == "cpu" and self.dtype not in ("auto", "float32"):
            raise ValueError(
                f"engine.kernels = 'cpu' computes in float32, and engine.dtype is {self.dtype!r}; "
                "'float32' is accepted with it"
            )
        if self.dtype == "float16" and (self.kernels == "reference" or self.device == "cpu"):
            raise ValueError(
                "engine.dtype = 'float16' is only for GPUs; 'float32' and 'bfloat16' are accepted "
                f"with engine.kernels = {self.kernels!r} and engine.device = {self.device!r}"
            )
        halves = self.dtype not in ("auto", "float32")
        if self.kernels in ("reference", "triton") or on_gpu or halves:
            self._only_for_cpu("activations", "accurate")
            self._only_for_cpu("batch_invariant", True)
        if self.kernels == "reference" or (halves and not on_gpu):
            self._only_for_cpu("kv_dtype", "auto")

    def _only_for_cpu(self, name: str, otherwise: str | bool) -> None:
        if getattr(self, name) != otherwise:
            raise ValueError(
                f"engine.{name} = {getattr(self, name)!r} is only for the CPU kernels"
                f"{' and GPUs' if name == 'kv_dtype' else ''}; with engine.kernels = "
                f"{self.kernels!r} and engine.dtype = {self.dtype!r} {otherwise!r} is accepted"
            )


class RoleSettings(Section):
    """How many replicas of a role run, and what one of them asks of a machine."""

    replicas: int = Field(1, ge=0, le=1024, description="How many replicas run.")
    cpus: float = Field(
        0.5, ge=0, le=1024, allow_inf_nan=False, description="CPUs Ray reserves for one replica."
    )
    memory_bytes: int = Field(
        2 * GIB,
        ge=64 * MIB,
        description="Memory Ray reserves for one replica: weights, KV cache and the process.",
    )
    labels: dict[str, str] = Field(
        default_factory=dict, description="Node labels that a replica's machine must have."
    )
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="Compute threads of one replica; 0 is its fair share of the CPUs.",
    )


class DecodeSettings(RoleSettings):
    """The role that owns a request's tokens; there is always at least one."""

    replicas: int = Field(1, ge=1, le=1024, description="How many replicas run.")


class HandoffSettings(Section):
    """How the KV pages of a prompt get from a prefill to a decode replica."""

    transport: Literal["shared_memory", "ray_object"] = Field(
        "shared_memory", description="How pages move; shared_memory needs both on one machine."
    )
    min_tokens: int = Field(
        64, ge=0, description="Decode computes shorter uncached prompt parts itself."
    )
    lease_s: Seconds = Field(
        5.0, description="How long pages wait for their receiver before they are taken back."
    )
    deadline_s: Seconds = Field(
        60.0, description="How long decode waits for a remote prefill before it goes elsewhere."
    )


class MigrateSettings(Section):
    """What a draining replica does with requests that cannot finish in time."""

    pages: bool = Field(
        True,
        description="Whether their KV pages go on to the next replica; if not, it computes them "
        "again.",
    )
    lossy: bool = Field(
        False,
        description="Whether KV of floats may cross in int8 or int4 where time is short; the "
        "tokens that follow may then differ.",
    )
    keep: Literal["all"] = Field(
        "all", description="Which pages of a sequence cross: those that this KV policy keeps."
    )
    link_bytes_per_s: float = Field(
        1e9,
        gt=0,
        le=1e15,
        allow_inf_nan=False,
        description="What a replica can send, for the first plan of a drain; then it is measured.",
    )


class ControllerSettings(Section):
    """The actor that starts, watches and replaces replicas."""

    period_s: Seconds = Field(0.5, description="Time between two looks at the replicas.")
    ping_deadline_s: Seconds = Field(
        10.0, description="A replica that answers no ping for so long is replaced."
    )
    start_deadline_s: Seconds = Field(
        120.0, description="A replica that is not ready after so long is replaced."
    )


class ObserveSettings(Section):
    """What the ingress tells of its work, besides /metrics and /status."""

    log_format: Literal["text", "json"] = Field(
        "text", description="How log lines are written; both hold the same fields."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The least important log lines that are written."
    )
    otlp_endpoint: str = Field(
        "",
        description="OTLP/HTTP endpoint that traces are sent to, e.g. http://collector:4318. "
        "Empty: none.",
    )

    @model_validator(mode="after")
    def _reachable(self) -> "ObserveSettings":
        if self.otlp_endpoint and not _is_http_url(self.otlp_endpoint):
            raise ValueError(
                f"observe.otlp_endpoint = {self.otlp_endpoint!r} is no URL that traces can be sent "
                "to; http://host:port or https://host:port is accepted, and nothing for no traces"
            )
        return self


def _is_http_url(text: str) -> bool:
    """With a host, a port that exists if it names one, and nothing behind the path."""
    try:
        url = urlsplit(text)
        in_range = url.port is None or url.port > 0
    except ValueError:
        return False
    plain = text.isprintable() and " " not in text and not url.query and not url.fragment
    return url.scheme in ("http", "https") and bool(url.hostname) and in_range and plain


class Settings(Section):
    """Everything that can be set, with defaults that fit one machine."""

    model: str = Field(
        "smollm2-135m-instruct",
        min_length=1,
        description="Built-in name, path of a GGUF file or a Hugging Face folder, or a hub id.",
    )
    data_dir: str = Field(
        ".sanderling", min_length=1, description="Folder for logs and state, made when missing."
    )
    http: HttpSettings = HttpSettings()
    admission: AdmissionSettings = AdmissionSettings()
    ray: RaySettings = RaySettings()
    engine: EngineSettings = EngineSettings()
    prefill: RoleSettings = Field(
        RoleSettings(), description="0 replicas: decode computes every prompt itself."
    )
    decode: DecodeSettings = DecodeSettings()
    handoff: HandoffSettings = HandoffSettings()
    migrate: MigrateSettings = MigrateSettings()
    controller: ControllerSettings = ControllerSettings()
    observe: ObserveSettings = ObserveSettings()
    autoscale: AutoscaleSettings = AutoscaleSettings()
