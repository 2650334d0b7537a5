"""A cluster of three loses the leader of a quorum queue under load, again and again.

Publishing tasks and a worker know all hosts. The node that the producer is connected to leads the
queue, and is killed; the others elect a new leader. What was confirmed must have been handled in
the end, and nobody but the library does anything about it. The gaps are printed: the longest time
without a confirm, and without a handled message, around each kill.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import re
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import aiormq
import pytest
from pamqp.commands import Basic

from aioworkq import Producer, Queue, Worker, WorkQueueError
from aioworkq.testing import RabbitMQCluster
from aioworkq.versions import semantics_of
from tests.consuming import eventually
from tests.nodes import in_thread, publish, write_down
from tests.publishing import no_complaints

__all__ = ["no_complaints"]

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from aiormq.abc import AbstractChannel

    from aioworkq.testing import RabbitMQ

PUBLISHERS = 10
PATIENCE = 60.0

STATUS = """
    [{{proplists:get_value(<<"Node Name">>, Row),
       proplists:get_value(<<"Raft State">>, Row),
       proplists:get_value(<<"Commit Index">>, Row)}}
     || Row <- rabbit_quorum_queue:status(<<"/">>, <<"{queue}">>)]
"""


class Member(NamedTuple):
    """A copy of a quorum queue: its node's name, what it is, and how far it is."""

    node: str
    state: str
    last: int


async def members_of(queue: str, cluster: RabbitMQCluster) -> list[Member]:
    """Ask a node for all members of a queue; those that are down are left out."""
    node = next(node for node in cluster.nodes if node.is_running)
    printed = await node.eval(STATUS.format(queue=queue))
    rows = re.findall(r"\{(\w+)@localhost,(\w+),(\d+)\}", printed)
    return [Member(name, state, int(last)) for name, state, last in rows]


async def leader_of(queue: str, cluster: RabbitMQCluster) -> RabbitMQ:
    """Wait until a queue has a leader, and return its node."""
    leaders: list[str] = []

    async def found() -> bool:
        members = await members_of(queue, cluster)
        leaders[:] = [member.node for member in members if member.state == "leader"]
        return len(leaders) == 1

    await eventually(found, timeout=PATIENCE)
    by_name = {name_of(node): node for node in cluster.nodes}
    return by_name[leaders[0]]


def name_of(node: RabbitMQ) -> str:
    """Return the name of a node that was started, without its host."""
    assert node._node is not None
    return node._node.name


def host_of(client: Producer | Worker, cluster: RabbitMQCluster) -> RabbitMQ | None:
    """Return the node that a client is connected to; None while it is to none."""
    connection: Any = client._connection
    current = connection._current
    ports = {node.port: node for node in cluster.nodes}
    return None if current is None else ports[current.url.port]


async def lead(queue: str, cluster: RabbitMQCluster, node: RabbitMQ) -> None:
    """Have a queue led by this node's member of it."""
    while (leader := await leader_of(queue, cluster)) is not node:
        ids = [f"{{'%2F_{queue}', {name_of(one)}@localhost}}" for one in (leader, node)]
        await leader.eval(f"ra:transfer_leadership({', '.join(ids)})")


async def all_in_sync(queue: str, cluster: RabbitMQCluster) -> None:
    """Wait until each member has what any member has now."""
    goal = max(member.last for member in await members_of(queue, cluster))

    async def reached() -> bool:
        members = await members_of(queue, cluster)
        return len(members) == len(cluster.nodes) and all(
            member.state in {"leader", "follower"} and member.last >= goal for member in members
        )

    await eventually(reached, timeout=PATIENCE)


class Log:
    """What was confirmed and handled, and when."""

    def __init__(self) -> None:
        self.confirmed: dict[int, float] = {}
        self.handled: dict[int, float] = {}
        self.runs: Counter[int] = Counter()
        self.errors: Counter[str] = Counter()
        self.published = 0

    @property
    def lost(self) -> set[int]:
        return self.confirmed.keys() - self.handled.keys()

    async def publish(self, producer: Producer, queue: Queue[int], stop: asyncio.Event) -> None:
        """Publish numbers until told to stop. What fails is not published again."""
        while not stop.is_set():
            self.published += 1
            number = self.published
            try:
                await producer.publish(queue, number)
            except WorkQueueError as exc:
                self.errors[type(exc).__name__] += 1
            else:
                self.confirmed[number] = time.monotonic()
            await asyncio.sleep(random.uniform(0, 0.02))  # a busy producer, not a saturated one

    def goes_on(self, since: int) -> bool:
        """Whether something was handled that was published after number ``since``."""
        return any(number > since for number in reversed(self.handled))


