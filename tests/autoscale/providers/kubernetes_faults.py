"""One spot machine gets its notice, and one thing goes wrong meanwhile: what is counted, and what
goes wrong."""

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from autoscale.providers.kubernetes.view import TOKEN
from tests.autoscale.providers.stage import FLOOR, GROUPS, ON_DEMAND, USER, Stage, stage
from tests.kubernetes_double.faults import Kind
from tests.kubernetes_double.store import At

NOTICE_S = 120.0
STEPS = 18
# Pods: the ingress and three machines, two stopgaps until the three answer, and for the one that
# goes another spot machine and a stopgap.
MADE = 8


@dataclass(frozen=True)
class Outcome:
    """struck: faults that were met. early: the doomed pod was gone before its machine was taken.
    losses: machines that were lost with a replica on them. doubles: launches that more than one pod
    ever answered to; strange: pods that answered to none. Both by the log of the store."""

    made: int
    existing: int
    wanted: int
    orphans: frozenset[str]
    least: int
    least_on_demand: int
    losses: int
    notices: int
    early: bool
    struck: int
    doubles: int
    strange: int

    def wrong(self, fault: "Fault") -> list[str]:
        """What a person would complain about."""
        most = MADE + fault.more
        found = {
            f"{self.made} pods were made, at most {most} are right": self.made > most,
            f"{self.existing} machines exist, not {FLOOR}": self.existing != FLOOR,
            f"the RayCluster asks for {self.wanted}, not {FLOOR}": self.wanted != FLOOR,
            f"orphans: {sorted(self.orphans)}": bool(self.orphans),
            f"{self.least_on_demand} on demand answered": self.least_on_demand < ON_DEMAND,
            f"{self.losses} were lost": self.losses > fault.losses,
            f"{self.notices} notices were told": self.notices != 1,
            "the machine was not given back in time": not self.early,
            f"{self.doubles} launches had two pods": self.doubles > 0,
            f"{self.strange} pods answered to no launch": self.strange > fault.strange,
            "the fault did not strike": fault.strikes and not self.struck,
        }
        return [text for text, so in found.items() if so]


Spoil = Callable[[Stage, int], Awaitable[None]]


async def nothing(_: Stage, __: int) -> None:
    pass


def answers(kind: Kind, *requests: str, times: int = 1) -> Spoil:
    """These requests ("verb resource") fail so, from the notice on and once more from the drain."""

    async def spoil(on: Stage, step: int) -> None:
        if step in (0, 8):
            for request in requests:
                verb, resource = request.split()
                on.double.faults.add(kind, verb, resource, times, USER)

    return spoil


async def budget(on: Stage, step: int) -> None:
    """A disruption budget that lets nobody go for the first two tries to give back."""
    at = At("policy", "v1", "poddisruptionbudgets", "default", "serve")
    if step == 0:
        spec = {"minAvailable": 100, "selector": {"matchLabels": {"app": "sanderling"}}}
        on.double.store.create(at, {"metadata": {"name": "serve"}, "spec": spec})
    if step == 10:
        on.double.store.delete(at)


async def recreates(on: Stage, step: int) -> None:
    """KubeRay makes a new pod for one that only begins to end."""
    on.cluster.recreates = True


async def crash(on: Stage, step: int) -> None:
    """The controller dies right after the notice, and again in the middle of the drain."""
    if step in (1, 9):
        on.controllers.clear()
        on.elections.clear()
        await on.add(f"next-{step}")


async def sleeps(on: Stage, step: int) -> None:
    """The leader of two hangs for a while, and wakes up with its old thoughts."""
    if step == 1:
        on.asleep.add(0)
    if step == 6:
        on.asleep.clear()


@dataclass(frozen=True)
class Fault:
    """spoil: called before each step after the notice. names: controllers. strikes: it is counted
    by the double. more: pods that it may cost beyond MADE; losses: machines, taken by others;
    strange: pods that KubeRay makes by itself. steps: until all is as it was."""

    spoil: Spoil
    names: tuple[str, ...] = ("one",)
    strikes: bool = True
    more: int = 0
    losses: int = 0
    strange: int = 0
    steps: int = STEPS


# A new leader keeps at first as many as it finds, stopgaps and all, and replaces what those lose.
MORE = 8
TWO = ("one", "two")
READS = ("get configmaps", "get rayclusters", "list pods", "list nodes")
WRITES = ("update configmaps", "patch rayclusters", "patch nodes", "patch pods")
FAULTS: Mapping[str, Fault] = {
    "none": Fault(nothing, strikes=False),
    "409 on every write": Fault(answers("409", *WRITES)),
    "410 on every read": Fault(answers("410", *READS)),
    "429 on reads and evictions": Fault(answers("429", *READS, "create pods/eviction")),
    "429 of a disruption budget": Fault(budget, strikes=False),
    "500 on every read": Fault(answers("500", *READS)),
    "500 on every write": Fault(answers("500", *WRITES, "create pods/eviction")),
    "503 for the lease": Fault(answers("503", "get leases", "update leases")),
    "connections that break before": Fault(answers("no answer", *READS, *WRITES)),
    "connections that break after": Fault(answers("lost answer", *WRITES, "create pods/eviction")),
    "KubeRay replaces what ends": Fault(recreates, strikes=False, strange=2),
    "the controller crashes": Fault(crash, strikes=False, more=MORE, steps=45),
    "two controllers": Fault(nothing, TWO, strikes=False),
    "two controllers, the leader hangs": Fault(sleeps, TWO, strikes=False, more=MORE, steps=30),
}


async def play(folder: Path, fault: Fault) -> Outcome:
    """A notice, and what is left STEPS periods later."""
    async with stage(folder, fault.names) as on:
        [doomed] = [name for name in on.existing() if "spot-a" in name]
        node, taken_s = f"node-of-{doomed}", on.clock.now_s() + NOTICE_S
        on.cluster.doom(node, NOTICE_S)
        on.awaited = doomed
        for step in range(fault.steps):
            await fault.spoil(on, step)
            await on.step()
        told = [event.kind for event in on.ledger().events]
        return Outcome(
            on.cluster.made,
            len(on.existing()),
            sum(many for name, many in on.replicas().items() if name != "ingress"),
            frozenset(on.orphans()),
            min(on.seen.answering),
            min(on.seen.on_demand),
            told.count("preempt"),
            told.count("notice"),
            on.gone_s is not None and on.gone_s < taken_s,
            len(on.double.faults.taken),
            *_claims(on),
        )


def _claims(on: Stage) -> tuple[int, int]:
    """Launches that had two pods, and pods that had no launch, ever."""
    tokens: dict[str, str] = {}
    for change in on.double.store.log:
        metadata = change.new["metadata"]
        group = (metadata.get("labels") or {}).get("ray.io/group")
        if change.key[1] == "pods" and group in [each["groupName"] for each in GROUPS]:
            token = (metadata.get("annotations") or {}).get(TOKEN, "")
            tokens[metadata["name"]] = token or tokens.get(metadata["name"], "")
    counts = Counter(filter(None, tokens.values()))
    return sum(many > 1 for many in counts.values()), list(tokens.values()).count("")
