"""What a confirm channel writes for what is published, and how it keeps account of it."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from typing import TYPE_CHECKING, Any

import pamqp.frame
import pytest
from pamqp import commands as spec
from pamqp.header import ContentHeader

from aioworkq import Message, Producer, Queue
from aioworkq.amqp import wire
from aioworkq.amqp.publish_channel import _LARGE, _PIECE, AmqpPublishChannel
from aioworkq.amqp.transport import Link
from aioworkq.amqp.wire import DEFAULT_FRAME_MAX, encode
from aioworkq.broker import Confirm
from tests.publishing import is_cut_off
from tests.unwired import Unwired

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

PUBLISH_HEAD = struct.pack(">HHH", 60, 40, 0)
A_WRITE = _PIECE // 6
"""So many small messages are written together while more are published in the same step."""


class Sent:
    """A publication, as far as a channel asks it, and its outcome."""

    def __init__(self, number: int, outcomes: dict[int, Confirm], body: bytes = b"body") -> None:
        self.message = Message(body, "q", message_id=f"m{number}")
        self.wire = encode(self.message, frame_max=DEFAULT_FRAME_MAX, max_message_size=2**20)
        self._number = number
        self._outcomes = outcomes

    def settle(self, confirm: Confirm, reason: str = "") -> None:
        assert self._number not in self._outcomes, "settled once"
        self._outcomes[self._number] = confirm


class Counting(dict[int, Any]):
    """Counts the keys that are looked at."""

    touched = 0

    def __iter__(self) -> Iterator[int]:
        for key in super().__iter__():
            self.touched += 1
            yield key

    def __getitem__(self, key: int) -> Any:
        self.touched += 1
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.touched += 1
        return super().__contains__(key)

    def get(self, key: int, default: Any = None) -> Any:
        self.touched += 1
        return super().get(key, default)

    def pop(self, key: int, *default: Any) -> Any:
        self.touched += 1
        return super().pop(key, *default)

    def copy(self) -> Any:
        self.touched += len(self)
        return super().copy()

    def keys(self) -> Any:
        self.touched += len(self)
        return super().keys()

    def values(self) -> Any:
        self.touched += len(self)
        return super().values()

    def items(self) -> Any:
        self.touched += len(self)
        return super().items()


class Line:
    """A confirm channel without a broker, and the outcomes of what was sent on it."""

    def __init__(self) -> None:
        self.wire = Unwired()
        self.outcomes: dict[int, Confirm] = {}
        self.channel = AmqpPublishChannel(
            self.wire.channel, link=self.wire.link, frame_max=DEFAULT_FRAME_MAX
        )

    def send(self, first: int, last: int, body: bytes = b"body") -> None:
        for number in range(first, last + 1):
            publication: Any = Sent(number, self.outcomes, body)
            self.channel.send(publication)

    @property
    def sizes(self) -> list[int]:
        """How many messages each write had."""
        return [data.count(PUBLISH_HEAD) for data in self.wire.written]


async def test_a_confirm_for_many_looks_at_those_only() -> None:
    """However many more are unconfirmed: two looks at each that is confirmed, and one beyond."""
    line = Line()
    line.send(1, 10_000)
    unconfirmed = line.channel._unconfirmed = Counting(line.channel._unconfirmed)
    last = 0
    for size in (1, 2, 10, 100, 1000, 3):
        last += size
        before = unconfirmed.touched
        line.wire.receive(spec.Basic.Ack(last, multiple=True))
        assert unconfirmed.touched - before <= 2 * size + 1
        assert line.outcomes == dict.fromkeys(range(1, last + 1), Confirm.ACK)
    before = unconfirmed.touched
    line.wire.receive(spec.Basic.Ack(9000, multiple=False))
    assert unconfirmed.touched - before <= 2
    line.wire.receive(spec.Basic.Nack(9001, multiple=True))
    acked = [number for number, confirm in line.outcomes.items() if confirm is Confirm.ACK]
    assert acked == [*range(1, last + 1), 9000]
    assert len(line.outcomes) == 9001
    assert [*dict.keys(unconfirmed)] == [*range(9002, 10_001)]


@pytest.mark.parametrize("count", [1, 2, A_WRITE - 1])
async def test_what_is_published_in_a_step_is_one_write(count: int) -> None:
    """At the next step of the event loop, in order, frames whole."""
    line = Line()
    line.send(1, count)
    assert line.wire.written == []
    await asyncio.sleep(0)
    assert line.sizes == [count]
    assert message_ids(line.wire.written[0]) == [f"m{number}" for number in range(1, count + 1)]
    await asyncio.sleep(0)
    line.send(count + 1, count + 3)
    await asyncio.sleep(0)
    assert line.sizes == [count, 3]


async def test_what_is_much_goes_out_in_pieces() -> None:
    """Each 128 small messages of one step are a write at once, and the rest is one at its end."""
    assert A_WRITE == 128
    line = Line()
    line.send(1, A_WRITE - 1)
    assert line.sizes == []
    line.send(A_WRITE, A_WRITE)
    assert line.sizes == [A_WRITE]
    line.send(A_WRITE + 1, 3 * A_WRITE + 10)
    assert line.sizes == [A_WRITE] * 3
    await asyncio.sleep(0)
    assert line.sizes == [A_WRITE] * 3 + [10]
    await asyncio.sleep(0)
    assert len(line.sizes) == 4, "and nothing empty"


async def test_a_late_confirm_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """What was unconfirmed is taken elsewhere by then; only what was never sent is an error."""
    unwired, outcomes = Unwired(), dict[int, Confirm]()
    channel = AmqpPublishChannel(unwired.channel, link=unwired.link, frame_max=DEFAULT_FRAME_MAX)
    for number in range(1, 4):
        channel.send(Sent(number, outcomes))
    unwired.receive(spec.Basic.Ack(7))
    assert "confirmed number 7, which is not in flight" in caplog.text
    caplog.clear()
    assert len(channel.take_unconfirmed()) == 3
    unwired.receive(*(spec.Basic.Ack(number) for number in range(1, 4)))
    assert (caplog.text, outcomes) == ("", {})


@pytest.mark.parametrize("size", [_LARGE, 3 * DEFAULT_FRAME_MAX])
async def test_a_large_body_goes_out_at_once(size: int) -> None:
    """With what was published before it; what comes after it does not wait for more of its kind."""
    line = Line()
    line.send(1, 2)
    line.send(3, 4, bytes(size))
    assert line.sizes == [3, 1]
    line.send(5, 5, bytes(_LARGE - 1))
    assert line.sizes == [3, 1]
    await asyncio.sleep(0)
    assert line.sizes == [3, 1, 1]


def message_ids(data: bytes) -> list[str]:
    """Return those of the messages that were written."""
    ids: list[str] = []
    while data:
        size, _, frame = pamqp.frame.unmarshal(data)
        if isinstance(frame, ContentHeader):
            ids.append(frame.properties.message_id or "")
        data = data[size:]
    return ids


@contextlib.contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Generator[list[int]]:
    """Count the messages of each write to a real socket."""
    writes: list[int] = []
    write = Link.write

    def count(link: Link, data: bytes) -> None:
        writes.append(data.count(PUBLISH_HEAD))
        write(link, data)

    with monkeypatch.context() as patch:
        patch.setattr(Link, "write", count)
        yield writes


@pytest.mark.fast_path("aiormq writes each publication by itself")
async def test_a_producer_writes_once_in_a_step(
    url: str, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 50 tasks that call `publish`, and of 50 bodies of a `publish_many`."""
    queue = Queue(queue_name, int)
    async with Producer(url) as producer:
        await producer.publish(queue, 0)
        with watched(monkeypatch) as writes:
            await asyncio.gather(*(producer.publish(queue, number) for number in range(50)))
        assert writes == [50]
        with watched(monkeypatch) as writes:
            (await producer.publish_many(queue, range(50))).raise_for_errors()
        assert writes == [50]
        assert not is_cut_off(producer)


