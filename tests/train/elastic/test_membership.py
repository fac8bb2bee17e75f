"""The state machine of who trains, without processes: named cases, and random histories."""

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from train.elastic.membership import JobFailed, Launch, Membership, Order, Policy, Send
from train.elastic.messages import Fence, Finished, Held, Idle, Leave, Plan, Version

REASONS = ("new", "paused", "changed", "gave", "done")


def idle(generation: int, reason: str, step: int, detail: str = "") -> Idle:
    version = Version(step=step, samples=step, shards=1)
    return Idle.model_validate(
        {
            "generation": generation,
            "reason": reason,
            "held": (Held(version=version, index=0),),
            "host": "h",
            "port": 1,
            "detail": detail,
        }
    )


class Stage:
    """A membership, the clock, and workers that do as they are told; each holds whole state."""

    def __init__(self, policy: Policy, machines: tuple[str, ...] = ()) -> None:
        self.members = Membership(policy, machines)
        self.now_s = 0.0
        self.steps: dict[str, int] = {}
        self.starting: list[str] = []
        self.plans: list[Plan] = []
        self.sent: list[Order] = []
        self.obey()

    def obey(self) -> None:
        for order in self.members.orders(self.now_s):
            self.sent.append(order)
            if isinstance(order, Launch):
                self.starting.append(order.worker)
            elif isinstance(order.message, Plan):
                if order.worker == order.message.ranks[0]:
                    self.plans.append(order.message)
                assert order.message.version is not None
                self.steps[order.worker] = order.message.version.step

    def ready(self) -> None:
        """Every starting worker is."""
        while self.starting:
            name = self.starting.pop(0)
            self.steps[name] = 0
            self.members.idle(name, idle(0, "new", 0))
            self.obey()

    def step(self, number: int) -> None:
        """All members of the plan end a step."""
        for name in self.plans[-1].ranks:
            self.steps[name] = number
        generation = self.plans[-1].generation
        self.members.finished(
            Finished(generation=generation, step=number, samples=0, loss=0.0, step_s=1.0)
        )
        self.obey()

    def answer(self, reason: str, *names: str) -> None:
        for name in names:
            self.members.idle(name, idle(self.members.generation, reason, self.steps[name]))
            self.obey()

    def lose(self, name: str) -> None:
        self.members.lost(name)
        self.obey()

    def fences(self, hard: bool) -> set[str]:
        return {
            order.worker
            for order in self.sent
            if isinstance(order, Send)
            and order.message == Fence(generation=self.members.generation, hard=hard)
        }

    def left(self) -> set[str]:
        return {o.worker for o in self.sent if isinstance(o, Send) and o.message == Leave()}


def test_the_first_generation_waits_for_all_but_not_for_ever():
    stage = Stage(Policy(3, start_s=60))
    assert stage.starting == ["w0", "w1", "w2"]
    late = stage.starting.pop()
    stage.ready()
    assert stage.plans == []
    stage.now_s = 61
    stage.obey()
    assert [plan.ranks for plan in stage.plans] == [("w0", "w1")]
    stage.starting.append(late)
    stage.ready()
    assert stage.fences(hard=False) == {"w0", "w1"}, "the late one joins between two steps"
    stage.answer("paused", "w0", "w1")
    assert stage.plans[-1].ranks == ("w0", "w1", "w2")


def test_a_loss_fences_the_others_and_a_spare_takes_the_rank():
    stage = Stage(Policy(3, spares=1))
    stage.ready()
    assert stage.plans[-1].ranks == ("w0", "w1", "w2")
    stage.step(5)
    stage.lose("w1")
    assert stage.fences(hard=True) == {"w0", "w2"}
    assert len(stage.plans) == 1, "nobody is planned before all have answered"
    stage.answer("changed", "w0", "w2")
    assert stage.plans[-1].ranks == ("w0", "w3", "w2")
    assert stage.plans[-1].holders == ((0, 2),), "the spare has to get the state"
    assert stage.starting == ["w4"], "a new spare starts"


def test_who_notices_first_does_not_matter():
    """A member's group broke before the supervisor heard of the loss: it waits for the dead one's
    answer, and so for its end, and plans without it."""
    stage = Stage(Policy(3, least=1))
    stage.ready()
    stage.step(5)
    stage.answer("changed", "w0")
    assert stage.fences(hard=True) == {"w1", "w2"}
    stage.answer("changed", "w2")
    assert len(stage.plans) == 1
    stage.lose("w1")
    assert stage.plans[-1].ranks == ("w0", "w2")


def test_survivors_wait_for_a_replacement_as_long_as_told():
    stage = Stage(Policy(2, wait_s=10))
    stage.ready()
    stage.lose("w0")
    stage.answer("changed", "w1")
    assert len(stage.plans) == 1
    stage.now_s = 11
    stage.obey()
    assert stage.plans[-1].ranks == ("w1",)


@pytest.mark.parametrize("replaced", [True, False])
def test_the_lost_are_replaced_or_not(replaced: bool):
    """Pipelines whose others take over go on with one fewer, in the old order; but who is lost
    before any training is always replaced."""
    stage = Stage(Policy(3, wait_s=60, replaced=replaced))
    stage.starting.remove("w1")
    stage.lose("w1")
    stage.obey()
    stage.ready()
    assert sorted(stage.plans[-1].ranks) == ["w0", "w2", "w3"]
    stage.step(1)
    lost, *others = stage.plans[-1].ranks
    stage.lose(lost)
    stage.answer("changed", *others)
    assert stage.starting == (["w4"] if replaced else [])
    if not replaced:
        assert stage.plans[-1].ranks == tuple(others) and stage.plans[-1].generation == 2
        stage.lose(others[0])
        stage.answer("changed", others[1])
        assert stage.plans[-1].ranks == (others[1],) and not stage.starting


