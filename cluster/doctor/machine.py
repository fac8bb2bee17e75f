"""Checks of the machine itself: compiler, processor, accelerator, port, memory, shared memory."""

import importlib.util
import os
import shutil
import socket
import subprocess
from pathlib import Path

import psutil

from cluster.doctor.finding import Finding
from cluster.settings import Settings

GIB = 1 << 30
# Ray's own processes (GCS, raylet, agents, two idle workers, Serve's controller and proxy),
# proportional set size measured on Ray 2.60 with the dashboard off, rounded up.
RAY_BYTES = 1_200_000_000
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")
PORT_TIMEOUT_S = 1.0
COMPILER_TIMEOUT_S = 20.0


def compiler() -> Finding:
    """A C++ compiler that answers --version."""
    name = next((c for c in (os.environ.get("CXX"), "g++", "clang++") if c and shutil.which(c)), "")
    todo = "install g++ (Debian, Ubuntu: apt-get install g++) or set CXX"
    if not name:
        return Finding("C++ compiler", "fail", "none of $CXX, g++, clang++ found", todo)
    try:
        answer = subprocess.run(
            [name, "--version"], capture_output=True, text=True, timeout=COMPILER_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("C++ compiler", "fail", f"{name}: {error}", todo)
    if answer.returncode:
        return Finding("C++ compiler", "fail", f"{name} --version failed", todo)
    return Finding("C++ compiler", "ok", answer.stdout.partition("\n")[0])


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Finding:
    """CPUs and the vector instructions that decide which kernels can run."""
    cpus = len(os.sched_getaffinity(0))
    if not cpuinfo.exists():
        return Finding("processor", "warn", f"{cpus} CPUs, no {cpuinfo}", "use Linux on x86-64")
    flags = _flags(cpuinfo.read_text(encoding="utf-8", errors="replace"))
    present = [instruction for instruction in INSTRUCTIONS if instruction in flags]
    found = f"{cpus} CPUs; {', '.join(present) or 'no AVX2'}"
    if "avx2" not in flags:
        return Finding("processor", "warn", found, "expect slow answers; take a CPU with AVX2")
    return Finding("processor", "ok", found)


def _flags(cpuinfo: str) -> set[str]:
    """Instruction sets of the first processor listed (x86: `flags`, Arm: `Features`)."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def accelerator() -> Finding:
    """GPUs that torch sees; with none the CPU computes."""
    if importlib.util.find_spec("torch") is None:
        return Finding("GPU", "warn", "unknown: torch is not installed", "make up installs it")
    import torch  # here, since it takes seconds

    if not torch.cuda.is_available():
        return Finding("GPU", "ok", "none; the CPU computes")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if importlib.util.find_spec("triton") is None:
        found = f"{', '.join(names)}, but the module triton is not installed: the CPU computes"
        return Finding("GPU", "warn", found, "pip install the triton that this torch names")
    return Finding("GPU", "ok", f"{', '.join(names)}; engine.kernels = 'auto' computes there")


def port(settings: Settings) -> Finding:
    """The HTTP port can be bound."""
    host, number = settings.http.host, settings.http.port
    check = f"port {number}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, number, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.settimeout(PORT_TIMEOUT_S)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        todo = "stop what listens there (sanderling down) or use another: --set http.port=8001"
        return Finding(check, "fail", f"{host}:{number} is not free: {error.strerror}", todo)
    return Finding(check, "ok", f"{host}:{number} is free")


def needed_bytes(settings: Settings) -> int:
    """Memory the settings may take: replicas, Ray's object store and Ray itself."""
    roles = (settings.prefill, settings.decode)
    replicas = sum(role.replicas * role.memory_bytes for role in roles)
    return replicas + settings.ray.object_store_bytes + RAY_BYTES


def memory(settings: Settings, available_bytes: int | None = None) -> Finding:
    """Available memory holds what the settings may take."""
    there = psutil.virtual_memory().available if available_bytes is None else available_bytes
    there = min(there, _container_bytes())
    need = needed_bytes(settings)
    found = f"{there / GIB:.1f} GiB available, up to {need / GIB:.1f} GiB needed"
    if settings.ray.address != "local":
        return Finding("memory", "ok", f"{found} on the cluster, not here")
    todo = "lower prefill.replicas (0 is accepted), engine.kv_tokens and *.memory_bytes"
    if there >= need:
        return Finding("memory", "ok", found)
    return Finding("memory", "warn" if there >= need // 2 else "fail", found, todo)


def _container_bytes(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """The container's memory limit; without one, more than any machine has."""
    text = limit.read_text().strip() if limit.exists() else "max"
    return 1 << 62 if text == "max" else int(text)


def shared_memory(settings: Settings, folder: Path = Path("/dev/shm")) -> Finding:
    """/dev/shm holds Ray's object store and, when pages move through it, the KV caches."""
    if not folder.exists():
        return Finding(str(folder), "fail", "missing", "mount a tmpfs there")
    free = shutil.disk_usage(folder).free
    store = settings.ray.object_store_bytes if settings.ray.address == "local" else 0
    roles = (settings.prefill, settings.decode)
    caches = sum(role.replicas * role.memory_bytes for role in roles)
    if settings.handoff.transport != "shared_memory":
        caches = 0
    found = (
        f"{free / GIB:.1f} GiB free; object store {store / GIB:.1f}, KV up to {caches / GIB:.1f}"
    )
    if free < store:
        todo = "give it more (docker run --shm-size=4g) or lower ray.object_store_bytes"
        return Finding(str(folder), "fail", found, todo)
    if free < store + caches:
        todo = "give it more, or set handoff.transport = ray_object"
        return Finding(str(folder), "warn", found, todo)
    return Finding(str(folder), "ok", found)
