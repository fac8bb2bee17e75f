"""How kernels are launched: on which target, what is refused, and that nothing but what was
compiled is ever launched."""

import importlib
from typing import Any

import pytest
import torch
import triton

from kernels.triton import configs, launch, linear_w4, norm, warm
from kernels.triton.case import Case
from kernels.triton.targets import TARGETS, cuda_target, target
from kernels.triton.verify.shipped import shipped
from tests.kernels.ops.cases import Source
from tests.kernels.triton.test_layers import MODULES, OURS
from tests.kernels.triton.ways import launcher

pytestmark = pytest.mark.usefixtures("only_interpreted")


def test_targets_are_found_by_name_and_by_compute_capability():
    assert target("gfx942").warp_threads == 64 and target("sm_86").shared_limit_bytes == 99 * 1024
    with pytest.raises(ValueError, match="'sm_70' is not in the catalogue; accepted are sm_75, sm"):
        target("sm_70")
    found = {
        (8, 0): "sm_80",
        (8, 7): "sm_86",
        (8, 9): "sm_89",
        (10, 3): "sm_100",
        (12, 1): "sm_120",
    }
    assert {each: cuda_target(*each).name for each in found} == found
    for old in ((7, 0), (11, 0)):
        with pytest.raises(ValueError, match="fits none of sm_75, sm_80"):
            cuda_target(*old)


def test_cards_have_plausible_figures():
    """Matrix units are faster than vectors, bytes come slower than operations."""
    for each in TARGETS:
        for card in each.cards:
            assert card.half > card.float32 > card.bandwidth_bytes_s > 1e11, card.name
            assert (card.fp8 > 0) >= each.fp8 and card.source and card.multiprocessors > 30


def test_without_a_gpu_the_error_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    x = torch.ones(2, 8)
    with pytest.raises(
        RuntimeError, match="rms_norm in Triton needs its tensors on a CUDA or ROCm"
    ):
        norm.rms_norm(x, x[0], 1e-5)
    with pytest.raises(
        RuntimeError, match="w8_linear cannot be launched on cuda:0: Triton finds no"
    ):
        launch._need_driver("w8_linear", torch.device("cuda:0"))


def test_float64_is_refused_by_name():
    x = torch.ones(2, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="rms_norm on a GPU takes .*, not torch.float64"):
        norm.rms_norm(x, x[0], 1e-5)
    wide = torch.ones(1, norm.MOST + 1)
    with pytest.raises(ValueError, match="rows of up to 32768 numbers, not 32769"):
        norm.rms_norm(wide, wide[0], 1e-5)


class Kernel:
    """In the place of one: remembers how it was launched."""

    def __init__(self):
        self.launches: list[tuple[Any, dict[str, Any]]] = []

    def __getitem__(self, grid):
        return lambda **named: self.launches.append((grid, named))


def test_a_launch_says_everything():
    kernel, x = Kernel(), torch.ones(3)
    launch.run("op", kernel, (3, 2), {"x": x, "N": 3}, 8, 2, fp_fusion=False)
    launch.run("op", kernel, (3, 0), {"x": x, "N": 3}, 8, 2)
    options = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": False}
    assert kernel.launches == [((3, 2), {"x": x, "N": 3, **options})]
    with pytest.raises(ValueError, match="op: a grid of .* has more than 65535 programs"):
        launch.run("op", kernel, (3, 65536), {"x": x}, 8, 2)


def test_the_table_of_tile_sizes():
    rows = [each.rows for each in configs.configs("w4_linear", target("sm_80"))]
    assert rows == sorted(rows)
    few, many = (configs.choose("int8_matmul", target("sm_80"), n) for n in (16, 17))
    assert few.constants["BM"] < many.constants["BM"]
    largest = configs.choose("int8_matmul", target("sm_80"), 10**6)
    assert largest.rows == 0
    with pytest.raises(ValueError, match="no entry for int8_matmul on sm_75"):
        configs.configs("int8_matmul", target("sm_75"))


def recorded(monkeypatch) -> list[tuple[Any, ...]]:
    """What launches are compiled for: kernel, constants, types, divisibility, options. They are
    not run."""
    launches: list[tuple[Any, ...]] = []

    def record(op, kernel, grid, args, num_warps, num_stages, fp_fusion=True):
        if 0 not in grid:
            launches.append(special(kernel, args, (num_warps, num_stages, fp_fusion)))

    monkeypatch.setattr(launch, "run", record)
    return launches