def test_fewer_than_least_do_not_train():
    stage = Stage(Policy(3, least=2))
    stage.ready()
    stage.lose("w0")
    stage.lose("w1")
    stage.answer("changed", "w2")
    stage.now_s = 1e6
    stage.obey()
    assert len(stage.plans) == 1
    stage.ready()
    assert "w2" in stage.plans[1].ranks


def test_a_notice_pauses_between_steps_and_the_doomed_leaves():
    stage = Stage(Policy(2))
    stage.ready()
    stage.step(3)
    stage.members.notice("w0", 100.0)
    stage.obey()
    assert stage.fences(hard=False) == {"w0", "w1"} and not stage.fences(hard=True)
    stage.answer("paused", "w0", "w1")
    assert stage.plans[-1].ranks == ("w1",) and stage.plans[-1].givers == ()
    assert stage.left() == {"w0"}


def test_a_step_too_long_for_the_notice_is_abandoned():
    stage = Stage(Policy(2, hurry_s=2.0))
    stage.ready()
    stage.members.notice("w0", 10.0)
    stage.obey()
    stage.now_s = 8.5
    stage.obey()
    assert stage.fences(hard=True) == {"w0", "w1"}


def test_a_job_is_finished_only_when_all_members_are():
    stage = Stage(Policy(2))
    stage.ready()
    stage.step(9)
    stage.answer("done", "w0")
    stage.lose("w1")
    assert stage.left() == set() and len(stage.plans) == 2
    assert stage.plans[-1].version == Version(step=9, samples=9, shards=1)
    stage.answer("done", "w0")
    assert stage.members.phase == "finished" and stage.left() == {"w0"}


def test_when_everybody_is_lost_the_report_says_which_steps():
    stage = Stage(Policy(2))
    stage.ready()
    stage.step(7)
    stage.lose("w0")
    stage.lose("w1")
    stage.ready()
    assert stage.plans[-1].lost == ("steps 1 to 7: nobody who is left holds them",)


def test_workers_that_die_at_once_end_the_job():
    stage = Stage(Policy(1, failed_starts=3))
    with pytest.raises(JobFailed, match="3 workers ended while they started"):
        for _ in range(3):
            stage.lose(stage.starting.pop())


def test_a_group_that_always_breaks_ends_the_job_with_its_reason():
    stage = Stage(Policy(2))
    stage.ready()
    with pytest.raises(JobFailed, match="again and again: shapes differ"):
        for _ in range(20):
            for name in ("w0", "w1"):
                generation = stage.members.generation
                stage.members.idle(name, idle(generation, "changed", 0, "shapes differ"))
                stage.obey()


def test_each_machine_has_one_worker():
    stage = Stage(Policy(2), machines=("a", "b"))
    launches = [order for order in stage.sent if isinstance(order, Launch)]
    assert [launch.machine for launch in launches] == ["a", "b"]
    stage.ready()
    stage.lose("w0")
    assert [o.machine for o in stage.sent if isinstance(o, Launch)] == ["a", "b", "a"]


@hypothesis_settings(max_examples=150)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(("lose", "step", "ready", "notice", "resize", "answer", "wait")),
            st.integers(0, 5),
        ),
        max_size=40,
    ),
    st.integers(1, 4),
    st.integers(0, 2),
)
def test_random_histories(history: list[tuple[str, int]], target: int, spares: int):
    """Whatever happens: one generation at a time, nobody in a plan who is lost or busy, and once
    the world is quiet the job trains at its size."""
    stage = Stage(Policy(target, spares=spares, wait_s=5, failed_starts=1000))
    step = 0
    for what, number in history:
        members = stage.members
        names = list(members.workers)
        running = [w.name for w in members.workers.values() if w.state == "running"]
        if what == "lose" and names:
            name = names[number % len(names)]
            stage.starting = [other for other in stage.starting if other != name]
            stage.lose(name)
        elif (
            what == "step"
            and members.phase == "running"
            and len(running) >= len(stage.plans[-1].ranks)
        ):
            step = members.reached + 1
            stage.step(step)
        elif what == "ready":
            stage.ready()
        elif what == "notice" and running:
            members.notice(running[number % len(running)], stage.now_s + 50)
            stage.obey()
        elif what == "resize":
            members.resize(1 + number % 4)
            stage.obey()
        elif what == "answer" and members.phase in ("gathering", "pausing") and running:
            stage.answer("paused", running[number % len(running)])
        elif what == "wait":
            stage.now_s += 3
            stage.obey()
        check(stage)
    quiet(stage)
    assert len(stage.plans[-1].ranks) == stage.members.policy.target
    training = {w.name for w in stage.members.workers.values() if w.state == "running"}
    assert training == set(stage.plans[-1].ranks)


def check(stage: Stage) -> None:
    generations = [plan.generation for plan in stage.plans]
    assert generations == sorted(set(generations))
    if stage.members.phase == "running":
        states = stage.members.workers
        current = stage.plans[-1]
        assert all(name in states and states[name].state != "left" for name in current.ranks)
        assert len(set(current.everyone)) == len(current.everyone)
        assert len(current.ranks) >= stage.members.policy.least


def quiet(stage: Stage) -> None:
    """Everybody answers, starts and leaves, until nothing happens any more."""
    for _ in range(60):
        stage.now_s += 10
        stage.ready()
        for worker in list(stage.members.workers.values()):
            if worker.state == "left":
                stage.lose(worker.name)
            elif worker.state == "running" and stage.members.phase in ("gathering", "pausing"):
                stage.answer("paused", worker.name)
            elif worker.state == "running" and worker.name in stage.plans[-1].givers:
                stage.answer("gave", worker.name)
        stage.obey()
