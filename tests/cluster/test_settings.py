"""Settings: the order of layers, refusals that name things, and the dump that reads back."""

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.settings import Settings, SettingsError, resolve
from cluster.settings.catalog import KNOWN, accepts, environment_name, nearest
from cluster.settings.dump import to_toml


def write(folder: Path, text: str) -> Path:
    file = folder / "house.toml"
    file.write_text(text, encoding="utf-8", newline="")
    return file


def test_layers_win_in_order(tmp_path: Path):
    """Four settings, one more layer each: the last layer that speaks wins."""
    file = write(tmp_path, "[http]\nport = 1\n[engine]\nmax_running = 11\nkv_tokens = 160\n")
    environ = {"SANDERLING_HTTP__PORT": "2", "SANDERLING_ENGINE__MAX_RUNNING": "12", "HOME": "/"}
    resolved = resolve(file, environ, ["http.port=3"])
    assert resolved.settings.engine.page_tokens == 16  # default
    assert resolved.settings.engine.kv_tokens == 160  # file
    assert resolved.settings.engine.max_running == 12  # environment over file
    assert resolved.settings.http.port == 3  # --set over both
    assert resolve(file, environ, ["http.port=3"], {"http.port": "4"}).settings.http.port == 4
    assert resolved.origins == {
        "http.port": "flag --set http.port=3",
        "engine.max_running": "environment variable SANDERLING_ENGINE__MAX_RUNNING",
        "engine.kv_tokens": f"file {file}",
    }


def test_nothing_given_is_the_defaults():
    assert resolve().settings == Settings()
    assert resolve(environ={"SANDER": "x"}, flags={"http.port": None}).origins == {}


def test_the_default_listens_on_loopback_only():
    assert (Settings().http.host, Settings().http.port) == ("127.0.0.1", 8000)
    assert Settings().ray.address == "local"


@pytest.mark.parametrize("name", KNOWN)
def test_every_setting_can_be_given_by_environment(name: str):
    """Each variable reaches its own setting: the default given as text changes the origin only."""
    default: Any = Settings()
    for part in name.split("."):
        default = getattr(default, part)
    text = str(default).lower() if isinstance(default, bool) else str(default)
    resolved = resolve(environ={environment_name(name): text})
    assert resolved.settings == Settings()
    assert list(resolved.origins) == [name]


def refusal(**sources: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        resolve(**sources)
    return str(caught.value)


def test_unknown_keys_name_the_nearest_and_where(tmp_path: Path):
    file = write(tmp_path, "[http]\nprot = 1\n")
    assert refusal(file=file) == (
        f"http.prot (file {file}) is no known setting; the nearest is http.port"
    )
    assert "SANDERLING_HTTP__PORT" in refusal(environ={"SANDERLING_HTTP_PORT": "1"})
    assert "engine.page_tokens" in refusal(sets=["engine.page_token=1"])
    assert "controller.period_s" in refusal(sets=["controler.period_s=1"])
    assert "decode.replicas" in refusal(sets=["decode.replica=1"])
    file = write(tmp_path, "[engin]\ndtype = 'float32'\n")
    assert "engin (file" in refusal(file=file) and "engine." in refusal(file=file)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("http.port=0", ["http.port = 0", "--set http.port=0", "integer from 1 to 65535"]),
        ("http.port=8000.0", ["http.port = 8000.0", "integer"]),
        ("http.port=true", ["http.port = True", "integer"]),
        ("http.proxy=nginx", ["http.proxy = 'nginx'", '"auto" or "python" or "haproxy"']),
        ("engine.prefix_cache=1", ["engine.prefix_cache = 1", "true or false"]),
        ("handoff.lease_s=0", ["handoff.lease_s = 0", "number above 0"]),
        ("handoff.lease_s=nan", ["handoff.lease_s = nan", "number above 0"]),
        ("decode.replicas=0", ["decode.replicas = 0", "integer from 1"]),
        ("prefill.labels={zone=1}", ["prefill.labels", "table of texts"]),
        ("http.port=1\nx=2", ["http.port = '1", "integer"]),
        ("model=", ["model = ''", "not empty"]),
        ("http.port", ["--set http.port", "name=value"]),
    ],
)
def test_wrong_values_are_refused_in_a_sentence(text: str, parts: list[str]):
    message = refusal(sets=[text])
    assert all(part in message for part in parts), message
    assert "validation error" not in message and "pydantic" not in message


