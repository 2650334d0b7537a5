"""Messages that kill their process: how often they are started, and what becomes of the others.

The workers are processes of their own, and die of SIGKILL.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from aioworkq import DeadLetters, Delivery, Message, Producer, Queue, Worker
from aioworkq.message import ATTEMPTS, REASON, TRIAL
from aioworkq.trials import Trials
from tests.consuming import Broker, eventually, headers_of, publish_all

if TYPE_CHECKING:
    from pathlib import Path

    from aioworkq.testing import RabbitMQ
    from aioworkq.topology import QueueType
    from tests.proxy import Proxy

INNOCENT = 15

WORKER = textwrap.dedent("""
    import asyncio, os, signal, sys
    from aioworkq import Delivery, Queue, Worker, run

    url, kind, concurrency, attempts, log, *queues = sys.argv[1:]
    worker = Worker(url)

    def note(*words):
        with open(log, "a") as file:
            print(*words, file=file)

    async def handle(body: str, delivery: Delivery):
        note(body, "starts", delivery.attempt)
        if body == "poison":
            os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.sleep(0.1)
        note(body, "done", delivery.attempt)

    for queue in queues:
        worker.handler(
            Queue(queue, str, type=kind),
            concurrency=int(concurrency),
            prefetch_count=2 * int(concurrency),
            attempts=int(attempts),
        )(handle)
    run(worker)
