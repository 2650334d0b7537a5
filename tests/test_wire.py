"""Frames by hand, held against pamqp."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pamqp.frame
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from aioworkq.amqp.decode import message_from, message_of
from aioworkq.amqp.wire import (
    DEFAULT_FRAME_MAX,
    ack_frame,
    encode,
    expiration_ms,
    requeue_frame,
)
from aioworkq.message import Message

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def encoded(message: Message, *, channel: int = 7, frame_max: int = DEFAULT_FRAME_MAX) -> bytes:
    wire = encode(message, frame_max=frame_max, max_message_size=2**24)
    return b"".join(wire.frames(channel, frame_max))


def decoded(data: bytes) -> list[Any]:
    frames: list[Any] = []
    while data:
        size, channel, frame = pamqp.frame.unmarshal(data)
        assert channel == 7
        frames.append(frame)
        data = data[size:]
    return frames


def round_trip(message: Message) -> Message:
    method, header, *body = decoded(encoded(message))
    assert isinstance(method, Basic.Publish)
    assert method.mandatory
    assert isinstance(header, ContentHeader)
    data = b"".join(part.value for part in body)
    assert header.body_size == len(data)
    route = {
        "queue": message.queue,
        "exchange": method.exchange,
        "routing_key": method.routing_key,
    }
    pamqps = message_from(header.properties, data, **route)
    encoded_header = encode(message, frame_max=DEFAULT_FRAME_MAX, max_message_size=2**24).header
    assert fields(message_of(encoded_header[12:], data, **route)) == fields(pamqps)
    return pamqps


def fields(message: Message) -> dict[str, Any]:
    return {name: getattr(message, name) for name in Message.__struct_fields__}


def test_every_property_makes_the_round_trip() -> None:
    """What is written by hand, pamqp reads, and so do we."""
    message = Message(
        b"body",
        "queue",
        exchange="exchange",
        routing_key="key",
        message_id="m",
        correlation_id="c",
        content_type="text/plain",
        content_encoding="utf-8",
        headers={"a": 1},
        priority=9,
        expiration=1.5,
        timestamp=NOW,
        persistent=False,
        type="kind",
        app_id="app",
        reply_to="reply",
    )
    assert fields(round_trip(message)) == fields(message)


UNUSUAL: dict[str, Any] = {
    "headers": {"a": 1},
    "priority": 0,
    "correlation_id": "",
    "reply_to": "reply",
    "expiration": 0.0,
    "type": "kind",
    "app_id": "",
    "timestamp": None,
    "message_id": "",
    "persistent": False,
    "content_type": None,
    "content_encoding": None,
}


@given(st.sets(st.sampled_from(sorted(UNUSUAL))))
@settings(deadline=None)
def test_any_properties_make_the_round_trip(names: set[str]) -> None:
    """Whichever of them differ from those of most messages, which have a way of their own."""
    usual = Message(
        b"body",
        "queue",
        routing_key="queue",
        message_id="m",
        content_type="application/json",
        content_encoding="utf-8",
        timestamp=NOW,
    )
    message = structs.replace(usual, **{name: UNUSUAL[name] for name in names})
    assert fields(round_trip(message)) == fields(message)


def test_an_empty_message_makes_the_round_trip() -> None:
    """No body frame, no optional property, persistent all the same, and by its queue's name."""
    message = round_trip(Message(b"", "queue"))
    assert message.persistent
    assert fields(message) == fields(Message(b"", "queue", routing_key="queue"))


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
    | st.datetimes(datetime(1971, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)).map(  # noqa: DTZ001
        lambda when: when.replace(microsecond=0),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(TEXT.filter(lambda name: len(name.encode()) <= 255), VALUES, max_size=5))
@settings(deadline=None)
def test_headers_make_the_round_trip(headers: dict[str, Any]) -> None:
    """With all their types, and floats in full."""
    assert round_trip(Message(b"x", "q", headers=headers)).headers == headers


@given(st.binary(max_size=5000))
@settings(deadline=None)
def test_a_long_body_is_split_into_frames(body: bytes) -> None:
    """No frame is larger than was negotiated."""
    frames = decoded(encoded(Message(body, "q"), frame_max=512))
    parts = [frame for frame in frames if isinstance(frame, ContentBody)]
    assert b"".join(part.value for part in parts) == body
    assert all(len(part.value) <= 504 for part in parts)