def gap(times: list[float], begin: float) -> float:
    """Return the longest pause between two moments, the later of which is after ``begin``."""
    pairs = itertools.pairwise(times)
    return max(later - earlier for earlier, later in pairs if later >= begin)


@contextlib.asynccontextmanager
async def settled_by(worker: Worker, log: Log) -> AsyncGenerator[None]:
    """Run a worker, and let it handle in the end what was confirmed."""
    async with worker:
        yield
        await eventually(lambda: not log.lost, timeout=PATIENCE)


@pytest.mark.rabbitmq
@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_the_leader_is_killed(
    version: str | None,
    is_long: bool,  # noqa: FBT001 - a fixture
    queue_name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing confirmed is lost; those that were connected to it go on through another host."""
    caplog.set_level(logging.ERROR)
    queue, log, stop = Queue(queue_name, int), Log(), asyncio.Event()
    async with RabbitMQCluster(version=version) as cluster:
        worker = Worker(cluster.urls)

        @worker.handler(queue, concurrency=20)
        async def handle(number: int) -> None:
            log.handled.setdefault(number, time.monotonic())
            log.runs[number] += 1

        async with (
            settled_by(worker, log),
            Producer(cluster.urls) as producer,
            asyncio.TaskGroup() as tasks,
        ):
            for _ in range(PUBLISHERS):
                tasks.create_task(log.publish(producer, queue, stop))
            for number in range(10 if is_long else 2):
                await eventually(log.goes_on, log.published, timeout=PATIENCE)
                await eventually(lambda: all(host_of(one, cluster) for one in (producer, worker)))
                node = host_of(producer, cluster)
                assert node is not None
                await lead(queue_name, cluster, node)
                cut_off = [one for one in (producer, worker) if host_of(one, cluster) is node]
                was_used = producer.statistics().reconnects, worker.statistics().reconnects
                await write_down(node)
                killed, published = time.monotonic(), log.published
                await node.kill()
                await eventually(log.goes_on, published + PUBLISHERS, timeout=PATIENCE)
                print(
                    f"kill {number}: {gap(list(log.confirmed.values()), killed):.2f} s without a "
                    f"confirm, {gap(list(log.handled.values()), killed):.2f} s without a handled "
                    f"message; reconnected: "
                    f"producer {producer.statistics().reconnects - was_used[0]}, "
                    f"worker {worker.statistics().reconnects - was_used[1]}; "
                    f"cut off: {', '.join(type(one).__name__ for one in cut_off)}; "
                    f"errors so far: {dict(log.errors)}",
                )
                for client in cut_off:  # and nobody has told it
                    assert host_of(client, cluster) in set(cluster.nodes) - {node}
                await node.start()
                await all_in_sync(queue_name, cluster)
            stop.set()
        again = sum(runs > 1 for runs in log.runs.values())
        print(f"{cluster.nodes[0].version}: {len(log.confirmed)} confirmed, {again} run twice")
    assert not log.lost


async def is_taken(channel: AbstractChannel, queue: str) -> bool:
    """Publish a message, and return whether it is confirmed, not refused."""
    try:
        confirm = await channel.basic_publish(b"x", routing_key=queue, mandatory=True)
    except aiormq.exceptions.DeliveryError:
        return False
    return isinstance(confirm, Basic.Ack)


@pytest.mark.rabbitmq
@pytest.mark.slow
async def test_a_channel_that_first_published_without_a_leader(
    version: str | None, queue_name: str
) -> None:
    """Before RabbitMQ 4.0 it is refused still when there is a leader, while others are not.

    This is the cell `keeps_refusing` of the table of versions. Two of three nodes are killed, so
    that there is no leader, and only the one comes back that was none.
    """
    async with RabbitMQCluster(version=version) as cluster:
        keeps_refusing = semantics_of(cluster.nodes[0].version).keeps_refusing
        await in_thread(publish, cluster.nodes[0].url, queue_name, b"x", "quorum")
        await all_in_sync(queue_name, cluster)
        leader = await leader_of(queue_name, cluster)
        client, other = (node for node in cluster.nodes if node is not leader)
        for node in cluster.nodes:
            await write_down(node)
        async with asyncio.timeout(PATIENCE), await aiormq.connect(client.url) as connection:
            channel = await connection.channel()
            await leader.kill()
            await other.kill()
            first = asyncio.create_task(is_taken(channel, queue_name))
            if keeps_refusing:
                assert not await first  # later versions let it wait
            await other.start()
            assert await leader_of(queue_name, cluster) is not leader
            assert await is_taken(await connection.channel(), queue_name)
            assert await is_taken(channel, queue_name) is not keeps_refusing
            assert await first is not keeps_refusing