""")


async def live_and_die(*arguments: object) -> None:
    """Run the worker, and a new one whenever it has died, until cancelled."""
    while True:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WORKER, *map(str, arguments), stderr=asyncio.subprocess.DEVNULL
        )
        try:
            await process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            with anyio.CancelScope(shield=True):
                await process.wait()


@pytest.mark.parametrize("kind", ["quorum", "classic"])
@pytest.mark.parametrize(("concurrency", "attempts"), [(1, 3), (5, 2), (5, 4)])
async def test_the_neighbours_of_a_poison_message(
    broker: Broker,
    url: str,
    queue_name: str,
    tmp_path: Path,
    kind: QueueType,
    concurrency: int,
    attempts: int,
) -> None:
    """Poison is started exactly `attempts` times, then dead-lettered; all the others are handled.

    The neighbours are in its own queue and in another one of the same worker.
    """
    log = tmp_path / "log"
    log.touch()
    own, other = (Queue(f"{queue_name}.{part}", str, type=kind) for part in ("own", "other"))
    innocent = {f"{queue.name} {number}" for queue in (own, other) for number in range(INNOCENT)}
    async with Producer(url) as producer:
        for queue in (own, other):
            await publish_all(producer, queue, [f"{queue.name} {number}" for number in range(3)])
            if queue is own:
                await producer.publish(queue, "poison")
            rest = [f"{queue.name} {number}" for number in range(3, INNOCENT)]
            await publish_all(producer, queue, rest)

    def done() -> set[str]:
        lines = [line.rpartition(" done ") for line in log.read_text().splitlines()]
        return {body for body, found, _ in lines if found}

    names = (own.name, other.name)
    work = asyncio.create_task(live_and_die(url, kind, concurrency, attempts, log, *names))
    try:
        (dead,) = [await broker.take(own.dead_letter_queue, timeout=100)]
        await eventually(lambda: done() == innocent, timeout=100)
    finally:
        work.cancel()
        await asyncio.wait([work])
    assert dead.body == b"poison"
    headers = headers_of(dead)
    assert headers[REASON] == "crashed"
    assert headers[ATTEMPTS] == attempts
    assert TRIAL not in headers
    lines = log.read_text().splitlines()
    starts = [int(line.split()[-1]) for line in lines if line.startswith("poison starts")]
    assert starts == list(range(1, attempts + 1))
    for name in names:  # a crash between a copy and its original's ack leaves two
        assert {again.body for again in await broker.take_all(f"{name}.dead")} <= {b"poison"}
        # What was done in the moment of a crash is to be done once more.
        assert {again.body.decode() for again in await broker.take_all(name)} <= innocent


async def charge(broker: Broker, queue: str, bodies: list[str], *, trial: bool | str) -> None:
    """Publish messages as if their process had died until one attempt of two was left."""
    for number, body in enumerate(bodies):
        headers = {ATTEMPTS: 1, TRIAL: trial} if trial else {}
        await broker.publish(
            queue,
            body.encode(),
            content_type="text/plain",
            message_id=f"{body}-{number}",
            headers=headers,
        )


class Probation:
    """A worker with two queues, on which messages are tried; they run until released."""

    def __init__(self, url: str, queue: str) -> None:
        self.own, self.other = Queue(f"{queue}.own", str), Queue(f"{queue}.other", str)
        self.worker = Worker(url, grace=0.5)
        self.running: list[str] = []
        self.most = 0
        self.attempts: dict[str, list[int]] = {}
        self.release = asyncio.Event()
        for one in (self.own, self.other):
            self.worker.handler(one, concurrency=5, prefetch_count=10, attempts=2)(self.handle)

    async def handle(self, body: str, delivery: Delivery) -> None:
        self.attempts.setdefault(body, []).append(delivery.attempt)
        self.running.append(body)
        self.most = max(self.most, len(self.running))
        try:
            await self.release.wait()
            await asyncio.sleep(0.005)
        finally:
            self.running.remove(body)


async def test_a_trial_is_held_alone(
    rabbitmq: RabbitMQ, broker: Broker, url: str, queue_name: str
) -> None:
    """During a trial the worker holds one message, of all its queues; then it goes on as before."""
    probation = Probation(url, queue_name)
    own, other = probation.own.name, probation.other.name
    async with Producer(url) as producer, probation.worker:
        await charge(broker, own, ["tried"] * 4, trial=True)
        await eventually(lambda: probation.running == ["tried"])
        await publish_all(producer, other, [f"other {number}" for number in range(20)])
        await publish_all(producer, own, [f"own {number}" for number in range(20)])
        assert probation.running == ["tried"]

        async def is_alone() -> bool:
            ready = await broker.ready(own) + await broker.ready(other)
            return ready == 43

        await eventually(is_alone)
        assert probation.worker.statistics().waiting == 0
        probation.release.set()
        await eventually(lambda: len(probation.attempts) == 41)
        await eventually(lambda: probation.worker.statistics().handled == 44)
        assert probation.attempts["tried"] == [2] * 4
        assert probation.most > 1
        # The prefetch is back, in both queues.
        probation.release.clear()
        await publish_all(producer, own, [f"late {number}" for number in range(30)])
        await eventually(lambda: probation.worker.statistics().waiting == 5)
        await eventually(lambda: len(probation.running) == 5)
        probation.release.set()
        await eventually(lambda: probation.worker.statistics().handled == 74)
    assert await broker.ready(own) == await broker.ready(other) == 0
    assert await broker.ready(f"{own}.dead") == 0


async def test_a_trial_waits_for_those_that_run(broker: Broker, url: str, queue_name: str) -> None:
    """A trial begins when the handlers that run have ended, and nothing new is started before."""
    probation = Probation(url, queue_name)
    own, other = probation.own.name, probation.other.name
    async with Producer(url) as producer, probation.worker:
        await publish_all(producer, other, [f"other {number}" for number in range(3)])
        await eventually(lambda: len(probation.running) == 3)
        await charge(broker, own, ["tried"], trial=True)
        await eventually(lambda: probation.worker._consumers[0]._trials.is_on)
        await publish_all(producer, other, ["new"])
        await eventually(lambda: probation.worker.statistics().waiting == 1)
        assert "tried" not in probation.running
        probation.release.set()
        await eventually(lambda: probation.worker.statistics().handled == 5)
    assert probation.attempts["tried"] == [2]


@pytest.mark.parametrize("phase", ["waiting", "running"])
async def test_a_stop_during_a_trial(broker: Broker, url: str, queue_name: str, phase: str) -> None:
    """What is tried when the worker stops goes back uncounted, and is tried again."""
    probation = Probation(url, queue_name)
    async with Producer(url) as producer, probation.worker:
        if phase == "waiting":
            await producer.publish(probation.other, "other")
            await eventually(lambda: probation.running == ["other"])
        await charge(broker, probation.own.name, ["tried"] * 3, trial=True)
        if phase == "waiting":
            await eventually(lambda: probation.worker._consumers[0]._trials.is_on)
        else:
            await eventually(lambda: probation.running == ["tried"])
    assert await broker.ready(probation.own.name) == 3
    again = Probation(url, queue_name)
    again.release.set()
    async with again.worker:
        await eventually(lambda: len(again.attempts.get("tried", [])) == 3)
        await eventually(lambda: again.worker.statistics().handled >= 3)
    assert again.attempts["tried"] == [2] * 3


async def test_a_connection_lost_during_a_trial(
    broker: Broker, proxy: Proxy, proxy_url: str, queue_name: str
) -> None:
    """It is no crash: those that waited are tried again, the one that ran is not run again."""
    probation = Probation(proxy_url, queue_name)
    async with probation.worker:
        await charge(broker, probation.own.name, ["a", "b", "c"], trial=True)
        await eventually(lambda: len(probation.running) == 1)
        proxy.cut()
        await eventually(lambda: probation.worker.statistics().reconnects == 1)
        probation.release.set()
        await eventually(lambda: len(probation.attempts) == 3)
        await eventually(lambda: probation.worker.is_ready)
        await eventually(lambda: probation.worker.statistics().handled == 3)

        async def is_empty() -> bool:
            return await broker.ready(probation.own.name) == 0

        await eventually(is_empty)
    assert probation.attempts == {"a": [2], "b": [2], "c": [2]}
    assert await broker.ready(probation.own.dead_letter_queue) == 0


async def test_failures_are_no_crashes(broker: Broker, url: str, queue_name: str) -> None:
    """A message that fails in this process is never tried alone, up to its last attempt."""
    worker = Worker(url)
    attempts: list[int] = []
    marked: list[Any] = []

    @worker.handler(Queue(queue_name, str), attempts=3)
    async def fail(body: str, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        marked.append(delivery.headers.get(TRIAL))
        raise ValueError(body)

    async with worker, Producer(url) as producer:
        await producer.publish(queue_name, "x")
        dead = await broker.take(f"{queue_name}.dead")
    assert attempts == [1, 2, 3]
    assert marked == [None] * 3
    assert headers_of(dead)[REASON] == "gave up after 3 attempts"


async def test_a_replayed_crash_gets_all_its_attempts(
    broker: Broker, url: str, queue_name: str
) -> None:
    """What crashed and is replayed gets another trial: its mark is only that of the first one."""
    probation = Probation(url, queue_name)
    probation.release.set()
    trials = Trials(probation.worker._connection, timeout=5)
    async with probation.worker:
        mark = Message(b"tried", probation.own.name, headers={TRIAL: "first"})
        await trials.mark(mark)
        await charge(broker, probation.own.name, ["tried"], trial="first")
        await eventually(lambda: probation.worker.statistics().dead_lettered == 1)
        assert not probation.attempts
        async with DeadLetters(url, probation.own) as dead:
            (letter,) = await dead.peek()
            assert (letter.reason, letter.attempts) == ("crashed", 2)
            assert await trials.is_marked(mark)
            assert await dead.replay() == 1
        await charge(broker, probation.own.name, ["tried"], trial="second")
        await eventually(lambda: probation.worker.statistics().handled == 2)
    assert probation.attempts == {"tried": [1, 2]}


async def test_without_the_permission_to_mark_charges_count(
    rabbitmq: RabbitMQ, broker: Broker, url: str, queue_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A user who may not declare the marks has trials all the same, judged by what is charged."""
    await rabbitmq.add_user(queue_name, "secret")
    mine = f"^{queue_name}.*$"
    await rabbitmq.set_permissions(queue_name, vhost=queue_name, configure=mine)
    probation = Probation(url.replace("guest:guest", f"{queue_name}:secret"), queue_name)
    probation.release.set()
    async with probation.worker:
        await charge(broker, probation.own.name, ["tried"], trial=True)
        await eventually(lambda: probation.worker.statistics().handled == 1)
    assert "cannot be marked" in caplog.text
    await charge(broker, probation.own.name, ["crash"], trial=True)
    channel = await broker._open()
    await channel.basic_get(probation.own.name)
    await channel.close()  # it is redelivered from now on, and charged
    again = Probation(url.replace("guest:guest", f"{queue_name}:secret"), queue_name)
    async with again.worker:
        dead = await broker.take(probation.own.dead_letter_queue)
    assert headers_of(dead)[REASON] == "crashed"
    assert not again.attempts
