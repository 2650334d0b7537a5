"""What the reader takes out of a connection's stream, and what it leaves to aiormq."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import TYPE_CHECKING, Any

import pamqp.frame
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pamqp import commands as spec
from pamqp.body import ContentBody
from pamqp.exceptions import UnmarshalingException
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

from aioworkq.amqp.decode import delivery_of, message_of, return_of, route_of
from aioworkq.amqp.reader import Content, FrameReader, Tap
from aioworkq.message import Garbled

if TYPE_CHECKING:
    from pamqp.base import Frame

OURS, THEIRS = 3, 4
HEARTBEAT = pamqp.frame.marshal(Heartbeat(), 0)


class Stream:
    """A reader with a tap on channel 3, and what came out of both."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.reader = FrameReader(limit=2**16, loop=self.loop)
        self.deliveries: list[Content] = []
        self.returns: list[Content] = []
        self.confirms: list[tuple[int, bool, bool]] = []
        self.tap = Tap(
            on_delivery=self.deliveries.append,
            on_return=self.returns.append,
            on_confirm=lambda *confirm: self.confirms.append(confirm),
        )
        self.reader.tap(OURS, self.tap)

    def feed(self, data: bytes, size: int = 2**20) -> None:
        for start in range(0, len(data), size):
            self.reader.feed_data(data[start : start + size])

    @property
    def passed(self) -> bytes:
        """What aiormq would read."""
        return bytes(getattr(self.reader, "_buffer"))  # noqa: B009 - of asyncio

    @property
    def frames(self) -> list[tuple[int, Any]]:
        data, frames = self.passed, list[tuple[int, Any]]()
        while data:
            size, channel, frame = pamqp.frame.unmarshal(data)
            frames.append((channel, frame))
            data = data[size:]
        return frames


@pytest.fixture
def stream() -> Any:
    stream = Stream()
    yield stream
    stream.loop.close()


def marshal(channel: int, *frames: Frame | ContentHeader | ContentBody | Heartbeat) -> bytes:
    return b"".join(pamqp.frame.marshal(frame, channel) for frame in frames)


def content(body: bytes, *, size: int = 100, **properties: Any) -> list[Any]:
    header = ContentHeader(body_size=len(body), properties=spec.Basic.Properties(**properties))
    parts = [ContentBody(body[at : at + size]) for at in range(0, len(body), size)]
    return [header, *parts]


def deliver(tag: int, *, redelivered: bool = False) -> spec.Basic.Deliver:
    return spec.Basic.Deliver("consumer", tag, redelivered, "exchange", "key")


def everything() -> bytes:
    """Frames of our channel and of another one, as a broker may mix them."""
    return b"".join(
        (
            marshal(OURS, spec.Basic.ConsumeOk("consumer")),
            marshal(OURS, deliver(1), *content(b"")),
            marshal(0, Heartbeat()),
            marshal(OURS, deliver(2, redelivered=True), *content(b"x" * 250)[:2]),
            marshal(THEIRS, spec.Basic.GetOk(9, False, "", "q", 0), *content(b"theirs")),
            marshal(OURS, *content(b"x" * 250)[2:]),
            marshal(OURS, spec.Basic.Ack(5, True), spec.Basic.Nack(6, False)),
            marshal(OURS, spec.Basic.Return(312, "NO_ROUTE", "", "q"), *content(b"back")),
            marshal(THEIRS, deliver(1), *content(b"not tapped")),
            marshal(OURS, spec.Basic.CancelOk("consumer")),
        ),
    )


@given(size=st.integers(1, 300))
@settings(deadline=None)
def test_frames_are_told_apart_wherever_the_stream_is_cut(size: int) -> None:
    """Ours go to the tap, all others pass unchanged and in order."""
    stream = Stream()
    stream.feed(everything(), size)
    assert [one.body for one in stream.deliveries] == [b"", b"x" * 250]
    assert [delivery_of(one.method)[:2] for one in stream.deliveries] == [(1, False), (2, True)]
    assert {route_of(delivery_of(one.method)[2]) for one in stream.deliveries} == {
        ("exchange", "key"),
    }
    assert [return_of(one.method) for one in stream.returns] == ["312 NO_ROUTE"]
    assert [one.body for one in stream.returns] == [b"back"]
    assert stream.confirms == [(5, True, True), (6, False, False)]
    passed = [
        (channel, type(frame).__name__)
        for channel, frame in stream.frames
        if not isinstance(frame, Heartbeat)
    ]
    assert passed == [
        (OURS, "ConsumeOk"),
        *[(THEIRS, name) for name in ("GetOk", "ContentHeader", "ContentBody")],
        *[(THEIRS, name) for name in ("Deliver", "ContentHeader", "ContentBody")],
        (OURS, "CancelOk"),
    ]
    stream.loop.close()


def test_what_is_not_asked_for_is_left_to_aiormq() -> None:
    """A tap without callbacks takes nothing, content included."""
    stream = Stream()
    stream.reader.tap(OURS, Tap())
    data = everything()
    stream.feed(data, 50)
    assert stream.passed == data
    stream.loop.close()


def test_aiormq_hears_that_the_peer_lives(stream: Stream) -> None:
    """It closes a connection on which it sees no frame; a heartbeat a second stands for ours."""
    clock = [100.0]
    stream.reader._time = lambda: clock[0]
    for second in range(5):
        clock[0] = 100.0 + second
        for tag in range(10):
            stream.feed(marshal(OURS, spec.Basic.Ack(tag)))
    assert [type(frame) for _, frame in stream.frames] == [Heartbeat] * 5
    assert len(stream.confirms) == 50