def test_rules_between_values_name_both_and_the_origin():
    message = refusal(
        sets=["engine.kv_tokens=100"], environ={"SANDERLING_ENGINE__PAGE_TOKENS": "8"}
    )
    assert "engine.kv_tokens = 100" in message and "engine.page_tokens = 8" in message
    assert "--set engine.kv_tokens=100" in message and "SANDERLING_ENGINE__PAGE_TOKENS" in message
    assert "engine.max_running = 300" in refusal(sets=["engine.max_running=300"])


def test_several_wrong_values_are_all_named():
    message = refusal(sets=["http.port=0", "engine.page_tokens=0"])
    assert [line.split(" =")[0] for line in message.splitlines()] == [
        "http.port",
        "engine.page_tokens",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("http = 3", "is a table"),
        ("[http", "not valid TOML"),
        ("[model]\na = 1", "model = {'a': 1}"),
    ],
)
def test_files_that_are_not_settings(text: str, words: str, tmp_path: Path):
    assert words in refusal(file=write(tmp_path, text))


def test_a_missing_or_foreign_file_is_a_sentence(tmp_path: Path):
    assert "No such file" in refusal(file=tmp_path / "none.toml")
    binary = tmp_path / "model.gguf"
    binary.write_bytes(b"GGUF\xff\xfe\x00")
    assert "not UTF-8" in refusal(file=binary)


def test_settings_are_frozen():
    with pytest.raises(ValidationError):
        Settings().http.port = 1  # type: ignore[misc]


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)

OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        "model": TEXTS,
        "http.port": st.integers(1, 65_535),
        "http.proxy": st.sampled_from(["auto", "python", "haproxy"]),
        "engine.prefix_cache": st.booleans(),
        "prefill.cpus": st.floats(0, 1024),
        "prefill.labels": st.dictionaries(TEXTS, TEXTS, max_size=3),
        "handoff.lease_s": st.floats(0, 86_400, exclude_min=True),
        "decode.memory_bytes": st.integers(64 << 20, 1 << 62),
    },
)


@given(OVERRIDES)
def test_the_dump_reads_back(tmp_path_factory: pytest.TempPathFactory, given: dict[str, Any]):
    """Any accepted settings -> TOML text -> equal settings."""
    tree: dict[str, Any] = {}
    for name, value in given.items():
        *section, key = name.split(".")
        (tree.setdefault(section[0], {}) if section else tree)[key] = value
    settings = Settings.model_validate(tree)
    file = write(tmp_path_factory.getbasetemp(), to_toml(settings, {}))
    assert resolve(file).settings == settings


def names_in(tree: dict[str, Any], section: str = "") -> list[str]:
    """Dotted names of the values of a TOML file."""
    names = []
    for key, value in tree.items():
        inner = isinstance(value, dict) and f"{section}{key}" not in KNOWN
        names += names_in(value, f"{section}{key}.") if inner else [f"{section}{key}"]
    return names


def test_the_dump_names_origins_and_every_setting():
    text = resolve(sets=["http.port=8001"]).to_toml()
    assert "port = 8001  # from flag --set http.port=8001" in text
    assert text.count("# from ") == 1
    assert names_in(tomllib.loads(text)) == list(KNOWN)


def test_an_origin_cannot_break_out_of_its_comment():
    """The text of a flag is shown beside the value; a newline in it must not become TOML."""
    text = resolve(sets=["model=a\nport = 1"]).to_toml()
    assert tomllib.loads(text)["model"] == "a\nport = 1"
    assert "port" not in {key for key in tomllib.loads(text) if key != "http"}


@given(st.sampled_from(sorted(KNOWN)), st.data())
def test_one_typing_error_finds_its_setting(name: str, data: st.DataObject):
    """A dropped letter leads back to the setting, or to one that is as near by the same measure."""
    section, _, key = name.rpartition(".")
    at = data.draw(st.integers(0, len(key) - 1))
    typo = f"{section}.{key[:at]}{key[at + 1 :]}" if section else key[:at] + key[at + 1 :]
    assert nearest(typo) == name or nearest(typo).rpartition(".")[0] == section


def test_accepted_words_match_what_is_accepted():
    """The bounds that messages quote are the bounds that are checked."""
    for name, field in KNOWN.items():
        words = accepts(field)
        if not words.startswith("an integer from"):
            continue
        low = int(words.split("from ")[1].split()[0])
        if name not in ("engine.kv_tokens", "engine.budget_tokens", "engine.page_tokens"):
            resolve(sets=[f"{name}={low}"])
        assert "is not accepted" in refusal(sets=[f"{name}={low - 1}"])
    assert math.isfinite(Settings().handoff.deadline_s)
