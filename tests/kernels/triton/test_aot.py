"""Layer C: broken kernels are caught, some that ship are compiled anew, and the results that are
committed are complete and of the kernels as they stand."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kernels.triton.case import Case
from kernels.triton.targets import TARGETS, target
from kernels.triton.verify import aot
from kernels.triton.verify.compiled import Compiled, _of_amdgcn, faults
from kernels.triton.verify.matrix import markdown
from kernels.triton.verify.shipped import key, modules, shipped
from kernels.triton.verify.worker import Worker
from tests.kernels.triton import wrong

ROOT = Path(__file__).parents[3]
DEADLINE_S = 120.0  # for one case, on a machine that is busy


def gates(name: str) -> list[list[str]]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    told = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton.wrong", name],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert told.returncode == 0, told.stderr
    return [json.loads(line) for line in told.stdout.splitlines()]


@pytest.mark.parametrize("name", ["sm_80", "gfx942"])
def test_broken_kernels_are_caught(name):
    right, no_matrix, product, in_a_loop, page, small, large, *spills = gates(name)
    assert right == []
    assert no_matrix == ["has no matrix instruction for half operands"]
    for found in (product, in_a_loop, page):
        assert len(found) == 1
        assert found[0].startswith("addresses with a product of 32 bits: broken.py:")
    assert small == []
    limit = target(name).shared_limit_bytes
    assert any(each.endswith(f"of shared memory, the card has {limit}") for each in large)
    assert [each.startswith("spills ") for found in spills for each in found] == (
        [True] if name == "sm_80" else []
    )


NOTES = """
    .group_segment_fixed_size: 1024
    .private_segment_fixed_size: 16
    .vgpr_count:     256
    .vgpr_spill_count: 7
