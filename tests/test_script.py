"""`aioworkq.run` in real processes: signals, crashes, and what a worker costs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import textwrap
from asyncio.subprocess import PIPE, Process
from typing import TYPE_CHECKING, Final

import pytest

import aioworkq
from aioworkq import Producer, Queue, Worker
from tests.consuming import PATIENCE, Broker, eventually, headers_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from aioworkq.topology import QueueType
    from tests.proxy import Direction, Proxy

TYPES = pytest.mark.parametrize("kind", ["quorum", "classic"])

PRELUDE = """
import asyncio, os, signal, sys, time
import aioworkq
from aioworkq import Delivery, Queue, Worker

def say(*words):
    print(*words, flush=True)

url, name, kind = sys.argv[1:]
queue = Queue(name, type=kind)
worker = Worker(url)
"""


class Script:
    """A worker's script in a process of its own, which says what it does line by line."""

    def __init__(self, process: Process) -> None:
        self.process = process

    async def line(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            return (await self.process.stdout.readline()).decode().strip()

    async def ended(self) -> int:
        async with asyncio.timeout(PATIENCE):
            return await self.process.wait()

    async def logs(self, text: str) -> None:
        """Wait until it has logged a line with a text."""
        assert self.process.stderr is not None
        async with asyncio.timeout(PATIENCE):
            while text.encode() not in (line := await self.process.stderr.readline()):
                assert line, f"it ended without {text!r}"

    async def errors(self) -> str:
        assert self.process.stderr is not None
        return (await self.process.stderr.read()).decode()


@contextlib.asynccontextmanager
async def script(url: str, queue: Queue[object], source: str) -> AsyncGenerator[Script, None]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-X", "dev", "-W", "error", "-c", PRELUDE + textwrap.dedent(source)),
        *(url, queue.name, queue.type),
        stdout=PIPE,
        stderr=PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        yield Script(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
        process._transport.close()  # type: ignore[attr-defined] # or its end is never awaited


SLOW = """
@worker.handler(queue)
async def slow(seconds: float) -> None:
    say("started")
    try:
        await asyncio.sleep(seconds)
        say("ended")
    except asyncio.CancelledError:
        say("cancelled")
        raise

aioworkq.run(worker)
say("over", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_first_signal_drains(
    broker: Broker, url: str, queue_name: str, number: signal.Signals
) -> None:
    """On SIGINT and SIGTERM running handlers end, and the script goes on behind `run`."""
    queue: Queue[object] = Queue(queue_name)
    async with Producer(url) as producer, script(url, queue, SLOW) as worker:
        await producer.publish(queue, 0.5)
        assert await worker.line() == "started"
        worker.process.send_signal(number)
        assert await worker.line() == "ended"
        assert await worker.line() == "over True"
        assert await worker.ended() == 0
        assert "the worker drains" in await worker.errors()
    assert await broker.ready(queue_name) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_second_signal_stops_at_once(
    broker: Broker, url: str, queue_name: str, number: signal.Signals
) -> None:
    """On the second signal running handlers are cancelled, and their messages go back uncharged."""
    queue: Queue[object] = Queue(queue_name)
    async with Producer(url) as producer, script(url, queue, SLOW) as worker:
        await producer.publish(queue, 600)
        assert await worker.line() == "started"
        worker.process.send_signal(number)
        await worker.logs("drains")  # the kernel merges equal signals that are pending
        worker.process.send_signal(number)
        assert await worker.line() == "cancelled"
        assert await worker.line() == "over True"
        assert await worker.ended() == 0
    (left,) = await broker.take_all(queue_name)
    assert "x-aioworkq-attempts" not in headers_of(left)
    assert not headers_of(left).get("x-delivery-count")


async def test_a_signal_while_connecting(url: str, queue_name: str) -> None:
    """A script whose RabbitMQ is not there ends on a signal all the same."""
    nowhere = "amqp://guest:guest@127.0.0.1:1/"
    async with script(nowhere, Queue(queue_name), 'say("go")' + SLOW) as worker:
        assert await worker.line() == "go"
        await worker.logs("Connection attempt")  # it has its signal handlers by then
        worker.process.send_signal(signal.SIGTERM)
        assert await worker.line() == "over True"
        assert await worker.ended() == 0


async def test_an_error_is_raised(url: str, queue_name: str) -> None:
    """What ends the worker leaves `run` as the bare typed error, and the exit status is 1."""
    source = """
    queue = Queue(name, declare=False)
    worker.handler(queue)(print)
    """
    source = """
    @worker.handler(Queue(name, declare=False))
    async def handle(body): ...

    aioworkq.run(worker)
    """
    async with script(url, Queue(queue_name), source) as worker:
        assert await worker.ended() == 1
        errors = await worker.errors()
    last = errors.strip().splitlines()[-1]
    assert last.startswith("aioworkq.errors.TopologyError: queue")
    assert "ExceptionGroup" not in errors


@TYPES
async def test_a_handler_that_kills_its_process(
    broker: Broker, url: str, queue_name: str, kind: QueueType
) -> None:
    """A message that kills its process is started exactly `attempts` times, then dead-lettered."""
    queue: Queue[object] = Queue(queue_name, type=kind)
    source = """
    @worker.handler(queue, attempts=3)
    async def poison(body, delivery: Delivery):
        say("started", delivery.attempt)
        os.kill(os.getpid(), signal.SIGKILL)

    aioworkq.run(worker)
    """
    async with Producer(url) as producer:
        await producer.publish(queue, "x")
    for attempt in (1, 2, 3):
        async with script(url, queue, source) as worker:
            assert await worker.line() == f"started {attempt}"
            assert await worker.ended() == -signal.SIGKILL
    async with script(url, queue, source) as worker:
        dead = await broker.take(queue.dead_letter_queue)
        # The ack of the original comes after the dead letter: let the worker stop in order.
        worker.process.terminate()
        assert await worker.ended() == 0
    assert headers_of(dead)["x-aioworkq-attempts"] == 3
    assert headers_of(dead)["x-aioworkq-reason"] == "crashed"
    assert await broker.ready(queue_name) == 0


FRAMES: Final[dict[tuple[Direction, bytes], str]] = {
    ("to_broker", b"\x00\x3c\x00\x28"): "copy",  # Basic.Publish
    ("to_client", b"\x00\x3c\x00\x50"): "confirm",  # Basic.Ack
    ("to_broker", b"\x00\x3c\x00\x50"): "ack",
}


@TYPES
@pytest.mark.parametrize(("moment", "left"), [("copy", 1), ("confirm", 2), ("ack", 2)])
async def test_killed_between_a_retry_copy_and_the_ack(
    broker: Broker,
    url: str,
    proxy: Proxy,
    proxy_url: str,
    queue_name: str,
    kind: QueueType,
    moment: str,
    left: int,
) -> None:
    """Killed at the copy a worker leaves the original, later both of them, until the ack."""
    queue: Queue[object] = Queue(queue_name, type=kind)
    source = """
    @worker.handler(queue)
    async def handle(body, delivery: Delivery):
        if delivery.attempt == 1:
            say("fails")
            raise aioworkq.RetryLater(0.125)
        # The copy's second or third: RabbitMQ may have handed it to the dead process too.
        say("succeeds")

    aioworkq.run(worker)
    """
    seen = list[str]()
    async with Producer(url) as producer:
        await producer.publish(queue, "x")
    async with script(proxy_url, queue, source) as worker:

        def on_frame(direction: Direction, frame: int, channel: int, payload: bytes) -> bool:
            if moment not in seen and (direction, payload[:4]) in FRAMES:
                seen.append(FRAMES[direction, payload[:4]])
                if moment in seen:
                    worker.process.kill()
            return moment not in seen  # this frame and all that follow get no further

        proxy.on_frame = on_frame
        assert await worker.line() == "fails"
        assert await worker.ended() == -signal.SIGKILL
    assert seen == ["copy", "confirm", "ack"][: len(seen)]
    async with script(url, queue, source) as worker:
        assert [await worker.line() for _ in range(left)] == ["succeeds"] * left
        worker.process.terminate()
        assert await worker.line() == ""
        assert await worker.ended() == 0
    for name in (queue_name, queue.dead_letter_queue):
        assert await broker.ready(name) == 0


async def test_a_second_process_takes_over(broker: Broker, url: str, queue_name: str) -> None:
    """When one of two workers is killed, the other one does its work."""
    queue: Queue[object] = Queue(queue_name)
    async with Producer(url) as producer, script(url, queue, SLOW) as victim:
        await producer.publish(queue, 600)
        assert await victim.line() == "started"
        async with script(url, queue, SLOW.replace("sleep(seconds)", "sleep(0)")) as heir:

            async def both() -> bool:
                return await broker.consumers(queue_name) == 2

            await eventually(both)
            victim.process.kill()
            assert await heir.line() == "started"
            assert await heir.line() == "ended"


async def test_an_idle_worker_is_small(broker: Broker, url: str, queue_name: str) -> None:
    """A process with one idle worker takes less than 60 MB."""
    source = """
    @worker.handler(queue)
    async def handle(body): ...

    aioworkq.run(worker)
    """
    async with script(url, Queue(queue_name), source) as worker:

        async def subscribed() -> bool:
            return await broker.exists(queue_name) and await broker.consumers(queue_name) == 1

        await eventually(subscribed)
        with open(f"/proc/{worker.process.pid}/status") as status:  # noqa: ASYNC230, PTH123
            (line,) = [line for line in status if line.startswith("VmRSS")]
        assert int(line.split()[1]) < 60_000, line


async def test_run_inside_an_event_loop() -> None:
    """Called where a loop runs already, `run` says so."""
    worker = Worker("amqp://guest:guest@127.0.0.1:1/")
    with pytest.raises(RuntimeError):
        aioworkq.run(worker)


def test_run_with_uvloop(url: str, queue_name: str) -> None:
    """`use_uvloop=True` runs the worker on uvloop, and puts the signal handlers back."""
    pytest.importorskip("uvloop")
    worker = Worker(url)
    before = signal.getsignal(signal.SIGTERM)
    loops: list[str] = []

    @worker.handler(queue_name)
    async def handle(body: object) -> None:
        loops.append(type(asyncio.get_running_loop()).__module__)
        worker.stop()

    async def publish() -> None:
        async with Producer(url) as producer:
            await producer.publish(queue_name, "x")

    asyncio.run(publish())
    aioworkq.run(worker, use_uvloop=True)
    assert loops == ["uvloop"]
    assert signal.getsignal(signal.SIGTERM) is before