def test_settling_frames_are_what_pamqp_makes() -> None:
    """Ack, reject and nack."""
    assert decoded(ack_frame(7, 5, multiple=True))[0].multiple
    assert not decoded(ack_frame(7, 5, multiple=False))[0].multiple
    reject = decoded(requeue_frame(7, 2**40, counts=True))[0]
    assert isinstance(reject, Basic.Reject)
    assert (reject.delivery_tag, reject.requeue) == (2**40, True)
    nack = decoded(requeue_frame(7, 6, counts=False))[0]
    assert isinstance(nack, Basic.Nack)
    assert (nack.delivery_tag, nack.requeue, nack.multiple) == (6, True, False)


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (Message(b"x" * (2**24 + 1), "q"), "the body has 16777217 bytes: at most 16777216"),
        (Message(b"", "q" * 256), "the routing key has 256 bytes"),
        (Message(b"", "q", exchange="x" * 256), "the exchange has 256 bytes"),
        (Message(b"", "q", message_id="m" * 256), "the message_id has 256 bytes"),
        (Message(b"", "q", correlation_id="ü" * 128), "the correlation_id has 256 bytes"),
        (Message(b"", "q", correlation_id="\ud800"), "not valid Unicode"),
        (Message(b"", "q", headers={"h" * 256: 1}), "has 256 bytes: RabbitMQ takes 255"),
        (Message(b"", "q", headers={"h": {"n" * 256: 1}}), "RabbitMQ takes 255"),
        (Message(b"", "q", headers={"h": "x" * 200_000}), "one header frame"),
        (Message(b"", "q", priority=256), "priority is 256"),
        (Message(b"", "q", priority=-1), "priority is -1"),
        (Message(b"", "q", expiration=-1), "expiration is -1"),
        (Message(b"", "q", expiration=float("nan")), "expiration is nan"),
        (Message(b"", "q", expiration=2.0**32), "expiration is 4294967296"),
    ],
)
def test_what_the_broker_cannot_take_is_refused(message: Message, sentence: str) -> None:
    """Before anything is sent."""
    with pytest.raises(ValueError, match=sentence):
        encoded(message)


@pytest.mark.parametrize("value", [object(), 2**63, {1, 2}, 2j, [object()], {"n": object()}])
def test_a_header_of_a_type_that_amqp_lacks_is_refused(value: object) -> None:
    """And named."""
    with pytest.raises(TypeError, match=r"header '(h|n)' is"):
        encoded(Message(b"", "q", headers={"h": value}))


def test_a_header_name_is_text() -> None:
    """Also inside."""
    with pytest.raises(TypeError, match="a header's name is a str, not int"):
        encoded(Message(b"", "q", headers={1: "x"}))  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]


def test_a_smaller_frame_of_a_new_connection_is_checked_again() -> None:
    """A message may be encoded before the connection is there."""
    wire = encode(
        Message(b"", "q", headers={"h": "x" * 5000}),
        frame_max=DEFAULT_FRAME_MAX,
        max_message_size=10,
    )
    with pytest.raises(ValueError, match="one header frame"):
        wire.frames(1, 4096)


def test_an_expiration_is_rounded_up() -> None:
    """No message expires early."""
    assert expiration_ms(0) == "0"
    assert expiration_ms(1.5) == "1500"
    assert expiration_ms(0.0001) == "1"


def test_a_foreign_expiration_that_is_no_number_is_ignored() -> None:
    """Nobody knows what it means."""
    properties = Basic.Properties(expiration="soon")
    message = message_from(properties, b"", queue="q", exchange="", routing_key="q")
    assert message.expiration is None


@pytest.mark.parametrize(
    "text", ["0", "1.50", "-12.345", "2147483647", "-2147483648", "1E+3", "1E-255"]
)
def test_a_decimal_makes_the_round_trip(text: str) -> None:
    """With its places."""
    message = Message(b"", "q", headers={"h": Decimal(text), "in": [Decimal(text)]})
    headers = round_trip(message).headers
    assert headers == {"h": Decimal(text), "in": [Decimal(text)]}


@pytest.mark.parametrize(
    "text", ["2147483648", "1E+10", "1E-256", "NaN", "Infinity", "0.12345678901"]
)
def test_a_decimal_that_amqp_has_no_room_for_is_refused(text: str) -> None:
    """It is not rounded."""
    with pytest.raises(ValueError, match="AMQP takes a Decimal of 32 bits"):
        encoded(Message(b"", "q", headers={"h": Decimal(text)}))


def test_headers_that_contain_themselves_are_refused() -> None:
    """As any other value that AMQP does not know."""
    headers: dict[str, Any] = {}
    headers["own"] = [headers]
    with pytest.raises(ValueError, match="headers that contain themselves"):
        encoded(Message(b"", "q", headers=headers))
