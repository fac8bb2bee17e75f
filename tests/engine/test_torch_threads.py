"""What a step on a CPU asks of torch: nothing that torch might share among threads of its own,
which would wait for cores on which the kernels' threads still spin."""

from types import TracebackType

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from serve.engine.sampler import Draw, sample
from serve.engine.sequence import Sampling
from tests.models.sequences import Sequences
from tests.models.test_packed import Twins

# Of a row or of none; views, what .numpy() asks, and constants.
SMALL = {"index_select", "slice", "detach", "alias", "view", "lift_fresh"}
SMALL |= {"to", "resolve_conj", "resolve_neg"}


class Asked(TorchDispatchMode):
    """Records which operations are called, in `names`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self.names = {name for name in self.names if not name.startswith("sanderling_cpu::")}


def test_a_step_of_several_sequences_shares_no_work_of_torch(monkeypatch):
    sequences = Sequences(Twins().packed, 3, 60)
    decoder, asked = sequences.decoder, Asked()

    def watched(batch, kv):
        with asked:
            return decoder(batch, kv)

    monkeypatch.setattr(sequences, "decoder", watched)
    sequences.step([(0, [1] * 40), (1, [2] * 9), (2, [3])])
    assert "index_select" in asked.names  # it was watched
    assert asked.names <= SMALL


def test_the_likeliest_tokens_are_found_without_torch():
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    logits[2, 7] = logits[2, 130] = 9.0
    draws = [Draw(Sampling(temperature=0.0), position) for position in range(4)]
    with Asked() as asked:
        tokens = sample(logits, draws)
    rows = logits.tolist()
    assert tokens == [row.index(max(row)) for row in rows] and tokens[2] == 7
    assert asked.names <= SMALL


def test_the_watch_sees_what_torch_would_share():
    with Asked() as asked:
        torch.ones(3).cos().argmax()
    assert {"cos", "argmax"} <= asked.names
