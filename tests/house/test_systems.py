"""docs/systems.md has a row for every system of the outline and claims only what it can show."""

import ast
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "systems.md"
STATES = ("planned", "simulated", "works")

OUTLINE = {
    "1.1 Sparse attention": ["Longformer", "BigBird"],
    "1.1 Approximate attention": ["Linformer", "Reformer"],
    "1.1 Attention-free approaches": ["Hyena", "Mamba"],
    "1.2 Mixture of experts": ["Switch Transformer", "GLaM", "MoEfication", "FFF"],
    "1.2 Early exiting": ["FREE", "SkipDecode", "DeeBERT", "PABEE"],
    "1.3 Diffusion-specific optimization": [
        "Efficient sampling",
        "Diffusion in latent space",
        "Diffusion architecture variants",
    ],
    "1.4 ViT-specific optimizations": ["MobileViT", "EfficientFormer", "EdgeViT"],
    "2.1 Training data quality control": ["DataComp", "DFN"],
    "2.1 Training data reduction": ["Deduplication", "Image patch removal"],
    "2.1 Progressive learning": ["StackingBERT", "CompoundGrow"],
    "2.1 Mixed precision training": ["Mesa", "GACT"],
    "2.2 Additive tuning": ["Adapter tuning", "Prompt tuning", "Prefix tuning"],
    "2.2 Selective tuning": ["Freezing most parameters", "Selective updates"],
    "2.2 Re-parameter tuning": ["LoRA", "Delta-LoRA"],
    "2.3 Opportunistic decoding": ["Speculative decoding", "Look-ahead decoding"],
    "2.3 Input filtering and compression": ["Prompt compression", "Token pruning"],
    "2.3 KV cache optimization": ["Memory-efficient sparse attention"],
    "2.3 Long context handling": ["LM-Infinite", "StreamingLLM"],
    "2.4 Pruning": ["Structured pruning", "Unstructured pruning", "Contextual pruning"],
    "2.4 Knowledge distillation": ["Black-box distillation", "White-box distillation"],
    "2.4 Quantization": ["Quantization-aware training (QAT)", "Post-training quantization (PTQ)"],
    "2.4 Low-rank decomposition": ["TensorGPT", "LoSparse"],
    "3.1 Resilience": ["Checkpointing", "Redundant computation"],
    "3.1 Parallelism": ["Data parallelism", "Model parallelism", "Sequence parallelism"],
    "3.1 Communication": ["Communication compression", "Communication overlapped with computation"],
    "3.1 Storage": ["Offloading in training", "Heterogeneous GPUs in training"],
    "3.1 MoE optimization": ["MegaBlocks", "Tutel"],
    "3.2 Hardware-aware optimizations": ["EdgeBERT", "FlightLLM", "SpAtten"],
    "3.3 Inference accelerating": ["Kernel optimization", "Request batching"],
    "3.3 Memory saving": ["KV cache management", "Offloading in serving"],
    "3.3 Emerging platforms": ["Spot instances", "Heterogeneous GPUs in serving"],
    "3.4 Edge-cloud collaboration": ["EdgeFM"],
    "3.4 On-device MoE": ["EdgeMoE", "PC-MoE"],
    "3.4 Memory optimization": ["LLMCad", "PowerInfer"],
    "3.4 I/O optimization": ["STI", "LLM in a flash"],
    "3.4 Kernel optimization": ["Integer-based edge kernels"],
}


class Row(NamedTuple):
    """One line of the table."""

    system: str
    section: str
    where: str
    switch: str
    check: str
    measured: str
    state: str


def read(text: str) -> list[Row]:
    """The rows of the table, its head and rule left out."""
    lines = [line.strip().strip("|").split("|") for line in text.splitlines() if line[:1] == "|"]
    return [Row(*(cell.strip() for cell in cells)) for cells in lines[2:]]


def problems(rows: list[Row], root: Path) -> list[str]:
    """What the table claims and cannot show, one sentence each."""
    return [problem for row in rows for problem in _problems(row, root)]


def _problems(row: Row, root: Path) -> list[str]:
    found = []
    if row.state not in STATES:
        found.append(f"{row.system}: the state {row.state!r} is none of {STATES}")
    if row.state == "planned":
        if (row.switch, row.check, row.measured) != ("-", "-", "-"):
            found.append(f"{row.system}: planned, but has a switch, a check or a measurement")
        return found
    if not _check_exists(row.check.strip("`"), root):
        found.append(f"{row.system}: its check {row.check} does not exist")
    places = [place.strip(" `") for place in row.where.split(",")]
    found += [
        f"{row.system}: {place} is not there" for place in places if not (root / place).exists()
    ]
    if row.switch in ("", "-"):
        found.append(f"{row.system}: does not say how to switch it on")
    return found


def _check_exists(check: str, root: Path) -> bool:
    """A test file under tests/, and in it the named test if one is named."""
    file, _, test = check.partition("::")
    path = root / file
    if not file.startswith("tests/") or not path.name.startswith("test_") or not path.is_file():
        return False
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    return test in names if test else any(name.startswith("test_") for name in names)


def test_every_system_has_its_row():
    rows = read(TABLE.read_text(encoding="utf-8"))
    listed = [(row.section, row.system) for row in rows]
    assert listed == [(section, name) for section, names in OUTLINE.items() for name in names]


def test_nothing_is_claimed_without_its_check():
    assert problems(read(TABLE.read_text(encoding="utf-8")), ROOT) == []


GOOD = Row("X", "1", "`cluster/`", "x.on = true", "`tests/test_x.py::test_x`", "-", "works")


@pytest.mark.parametrize(
    "change",
    [
        {"state": "done"},
        {"check": "-"},
        {"check": "`tests/test_y.py`"},
        {"check": "`tests/test_x.py::test_y`"},
        {"check": "`cluster/x.py`"},
        {"where": "`serve/x/`"},
        {"switch": "-"},
        {"state": "planned"},
    ],
)
def test_a_false_claim_is_seen(change: dict[str, str], tmp_path: Path):
    (tmp_path / "cluster").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text("def test_x(): ...")
    (tmp_path / "cluster" / "x.py").write_text("def test_x(): ...")
    assert problems([GOOD], tmp_path) == []
    assert problems([GOOD._replace(**change)], tmp_path)
