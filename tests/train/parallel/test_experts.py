"""Experts over several ranks against a loop over tokens: answers, gradients, nothing dropped, no
weight moved by a change of parallelism."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from tests.train.processes import on_ranks
from train.parallel.experts import Experts, Placement, Tuner
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


def shared(world: GlooWorld, experts: int, one_sided: bool, degrees: list[int]) -> dict[str, Any]:
    """This rank's answers and its weights' gradients at each degree; how many weights changed."""
    made = Experts(HIDDEN, FF, experts, TOP_K, world.group).double()
    made.load_whole(whole(experts, one_sided))
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    x, answers, grads = tokens(world.rank), [], []
    for degree in degrees:
        made.zero_grad(set_to_none=True)
        answer, _ = made(x, degree)
        answer.square().sum().backward()
        answers.append(answer.detach().numpy())
        grads.append({n: p.grad.numpy() for n, p in made.named_parameters() if p.grad is not None})
    moved = sum(not torch.equal(before[name], p) for name, p in made.named_parameters())
    return {"answers": answers, "grads": grads, "moved": moved}


def assembled(answers: list[dict[str, Any]], turn: int, name: str, experts: int) -> Tensor:
    """A weight's gradient at one of the degrees, of all ranks' shares."""
    shares = [torch.from_numpy(answer["grads"][turn][name]) for answer in answers]
    if name == "router":
        return torch.stack(shares).sum(0)
    slices = Placement.of(experts, len(answers)).slices
    groups = [shares[n : n + slices] for n in range(0, len(shares), slices)]
    return torch.cat([torch.cat(group, 2 if name == "down" else 1) for group in groups])


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize(("experts", "size"), [(4, 4), (8, 4), (2, 4), (2, 8)])
def test_equals_a_loop_over_tokens_at_every_degree(
    experts: int, size: int, one_sided: bool
) -> None:
    """Ranks with an expert each, with two, with half and with a quarter of one; with all tokens on
    the same two experts, nothing is dropped. The degree of parallelism changes every step, and
    nothing else does."""
    degrees = [*Placement.of(experts, size).degrees] * 2
    answers = on_ranks(size, shared, experts, one_sided, degrees)
    expected, grads = wanted(experts, size, one_sided)
    for rank, answer in enumerate(answers):
        assert answer["moved"] == 0
        for made in answer["answers"]:
            torch.testing.assert_close(torch.from_numpy(made), expected[rank], rtol=0, atol=1e-12)
    for name, grad in grads.items():
        for turn in range(len(degrees)):
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


def sent(world: GlooWorld, experts: int, degree: int) -> int:
    """Bytes of rows and weights that this rank hands to torch.distributed in a forward pass."""
    made = Experts(HIDDEN, FF, experts, TOP_K, world.group).double()
    made.load_whole(whole(experts, False))
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
        made(tokens(world.rank), degree)
    return count


def test_tokens_cost_by_tokens_and_weights_by_weights() -> None:
    """Rows there and back, top_k each: of all ranks, for what leaves one comes from another."""
    rows = sum(TOKENS + rank for rank in range(4)) * TOP_K
    assert sum(on_ranks(4, sent, 4, 1)) == 2 * rows * HIDDEN * 8
    assert on_ranks(4, sent, 4, 0) == [3 * HIDDEN * FF * 8] * 4


def test_a_degree_sends_so_many_rows_and_the_rest_of_an_expert() -> None:
    """Two experts of 8 ranks: at r a row goes to r ranks, there and back, and each rank hands its
    quarter of an expert to the 4 / r ranks (itself among them) that have a part together."""
    rows = sum(TOKENS + rank for rank in range(8)) * TOP_K
    quarter = 3 * HIDDEN * FF // 4 * 8
    for degree in (1, 2, 4):
        gathered = 8 * quarter * (4 // degree) if degree < 4 else 0
        assert sum(on_ranks(8, sent, 2, degree)) == 2 * degree * rows * HIDDEN * 8 + gathered


def test_a_degree_that_there_is_not_is_refused() -> None:
    assert Placement.of(2, 8).degrees == (0, 1, 2, 4)
    with pytest.raises(ValueError, match="a degree of parallelism of 3: 0, 1 are accepted"):
        whole(4, False)(tokens(0), 3)


def test_the_tuner_takes_the_fastest_of_each_bucket() -> None:
    """Against the exhaustive best on a made-up cost: a row costs as often as it travels, weights by
    how many are gathered. Each degree is somewhere the best."""
    degrees = Placement.of(2, 8).degrees
    tuner, right, asked = Tuner(degrees), 0, 0
    fixed = {0: 900.0, 1: 300.0, 2: 100.0, 4: 0.0}

    def cost(degree: int, count: int) -> float:
        return degree * count + fixed[degree]

    found: set[int] = set()
    for turn in range(40):
        for count in (16, 128, 512, 2048):
            degree = tuner.choose(count)
            tuner.tell(count, degree, cost(degree, count))
            if turn >= 2 * len(degrees):
                asked += 1
                best = min(degrees, key=partial(cost, count=count))
                right += degree == best
                found.add(best)
    assert right / asked >= 0.9 and found == set(degrees)


def test_ranks_that_cannot_share_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="3 ranks cannot share 4 experts evenly"):
        Placement.of(4, 3)