@pytest.mark.parametrize("method", [spec.Channel.Close(404, "no", 0, 0), spec.Channel.CloseOk()])
def test_a_tap_ends_with_its_channel(stream: Stream, method: Frame) -> None:
    """The number may be another channel's then, whose frames are not for us."""
    stream.feed(marshal(OURS, method))
    assert stream.tap.has_close == isinstance(method, spec.Channel.Close)
    rest = marshal(OURS, deliver(1), *content(b"body"))
    stream.feed(rest)
    assert not stream.deliveries
    assert stream.passed == marshal(OURS, method) + rest


@pytest.mark.parametrize("garbage", [b"AMQP\x00\x00\x09\x01", b"\x01\x00\x03\x00\x00\x00\x01xy"])
def test_garbage_is_left_to_aiormq(stream: Stream, garbage: bytes) -> None:
    """And so is all that follows: it says what is wrong, and closes the connection."""
    stream.feed(marshal(0, Heartbeat()) + garbage)
    stream.feed(marshal(OURS, deliver(1)))
    assert stream.passed == marshal(0, Heartbeat()) + garbage + marshal(OURS, deliver(1))


def test_an_incomplete_frame_is_left_to_aiormq_at_the_end(stream: Stream) -> None:
    """It complains that the connection ended in the middle."""
    stream.feed(marshal(OURS, deliver(1))[:-3])
    assert not stream.passed
    stream.reader.feed_eof()
    assert stream.passed == marshal(OURS, deliver(1))[:-3]


def test_an_incomplete_body_of_ours_is_aiormqs_too_at_the_end(stream: Stream) -> None:
    """What has come of it went elsewhere already; aiormq gets enough to complain of the rest."""
    stream.feed(marshal(OURS, deliver(1), *content(b"x" * 50))[:-3], 20)
    assert stream.passed == HEARTBEAT
    stream.reader.feed_eof()
    with pytest.raises(UnmarshalingException, match="Not all data received"):
        pamqp.frame.unmarshal(stream.passed.removeprefix(HEARTBEAT))


def test_a_body_of_ours_with_a_wrong_end_is_left_to_aiormq(stream: Stream) -> None:
    """However the stream is cut: it finds no end of a frame where one has to be."""
    stream.feed(marshal(OURS, deliver(1), *content(b"x" * 50))[:-1] + b"!", 20)
    stream.feed(b"more")
    assert not stream.deliveries
    with pytest.raises(UnmarshalingException, match="Last byte error"):
        pamqp.frame.unmarshal(stream.passed.removeprefix(HEARTBEAT))
    assert stream.passed.endswith(b"!more")


@given(sizes=st.lists(st.integers(1, 4000), min_size=1, max_size=30), frame=st.integers(1, 3000))
@settings(deadline=None)
def test_a_large_body_is_put_together_wherever_the_stream_is_cut(
    sizes: list[int],
    frame: int,
) -> None:
    """Of many frames, each in many pieces, and another message behind it."""
    stream = Stream()
    body = bytes(number % 251 for number in range(10_000))
    data = marshal(OURS, deliver(1), *content(body, size=frame), deliver(2), *content(b"small"))
    start = 0
    for size in itertools.cycle(sizes):
        if start >= len(data):
            break
        stream.feed(data[start : start + size])
        start += size
    assert [one.body for one in stream.deliveries] == [body, b"small"]
    assert not stream.passed.replace(HEARTBEAT, b"")  # one every so often
    stream.loop.close()


def test_an_error_of_ours_ends_the_connection_and_is_logged(
    stream: Stream,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nobody waits in vain for what it broke, and aiormq's reader fails with it."""

    def fail(_: Content) -> None:
        raise ZeroDivisionError

    stream.reader.tap(OURS, Tap(on_delivery=fail))
    with caplog.at_level(logging.ERROR, "aioworkq"):
        stream.feed(marshal(OURS, deliver(1), *content(b"")))
    assert "aioworkq failed on a frame" in caplog.text
    assert isinstance(stream.reader.exception(), ZeroDivisionError)


def header(properties: bytes) -> Any:
    return message_of(properties, b"", queue="q", exchange="", routing_key="q")


@pytest.mark.parametrize(
    ("properties", "name", "value"),
    [
        (b"\x00\x80\x03a\xffb", "message_id", "a\ufffdb"),
        (b"\x00\x40\xff\xff\xff\xff\xff\xff\xff\xff", "timestamp", None),
        (b"\x20\x00\x00\x00\x00\x03\x01xZ", "headers", {}),
        (b"\x01\x00\x04soon", "expiration", None),
        (b"\x00\x81\x00\x00\x02id", "message_id", "id"),
        (b"\x00\x10\x05guest", "message_id", ""),
        (b"", "message_id", ""),
        (b"\x80\x00", "content_type", None),
        (b"\x80\x40\x01a\x00\x00", "timestamp", None),
    ],
)
def test_what_other_clients_write_ends_no_connection(
    properties: bytes,
    name: str,
    value: object,
) -> None:
    """Text that is no UTF-8, a time that never comes, headers of an unknown type, too few bytes."""
    found = getattr(header(properties), name)
    assert (str(found) if isinstance(found, Garbled) else found) == value


def test_a_timestamp_in_milliseconds_is_understood() -> None:
    """Some clients write that, against the specification."""
    late, right = (
        header(b"\x00\x40" + number.to_bytes(8)).timestamp
        for number in (1_700_000_000_000, 1_700_000_000)
    )
    assert late == right
