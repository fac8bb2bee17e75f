"""Our plain package names (serve, kernels, models, ...) and other people's packages get along.

transformers asks for a package called `kernels`, Ray has a `serve` of its own, and an import of
either must give theirs, ours importable beside it.
"""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

OURS_FIRST = """
import sys
import cluster, kernels, models, serve
for ours in (cluster, kernels, models, serve):
    assert ours.__file__.startswith(ROOT), ours.__file__
"""

THEIRS = {
    "transformers": """
import transformers
from transformers.utils.import_utils import is_kernels_available
assert "site-packages" in transformers.__file__
assert not is_kernels_available(), "transformers takes our kernels for its own"
from transformers import LlamaConfig, LlamaForCausalLM
import torch
tiny = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                   num_key_value_heads=1, vocab_size=8)
assert LlamaForCausalLM(tiny)(torch.zeros(1, 2, dtype=torch.long)).logits.shape == (1, 2, 8)
""",
    "ray": """
import ray
from ray import serve as ray_serve
assert "site-packages" in ray.__file__ and "site-packages" in ray_serve.__file__
assert ray_serve is not serve and callable(ray_serve.deployment)
""",
}


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_works_beside_ours(name: str):
    code = f"ROOT = {str(ROOT)!r}\n{OURS_FIRST}\n{THEIRS[name]}"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert answer.returncode == 0, answer.stderr


def test_no_distribution_brings_our_names():
    """Another distribution's top-level `serve` or `kernels` would hide ours or be hidden by it."""
    owners = importlib.metadata.packages_distributions()
    for name in ("cluster", "serve", "train", "autoscale", "kernels", "models"):
        assert set(owners.get(name, ())) <= {"sanderling"}, name
