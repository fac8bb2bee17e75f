"""The command line: user errors are sentences with exit code 2, bugs keep their traceback."""

import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cluster import cli as cli_module
from cluster.cli import COMMANDS, cli, main
from cluster.options import Resolved, with_settings

ROOT = Path(__file__).parents[2]


@click.command()
@with_settings("model", "port", dry_run=True)
@click.option("--loud", is_flag=True)
def show(resolved: Resolved, loud: bool) -> None:
    """A command of the usual shape."""
    click.echo(f"{resolved.settings.model} {resolved.settings.http.port} {loud}")


@click.command()
@click.argument("kind")
def fail(kind: str) -> None:
    """A command that fails as told."""
    raise {"user": ValueError("the model is upside down"), "ours": KeyError("bug")}[kind]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def test_a_command_gets_resolved_settings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SANDERLING_HTTP__PORT", "9000")
    assert CliRunner().invoke(show, []).output == "smollm2-135m-instruct 9000 False\n"
    answer = CliRunner().invoke(show, ["--port", "1", "--model", "m", "--loud"])
    assert answer.output == "m 1 True\n"
    assert CliRunner().invoke(show, ["--set", "http.port=2"]).output.split()[1] == "2"


def test_the_file_beside_you_is_read(tmp_path: Path):
    (tmp_path / "sanderling.toml").write_text("[http]\nport = 7\n")
    (tmp_path / "other.toml").write_text("model = 'other'\n")
    assert CliRunner().invoke(show, []).output.split()[1] == "7"
    assert CliRunner().invoke(show, ["-c", "other.toml"]).output.split()[:2] == ["other", "8000"]


def test_dry_run_prints_a_file_that_resolves_to_the_same(tmp_path: Path):
    printed = CliRunner().invoke(show, ["--dry-run", "--port", "8123"]).output
    assert tomllib.loads(printed)["http"]["port"] == 8123
    (tmp_path / "again.toml").write_text(printed)
    assert CliRunner().invoke(show, ["-c", "again.toml"]).output.split()[1] == "8123"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["doctor", "--port", "x"], "http.port = 'x' (flag --port) is not accepted"),
        (["doctor", "--set", "http.prot=1"], "nearest is http.port"),
        (["doctor", "-c", "nowhere.toml"], "nowhere.toml"),
        (["dctor"], "known: up, down"),
        (["doctor", "--jsn"], "--json"),
    ],
)
def test_user_errors_are_sentences(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert words in message
    assert "Traceback" not in message


def test_a_user_error_inside_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    entry = cli_module.Entry("fixture:fail", "Fails.")
    monkeypatch.setattr(cli_module, "COMMANDS", {"fail": entry})
    monkeypatch.setattr(cli_module, "load", lambda target: fail)
    with pytest.raises(SystemExit):
        main(["fail", "user"])
    assert capsys.readouterr().err == "sanderling: the model is upside down\n"
    with pytest.raises(ValueError, match="upside down"):
        main(["--traceback", "fail", "user"])
    with pytest.raises(KeyError):
        main(["fail", "ours"])


def test_help_lists_every_command_without_loading_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli_module, "load", lambda target: pytest.fail(f"{target} was loaded"))
    printed = CliRunner().invoke(cli, ["--help"]).output
    assert all(name in printed for name in COMMANDS)


def test_the_module_runs_as_installed_script():
    script = Path(sys.executable).with_name("sanderling")
    if not script.exists():
        pytest.skip("sanderling is not installed in this environment")
    answer = subprocess.run(
        [script, "--version"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert answer.stdout.startswith("sanderling, version ")
