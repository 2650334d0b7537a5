"""Trials: one message alone, and what becomes of the others when that takes long."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

import pytest

from aioworkq import MemoryBroker, Producer, Worker, trials
from aioworkq.message import TRIAL, Message
from aioworkq.trials import Trials
from tests.consuming import eventually
from tests.publishing import publish_as_another_client

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from aioworkq.settle import Unsettled


MESSAGE = cast("Unsettled", None)
"""Only handed on to the members."""


class Member:
    """A consumer that notes whether it takes deliveries; each of its calls takes a few steps."""

    def __init__(self) -> None:
        self.is_paused = False
        self.calls = list[str]()
        self.slowness = 4

    async def pause(self, *, keep: Unsettled) -> None:
        await self._steps()
        self.is_paused = True
        self.calls.append("pause")

    async def resume(self) -> None:
        for _ in range(self.slowness):
            await asyncio.sleep(0)
        self.is_paused = False
        self.calls.append("resume")

    async def wait_idle(self) -> None:
        await self._steps()

    async def _steps(self) -> None:
        for _ in range(4):
            await asyncio.sleep(0)


@pytest.fixture
def members() -> list[Member]:
    return [Member(), Member()]


@pytest.fixture
async def some_trials(
    members: list[Member], monkeypatch: pytest.MonkeyPatch
) -> AsyncGenerator[Trials]:
    monkeypatch.setattr(trials, "_LONGEST", 0.05)
    connected = MemoryBroker().connection(name="test", owner="worker", max_message_size=1000)
    await connected.start()
    some = Trials(connected, timeout=5)
    for member in members:
        some.join(member)
    yield some
    await connected.aclose(timeout=5)


@pytest.mark.parametrize("steps", range(15))
async def test_a_trial_that_ends_when_patience_does(
    some_trials: Trials, members: list[Member], steps: int
) -> None:
    """Whichever step it ends in, all others go on, once, and are not cancelled on their way."""

    async def run() -> None:
        while some_trials.is_on:
            await asyncio.sleep(0)
        for _ in range(steps):
            await asyncio.sleep(0)

    await some_trials.run_alone(MESSAGE, run)
    assert [member.calls for member in members] == [["pause", "resume"]] * 2
    assert not some_trials.is_on


async def test_a_trial_that_is_cancelled_lets_the_others_go_on(
    some_trials: Trials, members: list[Member]
) -> None:
    """In each of its steps."""

    async def run() -> None:
        await asyncio.Event().wait()

    for steps in range(25):
        task = asyncio.create_task(some_trials.run_alone(MESSAGE, run))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not any(member.is_paused for member in members)
        assert not some_trials.is_on


async def test_the_next_trial_waits_no_longer_than_the_others(
    some_trials: Trials, members: list[Member]
) -> None:
    """One that runs on, though nobody waits for it any more, holds up no other one."""
    may_end, begun = asyncio.Event(), asyncio.Event()

    async def long() -> None:
        begun.set()
        await may_end.wait()

    async def short() -> None:
        assert all(member.is_paused for member in members)

    first = asyncio.create_task(some_trials.run_alone(MESSAGE, long))
    await begun.wait()
    async with asyncio.timeout(10):
        await some_trials.run_alone(MESSAGE, short)
    assert not first.done()
    may_end.set()
    await first
    assert [member.calls for member in members] == [["pause", "resume"] * 2] * 2


async def test_a_short_trial_ends_before_the_next_one_begins(
    some_trials: Trials, members: list[Member]
) -> None:
    """However slow the others are to go on: none is paused and resumed at the same time."""

    async def run() -> None:
        assert all(member.is_paused for member in members)

    members[0].slowness = 200
    async with asyncio.TaskGroup() as group:
        for _ in range(5):
            group.create_task(some_trials.run_alone(MESSAGE, run))
    assert [member.calls for member in members] == [["pause", "resume"] * 5] * 2


async def test_the_others_have_as_much_time_as_a_trial(some_trials: Trials) -> None:
    """Before the next one begins."""
    moments: list[float] = []
    loop = asyncio.get_running_loop()

    async def run() -> None:
        moments.append(loop.time())
        await asyncio.sleep(0.02)
        moments.append(loop.time())

    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(some_trials.run_alone(MESSAGE, run))
    assert moments[2] - moments[1] >= moments[1] - moments[0] - 0.001
    assert moments[4] - moments[3] >= moments[3] - moments[2] - 0.001


async def test_two_suspects_in_one_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first runs on; the second has its trial, and then what came after them is handled."""
    monkeypatch.setattr(trials, "_LONGEST", 0.05)
    broker = MemoryBroker()
    worker, handled, may_end = Worker(broker), list[str](), asyncio.Event()

    @worker.handler("q", concurrency=10)
    async def handle(body: str) -> None:
        handled.append(body)
        if body == "long":
            await may_end.wait()

    async with Producer(broker) as producer:
        await producer.publish("q", "first")  # and declare the queue
        for body in (b"long", b"short"):
            message = Message(body, "q", headers={TRIAL: True}, content_type="text/plain")
            await publish_as_another_client(broker, message)
        async with worker:
            await eventually(lambda: handled)
            for number in range(3):
                await producer.publish("q", f"later {number}")
            await eventually(lambda: len(handled) == 6)
            may_end.set()
    assert handled[:3] == ["first", "long", "short"]
