"""Update rules, clipping and schedules against torch's own and against their formulas."""

import copy
import math

import pytest
import torch
from torch import nn

from tests.train.tiny import job
from train.job import OptimizerTable, ScheduleTable
from train.layout import FlatModel
from train.optimizer import build_optimizer, clip
from train.schedule import factor

STEPS = 12
Weights = dict[str, nn.Parameter]


class Net(nn.Module):
    """Matrices and vectors of unlike shapes, in an order that the flat buffer changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.norm = nn.LayerNorm(5)
        self.second = nn.Linear(5, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(torch.tanh(self.norm(self.first(x))))
        return y


def groups(net: nn.Module, decay: float) -> list[dict[str, object]]:
    matrices = [p for p in net.parameters() if p.dim() > 1]
    vectors = [p for p in net.parameters() if p.dim() < 2]
    return [
        {"params": matrices, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def both(table: OptimizerTable, dtype: torch.dtype) -> tuple[Weights, Weights]:
    """Parameters after STEPS clipped steps by ours and by torch's, parameter by parameter."""
    torch.manual_seed(5)
    peer_net = Net().to(dtype)
    net = copy.deepcopy(peer_net)
    flat = FlatModel(net, dtype)
    optimizer = build_optimizer(flat, table)
    parts = groups(peer_net, table.weight_decay)
    peer: torch.optim.Optimizer
    if table.name == "adamw":
        betas = (table.beta1, table.beta2)
        peer = torch.optim.AdamW(
            parts, lr=table.learning_rate, betas=betas, eps=table.epsilon, foreach=False
        )
    elif table.name == "sgd":
        peer = torch.optim.SGD(parts, lr=table.learning_rate, momentum=table.beta1)
    else:
        peer = torch.optim.Adafactor(parts, lr=table.learning_rate, foreach=False)
    for step in range(1, STEPS + 1):
        x = torch.randn(4, 7, dtype=dtype)
        flat.clear_gradient()
        (net(x) ** 2).sum().backward()
        norm = clip(flat.gradient, table.clip_norm)
        optimizer.update(step, table.learning_rate)
        flat.publish()
        peer.zero_grad()
        (peer_net(x) ** 2).sum().backward()
        peer_norm = torch.nn.utils.clip_grad_norm_(peer_net.parameters(), table.clip_norm)
        assert norm == pytest.approx(float(peer_norm), rel=1e-6)
        peer.step()
    return dict(net.named_parameters()), dict(peer_net.named_parameters())


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_updates_are_torchs(name, dtype):
    table = OptimizerTable(name=name, learning_rate=0.02, weight_decay=0.2, clip_norm=0.5)
    mine, theirs = both(table, dtype)
    accuracy = 1e-12 if dtype == torch.float64 else 1e-5
    for key, tensor in theirs.items():
        torch.testing.assert_close(mine[key], tensor, rtol=accuracy, atol=accuracy)


def test_decaying_norms_is_noticed(monkeypatch):
    """The mutation: weight decay on everything."""
    old = FlatModel.__init__

    def everything(self, model, compute):
        old(self, model, compute)
        self.decayed = self.masters.numel()

    monkeypatch.setattr(FlatModel, "__init__", everything)
    table = OptimizerTable(learning_rate=0.02, weight_decay=0.2)
    with pytest.raises(AssertionError):
        mine, theirs = both(table, torch.float64)
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs(momentum: float):
    """Without weight decay, which torch's adds to the gradient instead."""
    table = OptimizerTable(name="sgd", beta1=momentum, weight_decay=0, learning_rate=0.05)
    mine, theirs = both(table, torch.float64)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_sgds_weight_decay_is_of_matrices_alone():
    net = Net()
    before = copy.deepcopy(net)
    table = OptimizerTable(name="sgd", weight_decay=0.1)
    build_optimizer(FlatModel(net, torch.float32), table).update(1, 0.5)
    for mine, old in zip(net.parameters(), before.parameters(), strict=True):
        factor = 1 - 0.5 * 0.1 if old.dim() > 1 else 1.0
        torch.testing.assert_close(mine.detach(), old.detach() * factor)


def test_adafactor_keeps_a_row_and_a_column():
    flat = FlatModel(Net(), torch.float32)
    state = build_optimizer(flat, OptimizerTable(name="adafactor")).tensors()
    assert state["exp_avg_sq_row/first.weight"].shape == (5, 1)
    assert state["exp_avg_sq_column/first.weight"].shape == (1, 7)
    assert sum(t.numel() for t in state.values()) == (5 + 7) + (3 + 5) + 5 + 5 + 5


def test_bfloat16_weights_are_rounded_masters():
    """Masters get the sum of the micro-batches' gradients in float32, and small steps add up."""
    torch.manual_seed(0)
    net = Net()
    flat = FlatModel(net, torch.bfloat16)
    before = flat.masters.clone()
    optimizer = build_optimizer(flat, OptimizerTable(learning_rate=1e-5, weight_decay=0))
    x = torch.randn(4, 7, dtype=torch.bfloat16)
    for step in range(1, 9):
        flat.clear_gradient()
        for part in x.chunk(2):
            (net(part) ** 2).sum().backward()
        assert flat.gradient.dtype == torch.float32 and flat.gradient.norm() > 0
        optimizer.update(step, 1e-5)
        flat.publish()
    assert torch.equal(flat.weights, flat.masters.to(torch.bfloat16))
    moved = (flat.masters - before).abs()
    assert 3e-5 < moved.max() < 1e-4  # 8 steps of about 1e-5 each; bfloat16 alone moves by 1e-3
    assert all(p.dtype == torch.bfloat16 and p.grad is None for p in net.parameters())


def test_schedules_are_their_formulas():
    steps, warmup, final = 100, 10, 0.1
    cosine = ScheduleTable(name="cosine", warmup=0.1, final=final)
    wsd = ScheduleTable(name="wsd", warmup=0.1, decay=0.2, final=final)
    constant = ScheduleTable(name="constant", warmup=0.1)
    for table in (cosine, wsd, constant):
        for step in range(warmup):
            assert factor(table, step, steps) == pytest.approx((step + 1) / warmup)
    peer = torch.optim.lr_scheduler.CosineAnnealingLR(
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), steps - warmup, eta_min=final
    )
    for step in range(warmup, steps):
        peer.optimizer.step()
        peer.step()
        assert factor(cosine, step, steps) == pytest.approx(peer.get_last_lr()[0], abs=1e-12)
        assert factor(constant, step, steps) == 1.0
        fallen = (step - 79) / 20 if step > 79 else 0.0
        assert factor(wsd, step, steps) == pytest.approx(1 - (1 - final) * fallen)
    assert math.isclose(factor(wsd, steps - 1, steps), final)


def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path):
    from tests.train.tiny import corpus, trainer
    from train.world import LocalWorld

    wanted = job()
    training = trainer(wanted, corpus(tmp_path).train)
    with torch.no_grad():
        training.flat.weights[0] = math.nan
    with pytest.raises(ValueError, match="learning_rate"):
        training.step(LocalWorld())
    assert training.step_number == 0
