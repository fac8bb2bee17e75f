"""EC2 as a provider (contract: autoscale/providers/provider.py).

What is held is asked of EC2 each time, by the tag of the cluster: a controller that crashes, or a
second one that takes over, knows every machine, its launch and its notice. Machines that are ours
by that tag and that no launch can have made are ended.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from autoscale.catalog.catalog import PricedCatalog
from autoscale.catalog.offer import Offer
from autoscale.providers.aws import fleet, instances, marks
from autoscale.providers.aws.books import Books
from autoscale.providers.aws.calls import Calls
from autoscale.providers.aws.errors import ACCESS, NO_SUCH_MACHINE, RETRY_S, code_of, refusal
from autoscale.providers.aws.fleet import Template
from autoscale.providers.aws.instances import Instance
from autoscale.providers.aws.notices import Letter, Notice, Queue
from autoscale.providers.aws.sale import Sale
from autoscale.providers.provider import LaunchRefused, Machine, MachineState
from autoscale.spot.events import SpotEvent
from cluster.clock import Clock

LOG = logging.getLogger(__name__)
VISIBLE_S = 300.0  # by then a machine that was made is listed, or never will be
ORPHAN_S = 600.0  # how old a machine without a launch must be before it is ended
REFUSALS_KEPT = 4096


@dataclass(frozen=True)
class Ask:
    """A launch without an answer yet: it is asked for again word by word."""

    offer: str
    request: dict[str, Any]
    since_s: float


class Look(NamedTuple):
    """deaf: why the queue could not be read."""

    rows: list[Instance]
    deaf: Exception | None


@dataclass
class Pending:
    """What EC2 has answered and does not list yet. asks: by token. refused: how often, by token.
    made, ended: by id. dooms: times that no tag says yet."""

    asks: dict[str, Ask] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    made: dict[str, Instance] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    dooms: dict[str, dict[str, float]] = field(default_factory=dict)


class AwsProvider:
    """Implements `Provider`. wall: the calendar's time; rebalance_s: after how long a machine is
    given up that EC2 holds likely to be taken, 0 for never."""

    def __init__(
        self,
        calls: Calls,
        sale: Sale,
        queue: Queue,
        books: Books,
        template: Template,
        clock: Clock,
        wall: Callable[[], float],
    ) -> None:
        self.calls, self.sale, self.queue, self.books = calls, sale, queue, books
        self.template, self.clock, self.wall = template, clock, wall
        self.cluster = sale.settings.cluster
        self.rebalance_s = sale.settings.rebalance_s
        self._pending = Pending()
        self._looking: asyncio.Future[Look] | None = None

    async def offers(self) -> Sequence[Offer]:
        return await self.sale.offers()

    async def catalog(self, hours: float) -> PricedCatalog:
        """Kinds, offers and spot prices of the last hours, for planners; times on our clock."""
        return await self.sale.catalog(hours, self.books.offset_s)

    async def launch(self, offer: Offer, token: str) -> Machine:
        if not 1 <= len(token) <= marks.MOST_CHARS:
            raise ValueError(f"token {token!r}: 1 to {marks.MOST_CHARS} characters are accepted")
        rows = await self._list()
        known = next((row for row in rows if row.token == token), None)
        if known is not None:
            if known.offer != offer.name:
                raise ValueError(f"{token!r} stands for a machine of {known.offer!r} already")
            return self._machine(known)
        doubt = token in self._pending.asks  # an earlier call may have made the machine
        ask = self._asked(offer, token, rows)
        try:
            answer = await self.calls.one("ec2", "create_fleet", **ask.request)
            made = fleet.instance_of(answer)
        except Exception as error:
            refused = _refused(error, doubt)
            if refused is None:
                raise
            self._note_refusal(token, offer, refused, rows)
            raise refused from error
        return self._note_made(made, offer, token, rows)

    async def terminate(self, machine_id: str) -> None:
        try:
            await self.calls.one("ec2", "terminate_instances", InstanceIds=[machine_id])
        except Exception as error:
            code = code_of(error)
            if code in NO_SUCH_MACHINE and machine_id not in self._pending.made:
                return
            # A machine that is not ours, or is none, can't be told from one that we may not end.
            if code in ACCESS and all(row.id != machine_id for row in await self._list()):
                return
            raise
        self._pending.ended.add(machine_id)

    async def machines(self) -> Sequence[Machine]:
        return [self._machine(row) for row in (await self._look()).rows]

    async def events(self, cursor: int) -> tuple[Sequence[SpotEvent], int]:
        look = await self._look()
        if look.deaf is not None:
            raise look.deaf
        return tuple(self.books.events[cursor:]), len(self.books.events)

    async def _look(self) -> Look:
        """What there is and what follows from it. Who asks while somebody looks gets the same."""
        while self._looking is not None:
            looking = self._looking
            try:
                return await asyncio.shield(looking)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not looking.cancelled() or (task and task.cancelling()):
                    raise  # it is we who were cancelled, not who looked
                await asyncio.sleep(0)
        self._looking = asyncio.ensure_future(self._see())
        try:
            return await self._looking
        finally:
            self._looking = None

    async def _see(self) -> Look:
        letters, deaf = await self._mail()
        rows = await self._list()
        done = [one for one in letters if not one.notice or await self._hear(one.notice, rows)]
        try:
            await self.queue.burn(done)
        except Exception as error:  # they come again, and are known by then
            LOG.warning("messages of the queue could not be deleted: %s", error)
        self._note(rows)
        await self._end_orphans(rows)
        return Look(rows, deaf)

    async def _mail(self) -> tuple[Sequence[Letter], Exception | None]:
        try:
            return await self.queue.receive(), None
        except Exception as error:
            LOG.warning("the queue of notices could not be read: %s", error)
            return (), error

    async def _list(self) -> list[Instance]:
        """All of the cluster, those that EC2 does not list yet among them; oldest first."""
        ours = [{"Name": f"tag:{marks.CLUSTER}", "Values": [self.cluster]}]
        pages = await self.calls.every("ec2", "describe_instances", "Reservations", Filters=ours)
        rows = {row.id: row for row in instances.read(pages)}
        now_s, pending = self.wall(), self._pending
        for name, row in list(pending.made.items()):
            if name in rows or now_s - row.launched_s > VISIBLE_S:
                del pending.made[name]
                if name not in rows:
                    LOG.warning("%s was made and is not listed after %g s", name, VISIBLE_S)
        tokens = {row.token for row in rows.values()}
        pending.asks = {
            token: ask
            for token, ask in pending.asks.items()
            if token not in tokens and now_s - ask.since_s <= VISIBLE_S
        }
        rows |= {name: row for name, row in pending.made.items() if name not in rows}
        pending.ended = {name for name in pending.ended if name in rows and rows[name].held}
        for name in pending.ended:
            reason = instances.BY_OUR_HAND[0]
            rows[name] = replace(rows[name], state="shutting-down", reason=reason)
        return sorted(rows.values(), key=lambda row: (row.launched_s, row.id))

    def _asked(self, offer: Offer, token: str, rows: Sequence[Instance]) -> Ask:
        """The request of a token: as it was, where its answer was lost. LaunchRefused where there
        can be none."""
        pending = self._pending
        if token in pending.asks:
            if pending.asks[token].offer != offer.name:
                raise ValueError(f"{token!r} is asked for as {pending.asks[token].offer!r} already")
            return pending.asks[token]
        mix = self.sale.mixes.get(offer.name)
        if mix is None:
            names = ", ".join(self.sale.mixes) or "none before the first call of offers()"
            raise LaunchRefused(
                "invalid", RETRY_S["invalid"], f"no offer {offer.name!r}; there are {names}"
            )
        asked = sum(ask.offer == offer.name for ask in pending.asks.values())
        held = _held([*rows, *pending.made.values()], offer.name)
        if mix.offer.quota is not None and held + asked >= mix.offer.quota:
            raise LaunchRefused(
                "quota", RETRY_S["quota"], f"{offer.name}: the quota is {mix.offer.quota}"
            )
        times = pending.refused.get(token, 0)
        request = fleet.request(mix, self.template, self.cluster, token, times)
        pending.asks[token] = Ask(offer.name, request, self.wall())
        return pending.asks[token]

    def _note_refusal(
        self, token: str, offer: Offer, refused: LaunchRefused, rows: Sequence[Instance]
    ) -> None:
        pending, now_s = self._pending, self.wall()
        if pending.asks.pop(token, None) is None:
            return  # a call beside this one has heard the same answer
        pending.refused[token] = pending.refused.get(token, 0) + 1
        while len(pending.refused) > REFUSALS_KEPT:
            del pending.refused[next(iter(pending.refused))]
        if refused.kind == "capacity":
            key = f"launch_fail/{token}/{pending.refused[token]}/{now_s:.3f}"
            self.books.tell(key, now_s, offer.name, "launch_fail", _held(rows, offer.name))

    def _note_made(self, made: str, offer: Offer, token: str, rows: Sequence[Instance]) -> Machine:
        pending, now_s = self._pending, self.wall()
        pending.asks.pop(token, None)
        pending.refused.pop(token, None)
        spot = offer.market == "spot"
        known = pending.made.get(made)
        row = known or Instance(made, "pending", offer.name, token, now_s, spot=spot)
        pending.made[made] = row
        held = _held([*rows, *pending.made.values()], offer.name)
        self.books.tell(f"launch_ok/{made}", now_s, offer.name, "launch_ok", held)
        return self._machine(row)

    async def _hear(self, notice: Notice, rows: Sequence[Instance]) -> bool:
        """Whether a notice is done with. It is written on the machine, for whoever comes after."""
        row = next((row for row in rows if row.id == notice.instance), None)
        if row is None:
            return self.wall() - notice.at_s > VISIBLE_S  # another's machine, or one not listed yet
        known = self._times(row).get(notice.tag)
        written = row.times.get(notice.tag)
        earliest_s = notice.at_s if known is None else min(known, notice.at_s)
        self._pending.dooms.setdefault(row.id, {})[notice.tag] = earliest_s
        if not row.held or (written is not None and written <= earliest_s + 1.0):
            return True
        tag = {"Key": notice.tag, "Value": marks.written(earliest_s)}
        try:
            await self.calls.one("ec2", "create_tags", Resources=[row.id], Tags=[tag])
        except Exception as error:  # it is known here, and the message comes again
            LOG.warning("the notice of %s could not be written: %s", row.id, error)
            return False
        return True

    def _note(self, rows: Sequence[Instance]) -> None:
        """Events that follow from the listing, each once."""
        now_s, listed = self.wall(), {row.id for row in rows}
        dooms = self._pending.dooms
        self._pending.dooms = {name: told for name, told in dooms.items() if name in listed}
        for row in (row for row in rows if row.token):
            self.books.tell(
                f"launch_ok/{row.id}",
                row.launched_s,
                row.offer,
                "launch_ok",
                _held(rows, row.offer),
            )
            doomed_s = self._doomed_s(row)
            if row.held and doomed_s is not None:
                left_s = max(0.0, doomed_s - now_s)
                key = f"notice/{row.id}/{doomed_s:.0f}"
                self.books.tell(key, now_s, row.offer, "notice", left_s)
            if row.lost:
                at_s = now_s if row.ended_s is None else min(now_s, row.ended_s)
                left = _held(rows, row.offer)
                self.books.tell(f"preempt/{row.id}", at_s, row.offer, "preempt", left)

    async def _end_orphans(self, rows: Sequence[Instance]) -> None:
        """Machines with our tag and without a launch, and stopped ones: nobody will use them."""
        for row in rows:
            old = self.wall() - row.launched_s > ORPHAN_S
            if row.state in instances.STOPPED or (row.held and old and not row.token):
                LOG.warning("%s (%s) belongs to no launch or was stopped: ended", row.id, row.type)
                try:
                    await self.terminate(row.id)
                except Exception as error:  # it is tried again at the next look
                    LOG.warning("%s could not be ended: %s", row.id, error)

    def _machine(self, row: Instance) -> Machine:
        doomed_s = self._doomed_s(row)
        state: MachineState = "gone"
        if row.state == "pending":
            state = "pending"
        elif row.state == "running":
            state = "running" if doomed_s is None else "draining"
        ready_s = None
        if row.state == "running" or self.books.knows(f"ready/{row.id}"):
            ready_s = self._at(self.books.first_s(f"ready/{row.id}", self.wall()))
        return Machine(
            row.id,
            row.offer,
            state,
            self._at(row.launched_s),
            ready_s,
            None if doomed_s is None else self._at(doomed_s),
            row.token,
        )

    def _times(self, row: Instance) -> dict[str, float]:
        told = self._pending.dooms.get(row.id, {})
        both = {**row.times, **told}
        return {tag: min(at_s, row.times.get(tag, at_s)) for tag, at_s in both.items()}

    def _doomed_s(self, row: Instance) -> float | None:
        """The calendar time at which a machine goes, or is given up."""
        told = self._times(row)
        ends = [told[marks.DOOMED]] if marks.DOOMED in told else []
        if self.rebalance_s and marks.REBALANCE in told:
            ends.append(told[marks.REBALANCE] + self.rebalance_s)
        return min(ends, default=None)

    def _at(self, calendar_s: float) -> float:
        return round(calendar_s, 3) + self.books.offset_s


def _held(rows: Sequence[Instance], offer: str) -> int:
    return len({row.id for row in rows if row.held and row.offer == offer})


def _refused(error: Exception, doubt: bool) -> LaunchRefused | None:
    """The refusal that an error of create_fleet is; None where its effect is unknown. doubt: an
    earlier call under the same client token was not answered, and only a fleet speaks for it."""
    if isinstance(error, LaunchRefused):
        return error
    code = code_of(error)
    return refusal([(code, str(error))]) if code and not doubt else None
