"""Kinds: the product's own files agree with each other and with the compiled kernels' targets; a
wrong file is refused in a sentence that names the key."""

import re
from pathlib import Path

import pytest

from autoscale.catalog.kinds import OWN, read_kind, read_kinds

KINDS = read_kinds()
DOCS = Path(__file__).parents[3] / "docs" / "kernels.md"
# Our kind, and the card of docs/kernels.md that has the same architecture.
SAME_ARCHITECTURE = {"t4": "T4", "a10g": "A10,", "l4": "L4", "h100": "H100", "b200": "B200"}

GOOD = """
name = "x"
source = "its data sheet"
memory_gb = 24
bf16_tflops = 100
memory_gb_per_s = 500
link_gb_per_s = 32
"""


def test_the_kinds_that_come_with_it():
    wanted = "t4 a10g l4 v100 a100-40g a100-80g h100 h200 b200 mi300x cpu"
    assert set(KINDS) == set(wanted.split())
    assert all(path.stem == read_kind(path).name for path in OWN.glob("*.toml"))


def test_architectures_are_those_that_kernels_are_compiled_for():
    targets = dict(
        (card, int(sm)) for sm, card in re.findall(r"\| sm_(\d+) \| ([^|]+) \|", DOCS.read_text())
    )
    for kind, card in SAME_ARCHITECTURE.items():
        found = [sm for cards, sm in targets.items() if card in f"{cards},"]
        assert found == [KINDS[kind].sm], kind


def test_figures_stand_in_the_source_that_is_named():
    """Bandwidth and arithmetic of each GPU can be read off its file's own source."""
    for kind in KINDS.values():
        if kind.name == "cpu":
            continue
        text = kind.source.replace(",", "")
        figures = {float(found) for found in re.findall(r"\d+(?:\.\d+)?", text)}
        assert {kind.memory_gb_per_s, kind.memory_gb_per_s / 1000} & figures, kind.name
        assert {kind.bf16_tflops, kind.bf16_tflops / 1000} & figures, kind.name


def test_a_later_generation_is_no_slower():
    for older, newer in (
        ("t4", "l4"),
        ("v100", "a100-40g"),
        ("a100-80g", "h100"),
        ("h100", "b200"),
    ):
        assert KINDS[older].bf16_tflops < KINDS[newer].bf16_tflops
        assert KINDS[older].memory_bytes <= KINDS[newer].memory_bytes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("memory_gb = 24", "memory_gigabytes = 24"), "the nearest is memory_gb"),
        (("memory_gb = 24", ""), "memory_gb is missing"),
        (("bf16_tflops = 100", "bf16_tflops = -100"), "bf16_tflops = -100 is not accepted"),
        (("link_gb_per_s = 32", "link_gb_per_s = nan"), "link_gb_per_s"),
        (('source = "its data sheet"', 'source = ""'), "source"),
        (("memory_gb = 24", "memory_gb = "), "is not valid TOML"),
    ],
)
def test_a_wrong_file_is_refused(change: tuple[str, str], words: str, tmp_path: Path):
    path = tmp_path / "x.toml"
    path.write_text(GOOD)
    assert read_kind(path).memory_bytes == 24_000_000_000
    path.write_text(GOOD.replace(*change))
    with pytest.raises(ValueError, match=re.escape(words)) as refusal:
        read_kind(path)
    assert str(path) in str(refusal.value)


def test_a_users_kind_takes_the_place_of_ours(tmp_path: Path):
    (tmp_path / "t4.toml").write_text(GOOD.replace('"x"', '"t4"'))
    assert read_kinds([tmp_path])["t4"].bf16_tflops == 100 != KINDS["t4"].bf16_tflops
    with pytest.raises(ValueError, match="no folder of kinds"):
        read_kinds([tmp_path / "absent"])