async def test_what_is_the_same_for_a_queue_is_encoded_once(
    producer: Producer, queue_name: str
) -> None:
    """The publish method with its queue, its frame, and the content type: once for 500 messages."""
    once = (wire._publish, wire._content, wire._method_frame)
    queue = Queue(queue_name, int)
    await producer.publish(queue, 0)
    before = [(cached.cache_info().misses, cached.cache_info().hits) for cached in once]
    (await producer.publish_many(queue, range(500))).raise_for_errors()
    for cached, (misses, hits) in zip(once, before, strict=True):
        assert cached.cache_info().misses == misses
        assert cached.cache_info().hits >= hits
    assert wire._publish.cache_info().hits == before[0][1] + 500


def test_messages_of_a_queue_share_what_is_the_same() -> None:
    """The method is the same object, and so is its frame on a channel."""
    one, other = (
        encode(Message(body, "q"), frame_max=DEFAULT_FRAME_MAX, max_message_size=100)
        for body in (b"one", b"other")
    )
    assert one.method is other.method
    frames = [wired.frames(7, DEFAULT_FRAME_MAX)[0] for wired in (one, other)]
    assert frames[0] is frames[1]
    elsewhere = encode(Message(b"", "r"), frame_max=DEFAULT_FRAME_MAX, max_message_size=100)
    assert elsewhere.method != one.method