"""


def test_registers_that_amd_keeps_in_memory_are_counted():
    assert _of_amdgcn(SimpleNamespace(asm={"amdgcn": NOTES})) == (256, 11)
    none = NOTES.replace("16", "0").replace("7", "0")
    assert _of_amdgcn(SimpleNamespace(asm={"amdgcn": none})) == (256, 0)


FINE = Compiled(64, 1024, 0, "mma")


@pytest.mark.parametrize(
    "made, said",
    [
        (FINE, []),
        (FINE._replace(spilled=8), ["spills 8 bytes of stack"]),
        (FINE._replace(shared_bytes=99 * 1024), []),
        (
            FINE._replace(shared_bytes=99 * 1024 + 1),
            ["needs 101377 bytes of shared memory, the card has 101376"],
        ),
        (FINE._replace(matrix=""), ["has no matrix instruction for half operands"]),
        (FINE._replace(narrow=("a.py:3",)), ["addresses with a product of 32 bits: a.py:3"]),
    ],
)
def test_every_gate_can_say_no(made, said):
    assert faults(wrong.case("product", 64, matrix="half"), target("sm_86"), made) == said


AGAIN = [
    ("sm_80", "linear_w4", "w4_linear/bf16-g32-rows16"),
    ("gfx942", "linear_int8", "int8_matmul/rows16"),
    ("gfx942", "norm", "rms_norm/bfloat16-576"),
]


def test_some_that_ship_compile_to_what_is_committed():
    results = aot.read()
    with Worker(DEADLINE_S) as worker:
        for name, module, case in AGAIN:
            made = worker.compile(module, name, case)
            known = results[name][case]
            assert made == {field: known[field] for field in known if field != "key"}
            assert made["faults"] == []


def test_a_worker_outlives_what_it_is_asked():
    with Worker(DEADLINE_S) as worker:
        assert worker.compile("nowhere", "sm_80", "x") == {"faults": ["takes the compiler down"]}
        worker.deadline_s = 0.01
        late = worker.compile("norm", "sm_80", "rms_norm/float16-4096")
        assert late == {"faults": ["does not compile within 0 s"]}
        worker.deadline_s = DEADLINE_S
        assert worker.compile("norm", "sm_80", "rms_norm/float16-4096")["faults"] == []


def test_what_is_committed_is_complete_and_current():
    """Otherwise: python -m kernels.triton.verify.aot, which compiles only what has changed."""
    results, every = aot.read(), list(aot.items())
    assert len(every) > 500 and {item.target.name for item in every} == set(results)
    old = [f"{item.target.name} {item.name}" for item in every if aot.outdated(results, item)]
    assert old == [], f"{len(old)} are to be compiled"
    known = {(name, case) for name in results for case in results[name]}
    assert known == {(item.target.name, item.name) for item in every}
    assert [
        entry for each in results.values() for entry in each.values() if entry.get("faults")
    ] == []


def test_the_page_is_made_of_the_results():
    results = aot.read()
    page = aot.MATRIX.read_text("utf-8")
    assert page == markdown(results)
    assert all(each.name in page for each in TARGETS)
    one = next(iter(results["sm_80"]))
    results["sm_80"][one] |= {"faults": ["spills 8 bytes of stack"]}
    assert f"- {one} on sm_80: spills 8 bytes of stack." in markdown(results)


def first(module: str, name: str = "sm_80") -> Case:
    return next(each for each in shipped(module, target(name)) if isinstance(each, Case))


def test_a_key_is_of_all_that_is_compiled():
    case = first("linear_w4")
    changes = [
        case._replace(num_warps=8),
        case._replace(num_stages=9),
        case._replace(fp_fusion=False),
        case._replace(divisible=case.divisible[1:]),
        case._replace(constants={**case.constants, "BK": 32}),
        case._replace(signature={**case.signature, "x": "*fp32"}),
        case._replace(matrix="int8"),
        case._replace(kernel=first("norm").kernel),
    ]
    keys = [key(each, "3.7.1") for each in (case, *changes)] + [key(case, "3.7.2")]
    assert len(set(keys)) == len(keys)
    assert key(case._replace(name="other/name"), "3.7.1") == keys[0]


def test_a_key_follows_what_a_kernel_calls(monkeypatch):
    """A change of a function or of a constant that the kernel uses, but not of its comments."""
    kernel = first("linear_int8").kernel
    case = first("linear_int8")
    assert case.op == "quantize_rowwise_int8"
    before = key(case, "3.7.1")
    names = kernel.fn.__globals__
    monkeypatch.setitem(names, "TO_WHOLE", type(names["TO_WHOLE"])(1.0))
    assert key(case, "3.7.1") != before
    one, two = first("linear_w4"), first("linear_w4")
    before = key(one, "3.7.1")
    monkeypatch.setitem(one.kernel.fn.__globals__, "_places", first("norm").kernel)
    assert key(two, "3.7.1") != before


@pytest.mark.parametrize("module", modules())
def test_cases_are_whole(module):
    """Every argument of a kernel is said once, and each is of a known kind."""
    from kernels.triton.launch import parameters

    for chosen in TARGETS:
        for each in shipped(module, chosen):
            if not isinstance(each, Case):
                assert str(each.error()).startswith(f"{each.op} does not run on {chosen.name}: ")
                continue
            names = [parameter.name for parameter in parameters(each.kernel)]
            assert sorted(names) == sorted([*each.signature, *each.constants]), each.name
            assert set(each.divisible) <= set(each.signature)
            assert each.work.moved_bytes > 0 and all(count > 0 for count in each.work.grid)
            assert each.matrix == "" or (chosen.dot and each.matrix in chosen.matrix)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_whole_sweep_again(tmp_path, monkeypatch):
    """Everything, from nothing: half an hour."""
    committed = aot.read()
    monkeypatch.setattr(aot, "RESULTS", tmp_path / "aot.json")
    monkeypatch.setattr(aot, "MATRIX", tmp_path / "kernels.md")
    results: aot.Results = {}
    assert aot.sweep(results, list(aot.items()), float("inf")) == 0
    assert results == committed
