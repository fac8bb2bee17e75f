"""Experts over several ranks against a loop over tokens: answers, gradients, nothing dropped, no
weight moved by a change of parallelism."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from tests.train.processes import on_ranks
from train.parallel.experts import MODES, Experts, Mode, Placement, Tuner
from train.parallel.routing import route
from train.world import GlooWorld

HIDDEN, FF, TOP_K, TOKENS = 12, 8, 2, 10


def whole(experts: int, one_sided: bool) -> Experts:
    """All experts in one process. one_sided: whose router sends every token to the same ones."""
    torch.manual_seed(3)
    made = Experts(HIDDEN, FF, experts, TOP_K).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if one_sided:
        with torch.no_grad():
            made.router.zero_()
            made.router[-1] = made.router[0] = 1.0
    return made


def tokens(rank: int) -> Tensor:
    """A rank's tokens; ranks have unlike numbers of them."""
    torch.manual_seed(50 + rank)
    return torch.rand(TOKENS + rank, HIDDEN, dtype=torch.float64)


def one_by_one(made: Experts, x: Tensor) -> Tensor:
    """The oracle: each token alone, each of its experts alone."""
    answers = []
    for token in x:
        weights, chosen = (made.router @ token).softmax(0).topk(TOP_K)
        answer = torch.zeros_like(token)
        for weight, expert in zip(weights / weights.sum(), chosen.tolist(), strict=True):
            inner = functional.silu(made.gate[expert] @ token) * (made.up[expert] @ token)
            answer = answer + weight * (made.down[expert] @ inner)
        answers.append(answer)
    return torch.stack(answers)


def wanted(experts: int, size: int, one_sided: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Answers by rank, and gradients of all weights, by the loop over tokens."""
    made = whole(experts, one_sided)
    answers = [one_by_one(made, tokens(rank)) for rank in range(size)]
    sum(answer.square().sum() for answer in answers).backward()  # type: ignore[union-attr]
    return answers, {n: p.grad for n, p in made.named_parameters() if p.grad is not None}


def shared(world: GlooWorld, experts: int, one_sided: bool, modes: list[Mode]) -> dict[str, Any]:
    """This rank's answers and its weights' gradients in each mode, and how many weights changed."""
    made = Experts(HIDDEN, FF, experts, TOP_K, world.group).double()
    made.load_whole(whole(experts, one_sided))
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    x, answers, grads = tokens(world.rank), [], []
    for mode in modes:
        made.zero_grad(set_to_none=True)
        answer, _ = made(x, mode)
        answer.square().sum().backward()
        answers.append(answer.detach().numpy())
        grads.append({n: p.grad.numpy() for n, p in made.named_parameters() if p.grad is not None})
    moved = sum(not torch.equal(before[name], p) for name, p in made.named_parameters())
    return {"answers": answers, "grads": grads, "moved": moved}


def assembled(answers: list[dict[str, Any]], turn: int, name: str, experts: int) -> Tensor:
    """A weight's gradient in one of the modes, of all ranks' shares."""
    shares = [torch.from_numpy(answer["grads"][turn][name]) for answer in answers]
    if name == "router":
        return torch.stack(shares).sum(0)
    slices = Placement.of(experts, len(answers)).slices
    groups = [shares[n : n + slices] for n in range(0, len(shares), slices)]
    return torch.cat([torch.cat(group, 2 if name == "down" else 1) for group in groups])


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("experts", [4, 8, 2])
def test_equals_a_loop_over_tokens_in_every_mode(experts: int, one_sided: bool) -> None:
    """Four ranks with an expert each, with two, and with half of one; with all tokens on the same
    two experts, nothing is dropped. The mode changes every step, and nothing else does."""
    size, modes = 4, [*MODES, *MODES]
    answers = on_ranks(size, shared, experts, one_sided, modes)
    expected, grads = wanted(experts, size, one_sided)
    for rank, answer in enumerate(answers):
        assert answer["moved"] == 0
        for made in answer["answers"]:
            torch.testing.assert_close(torch.from_numpy(made), expected[rank], rtol=0, atol=1e-12)
    for name, grad in grads.items():
        for turn in range(len(modes)):
            made = assembled(answers, turn, name, experts)
            torch.testing.assert_close(made, grad, rtol=0, atol=1e-10)


def test_a_capacity_would_drop() -> None:
    """The mutation: rows beyond an even share left out, as with a capacity of 1, are noticed."""
    made = whole(4, True)
    x = tokens(0)
    answer, routing = made(x)
    full = torch.bincount(routing.experts.flatten(), minlength=4)
    assert int((full - len(x) * TOP_K // 4).clamp(min=0).sum()) > 0
    torch.testing.assert_close(answer, one_by_one(made, x), rtol=0, atol=1e-12)
    kept = x.clone()
    kept[len(x) // 2 :] = 0
    assert (made(kept)[0] - answer).abs().max() > 1e-3


def test_the_balance_loss_is_least_when_experts_are_chosen_alike() -> None:
    even = route(torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64) * 9, 1)
    assert float(even.balance) == pytest.approx(1.0)
    uneven = route(torch.ones(4, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)[:1], 1)
    assert float(uneven.balance) == pytest.approx(1.0)  # one expert: there is no choice
    router = torch.zeros(4, 4, dtype=torch.float64)
    router[2] = 9
    assert float(route(torch.ones(4, 4, dtype=torch.float64), router, 1).balance) > 3.9


def sent(world: GlooWorld, mode: Mode) -> int:
    """Bytes of rows and weights that this rank hands to torch.distributed in a forward pass."""
    made = Experts(HIDDEN, FF, 4, TOP_K, world.group).double()
    made.load_whole(whole(4, False))
    count = 0
    exchange, gather = dist.all_to_all_single, dist.all_gather_single

    def counted_exchange(out: Tensor, tensor: Tensor, *args: Any, **more: Any) -> Any:
        nonlocal count
        count += tensor.nbytes if tensor.is_floating_point() else 0
        return exchange(out, tensor, *args, **more)

    def counted_gather(out: Tensor, tensor: Tensor, *args: Any, **more: Any) -> Any:
        nonlocal count
        count += tensor.nbytes
        return gather(out, tensor, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counted_exchange)
        patch.setattr(dist, "all_gather_single", counted_gather)
        made(tokens(world.rank), mode)
    return count


def test_tokens_cost_by_tokens_and_weights_by_weights() -> None:
    """Rows there and back, top_k each: of all ranks, for what leaves one comes from another."""
    rows = sum(TOKENS + rank for rank in range(4)) * TOP_K
    assert sum(on_ranks(4, sent, "tokens")) == 2 * rows * HIDDEN * 8
    assert on_ranks(4, sent, "weights") == [3 * HIDDEN * FF * 8] * 4


def test_the_tuner_takes_the_fastest_of_each_bucket() -> None:
    """Against the exhaustive best on a made-up cost: rows cost by tokens, weights a fixed price."""
    tuner, right, asked = Tuner(), 0, 0
    cost = {"tokens": lambda n: n * 1.0, "weights": lambda n: 300.0}
    for turn in range(40):
        for count in (64, 128, 512, 2048):
            mode = tuner.choose(count)
            tuner.tell(count, mode, cost[mode](count))
            if turn >= 4:
                asked += 1
                right += mode == min(MODES, key=lambda m: cost[m](count))
    assert right / asked >= 0.9


def test_ranks_that_cannot_share_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="3 ranks cannot share 4 experts evenly"):
        Placement.of(4, 3)
