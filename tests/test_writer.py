"""`TickWriter`: when what a channel has to say goes out."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Any, cast

import pytest

from aioworkq.amqp.reader import Tap
from aioworkq.amqp.writer import CallWriter, TickWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine


class Socket:
    """What a writer sees of a `Link`."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.is_full = False
        self.resumed: list[Callable[[], None]] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def when_resumed(self, resume: Callable[[], None]) -> None:
        self.resumed.append(resume)


class Line:
    """A writer, what it has to say, and where it goes."""

    def __init__(self) -> None:
        self.socket, self.tap = Socket(), Tap()
        self.waiting = b""
        self.writer = TickWriter(cast("Any", self.socket), self.tap, self.take)

    def take(self) -> bytes:
        taken, self.waiting = self.waiting, b""
        return taken

    def say(self, data: bytes) -> None:
        self.waiting += data
        self.writer.wake()


async def test_one_write_for_all_of_a_step() -> None:
    """At the next step of the event loop."""
    line = Line()
    line.say(b"a")
    line.say(b"b")
    assert line.socket.written == []
    await asyncio.sleep(0)
    assert line.socket.written == [b"ab"]


async def test_what_is_pushed_goes_out_at_once() -> None:
    """And what follows in the same step goes out at its end."""
    line = Line()
    line.say(b"a")
    line.writer.push()
    line.say(b"b")
    assert line.socket.written == [b"a"]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert line.socket.written == [b"a", b"b"], "and nothing empty"


async def test_nothing_is_pushed_into_a_full_socket() -> None:
    """It stays with us, and goes out once the socket takes it."""
    line = Line()
    line.socket.is_full = True
    line.say(b"a")
    line.writer.push()
    await asyncio.sleep(0)
    assert line.socket.written == []
    line.socket.is_full = False
    for resume in line.socket.resumed:
        resume()
    assert line.socket.written == [b"a"]


async def test_nothing_is_pushed_into_a_closed_channel() -> None:
    """Closed by the broker, or by us."""
    refused, closed = Line(), Line()
    refused.tap.has_close = True
    closed.writer.close()
    for line in (refused, closed):
        line.say(b"a")
        line.writer.push()
        await asyncio.sleep(0)
        assert line.socket.written == []


@pytest.mark.parametrize("error", [OSError("gone"), LookupError("a defect")])
async def test_a_call_that_fails_is_told(error: Exception) -> None:
    """What should have been called after it never is: whoever relies on the channel must know."""
    called, failures = list[int](), list[BaseException]()

    async def call(number: int) -> None:
        called.append(number)
        if number == 2:
            raise error

    waiting: list[Callable[[], Coroutine[Any, Any, None]]] = [
        functools.partial(call, number) for number in (1, 2, 3)
    ]

    def take() -> list[Callable[[], Coroutine[Any, Any, None]]]:
        taken, waiting[:] = waiting[:], []
        return taken

    writer = CallWriter(take, failures.append)
    writer.wake()
    await writer.wait_idle()
    assert (called, failures) == ([1, 2], [error])
    waiting.append(functools.partial(call, 4))
    writer.wake()
    await writer.wait_idle()
    assert called == [1, 2]
