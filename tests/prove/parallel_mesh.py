"""Proof rows of a model over several ranks: curves of one process, collectives, what is kept, what
crosses the wire, bubbles, experts, unequal shares, and the memory of a ring.

`python -m tests.prove.parallel_mesh FOLDER RANK SIZE TOKENS` is a rank of that ring: it trains one
step on a sequence and tells by how much its memory grew.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from models.config import ModelConfig
from tests.prove.parallel_mesh_job import rows as dry_runs
from tests.prove.row import Row
from tests.prove.suites import Suite, run
from train.parallel.mesh import build_mesh
from train.parallel.mesh_model import MeshLlama
from train.rehearsal import high_water_bytes
from train.world import join

FOLDER = "tests/train/parallel"
MESH, STAGED = f"{FOLDER}/test_mesh.py", f"{FOLDER}/test_staged.py"
SEQUENCE, EXPERTS = f"{FOLDER}/test_sequence.py", f"{FOLDER}/test_experts.py"
SUITES = (
    Suite(
        "dp, tp, sp, ring, ulysses, fsdp, ep and pairs of them on 4 ranks: 20 steps = one process",
        (f"{MESH}::test_equals_one_process_for_twenty_steps",)
        + (f"{MESH}::test_experts_equal_one_process_for_twenty_steps",),
        slow=True,
    ),
    Suite(
        "[mesh] in a job: curve, held-out loss and weights of one worker, by the command",
        ("tests/train/test_mesh_command.py",),
        slow=True,
    ),
    Suite(
        "[mesh]: checkpoints go on at another mesh, at one worker, and back",
        (f"{FOLDER}/test_mesh_job.py",),
        slow=True,
    ),
    Suite(
        "[mesh]: bytes held, kept, sent, at most: within 3, 3, 5, 5 % of the formulas",
        (f"{FOLDER}/test_mesh_cost.py",),
        slow=True,
    ),
    Suite(
        "dp x pp on 4 ranks: 20 steps = one process",
        (f"{STAGED}::test_two_pipelines_equal_one_process_for_twenty_steps",),
    ),
    Suite(
        "TP and SP: kinds and counts of collectives",
        (f"{MESH}::test_collectives_are_those_of_the_papers",),
    ),
    Suite(
        "TP and SP: bytes a layer keeps, t = 1, 2, 4, within 3 % of the formula",
        (f"{MESH}::test_a_layer_keeps_what_the_formula_says",),
    ),
    Suite(
        "GPipe, 1F1B, interleaved: gradients of one process; bubble within 10 % of theory",
        (f"{STAGED}::test_gradients_are_those_of_one_process",)
        + (f"{STAGED}::test_the_bubble_is_what_theory_allows",)
        + (f"{STAGED}::test_an_order_of_one_by_one_is_all_bubble",),
    ),
    Suite("Ulysses and the ring: outputs, gradients, bytes; zigzag <= 1.05", (SEQUENCE,)),
    Suite("MegaBlocks and Tutel: nothing dropped, no weight moved, the tuner", (EXPERTS,)),
    Suite(
        "Experts in a job: one curve, whatever travels; checkpoints; Mixtral in transformers",
        ("tests/train/parallel/test_experts_job.py",),
    ),
    Suite(
        "unequal shares: best of all, the gradient the same; >= 1.25 x at speeds 1 and 0.4",
        ("tests/train/heterogeneous/test_shares.py",),
        slow=True,
    ),
)
RING_RANKS, RING_TOKENS = 4, 16_384
# What a ring needs while it goes round is needed once, whatever the number of layers.
CONFIG = ModelConfig(
    name="ring",
    layers=6,
    hidden=256,
    heads=4,
    kv_heads=4,
    head_dim=64,
    ff=1024,
    vocab=512,
    context_tokens=RING_TOKENS,
    rms_eps=1e-5,
)


def rows() -> Iterator[Row]:
    """Every row of this module; about ten minutes."""
    for suite in SUITES:
        yield run(suite)
    yield ring_memory()
    yield from dry_runs()


def ring_memory() -> Row:
    """Of a rank with S tokens on P ranks, against one rank with S / P."""
    shared = grown(RING_RANKS, RING_TOKENS)
    alone = grown(1, RING_TOKENS // RING_RANKS)
    ratio = max(shared) / alone[0]
    measured = f"{ratio:.3f}: {max(shared) >> 20} MiB, {alone[0] >> 20} MiB alone"
    check = f"ring: memory of {RING_TOKENS} tokens on {RING_RANKS} ranks over a quarter on one"
    return Row(check, "<= 1.10", measured, ratio <= 1.10)


def grown(size: int, tokens: int) -> list[int]:
    """By how many bytes the ranks' memory grew, at most, in a step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.prove.parallel_mesh", folder]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), str(size), str(tokens)], stdout=subprocess.PIPE, text=True
            )
            for rank in range(size)
        ]
        answers = [rank.communicate(timeout=600)[0] for rank in ranks]
    return [int(json.loads(answer)["grown"]) for answer in answers]


def _rank(folder: Path, rank: int, size: int, tokens: int) -> None:
    torch.set_num_threads(1)
    world = join(FileStore(str(folder / "store"), size), rank, size)
    torch.manual_seed(1)
    model = MeshLlama(CONFIG, build_mesh(size, sequence=size), tokens)
    ids = torch.randint(0, CONFIG.vocab, (1, tokens + 1))
    world.barrier()
    before = high_water_bytes()
    model.loss(ids).backward()
    after = high_water_bytes()
    world.barrier()
    print(json.dumps({"grown": after - before}))


if __name__ == "__main__":
    _rank(Path(sys.argv[1]), *map(int, sys.argv[2:]))