def special(kernel: Any, args: dict[str, Any], options: tuple[Any, ...]) -> tuple[Any, ...]:
    said: list[tuple[str, Any]] = []
    for each in launch.parameters(kernel):
        value = args[each.name]
        if isinstance(value, torch.Tensor):
            said.append((each.name, value.dtype))
        elif each.constant or value is None or (each.special and value == 1):
            said.append((each.name, value))
        elif isinstance(value, int) and each.special:
            said.append((each.name, value % 16 == 0))
    return (kernel.fn.__name__, tuple(said), options)


def tiles(name: str, said: Any, options: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of a launch or a case, what the table of tile sizes chooses."""
    kept = {key: value for key, value in said if key.isupper() and key not in OF_SHAPES}
    return name, tuple(sorted(kept.items())), options


# Constants that follow from a tensor's shape: cases have those of a model's layers.
OF_SHAPES = {"G", "H", "KH", "HALF", "N", "K", "F", "M", "EVEN"}
BY_SHAPE = {"rms_norm_kernel", "rope_kernel"}  # whose tile is as wide as a row


@pytest.mark.parametrize("name", ["sm_80", "sm_75", "gfx1100"])
def test_what_is_launched_is_what_was_compiled(monkeypatch, name):
    """Every launch of the small cases has the tiles of a case that the sweep compiles."""
    chosen = target(name)
    compiled = set()
    for each in [case for part in MODULES for case in shipped(part, chosen)]:
        if isinstance(each, Case):
            options = (each.num_warps, each.num_stages, each.fp_fusion)
            said = [(k, v) for k, v in each.constants.items()]
            compiled.add(tiles(each.kernel.fn.__name__, said, options))
    launches = recorded(monkeypatch)
    with launch.interpreted_as(name):
        for case in OURS:
            for rows in (1, 17):
                try:
                    launcher(case)(*case.make(Source(rows, torch.bfloat16), rows))
                except ValueError as refused:
                    assert "does not run on" in str(refused)
    made = {tiles(*each) for each in launches if each[0] not in BY_SHAPE}
    assert made and made <= compiled, made - compiled


LAYERS = warm.Layers(
    dtype=torch.bfloat16,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    feed_forward=48,
    activation="silu",
    linears=(
        warm.Linear(96, 64, 4, 32, torch.float16, mins=True),
        warm.Linear(32, 64, 8, 32, torch.float16, bias=True),
    ),
)


def test_after_warming_up_nothing_new_is_launched(monkeypatch):
    launches = recorded(monkeypatch)
    extra = []
    done = warm.warm_up(LAYERS, "cpu", others=[lambda: extra.append(1)])
    assert extra == [1] and {each.op for each in done} >= {
        "w4_linear",
        "w8_linear",
        "rope",
        "gated",
    }
    assert done[0].rows == (1, 16, 64, 256, 257)
    warmed = set(launches)
    launches.clear()
    source = Source(0, torch.bfloat16)
    levels = torch.zeros(96, 32, dtype=torch.uint8)
    scales = torch.ones(96, 2, dtype=torch.float16)
    for rows in (1, 2, 7, 16, 33):
        linear_w4.w4_linear(source.normal(rows, 64), levels, scales, scales)
        norm.rms_norm(source.normal(rows, 64), source.normal(64), 1e-6)
        q, k = source.normal(rows, 4, 16), source.normal(rows, 2, 16)
        importlib.import_module("kernels.triton.rope").rope(
            q, k, torch.ones(rows, 8), torch.ones(rows, 8)
        )
        importlib.import_module("kernels.triton.gated").gated(source.normal(rows, 96), "silu")
    assert launches and set(launches) <= warmed
    # Another group is another kernel, and would be noticed.
    linear_w4.w4_linear(source.normal(1, 64), levels, scales[:, :1], None)
    assert not set(launches) <= warmed


def test_what_is_compiled_late_is_told():
    told: list[str] = []
    before = triton.knobs.runtime.jit_post_compile_hook
    info = type("Info", (), {"name": "some_kernel"})
    with warm.late(told.append):
        triton.knobs.runtime.jit_post_compile_hook(fn=info)
    assert told == ["some_kernel"] and triton.knobs.runtime.jit_post_compile_hook is before
