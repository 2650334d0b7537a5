"""Messages, deliveries, attempts, and the headers of dead letters."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime
from typing import Any

import pytest

from aioworkq.amqp.wire import DEFAULT_FRAME_MAX, encode
from aioworkq.message import (
    ATTEMPTS,
    COPIES,
    EXCEPTION_MESSAGE,
    EXCEPTION_TYPE,
    FIRST_FAILURE,
    LAST_FAILURE,
    QUEUE,
    REASON,
    TRACEBACK,
    Delivery,
    Failure,
    Garbled,
    Message,
    dead_letter_headers,
    is_counted_by_broker,
    own_attempts,
    raw,
    returns,
    strip_broker_headers,
    used_attempts,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
LATER = datetime(2026, 1, 2, 3, 5, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("headers", "redelivered", "expected"),
    [
        ({}, False, 0),
        ({}, True, 1),  # a classic queue says only that it happened
        ({"x-delivery-count": 0}, True, 0),
        ({"x-delivery-count": 3}, True, 3),
        ({"x-acquired-count": 2}, True, 0),  # RabbitMQ 4.3 after two nacks
        ({"x-acquired-count": 5, "x-delivery-count": 1}, True, 1),
        ({"x-delivery-count": "many"}, True, 0),
        ({"x-delivery-count": -1}, True, 0),
        ({"x-delivery-count": True}, True, 0),
    ],
)
def test_returns_are_counted_as_the_broker_tells(
    headers: dict[str, Any],
    redelivered: bool,  # noqa: FBT001 - a table's column
    expected: int,
) -> None:
    """A quorum queue counts, a classic queue only knows that a message came back."""
    assert returns(headers, redelivered=redelivered) == expected


@pytest.mark.parametrize(
    ("headers", "excused", "expected"),
    [
        ({}, 0, 1),
        ({}, 1, 0),
        ({ATTEMPTS: 4}, 0, 5),
        ({ATTEMPTS: 4, "x-delivery-count": 3}, 0, 7),
        ({ATTEMPTS: 4, "x-delivery-count": 3}, 2, 5),
        ({ATTEMPTS: 4, "x-delivery-count": 3}, 9, 4),
        ({ATTEMPTS: "x"}, 0, 1),
    ],
)
def test_used_attempts_are_the_header_and_the_returns_that_count(
    headers: dict[str, Any],
    excused: int,
    expected: int,
) -> None:
    """What is excused is taken off what the broker counted, never off our own header."""
    assert used_attempts(headers, redelivered=True, excused=excused) == expected


def test_a_queue_that_counts_is_recognised() -> None:
    """Either of the two headers tells it."""
    assert is_counted_by_broker({"x-delivery-count": 0})
    assert is_counted_by_broker({"x-acquired-count": 1})
    assert not is_counted_by_broker({"other": 1})


def test_a_copy_carries_everything_but_what_belongs_to_the_broker() -> None:
    """x-death in a copy makes RabbitMQ before 4.0 drop it as a cycle."""
    message = Message(
        b"body",
        "q",
        exchange="x",
        routing_key="k",
        message_id="m",
        correlation_id="c",
        content_type="t",
        content_encoding="e",
        priority=3,
        expiration=1.5,
        timestamp=NOW,
        persistent=False,
        type="kind",
        app_id="app",
        reply_to="r",
    )
    headers = {"mine": 1, "x-death": [], "x-delivery-count": 2, "x-first-death-queue": "q"}
    copy = message.copy_to("q.dead", headers)
    assert copy.queue == copy.routing_key == "q.dead"
    assert not copy.exchange
    assert strip_broker_headers(headers) == {"mine": 1}
    assert copy.headers == {"mine": 1, COPIES: 1}
    assert copy.copy_to("q", {}).headers == {COPIES: 2}
    assert copy.persistent
    same = ("body", "message_id", "correlation_id", "content_type", "content_encoding", "priority")
    for attribute in (*same, "expiration", "timestamp", "type", "app_id", "reply_to"):
        assert getattr(copy, attribute) == getattr(message, attribute)


def test_a_dead_letter_tells_what_happened() -> None:
    """Queue, reason, attempts, times and exception are in its headers; the first time stays."""
    first = dead_letter_headers(
        {"mine": 1, "x-death": []},
        queue="q",
        attempts=3,
        reason="gave up",
        failure=Failure("ValueError", "boom", "Traceback ..."),
        first=NOW,
        now=NOW,
    )
    assert first == {
        "mine": 1,
        QUEUE: "q",
        REASON: "gave up",
        ATTEMPTS: 3,
        FIRST_FAILURE: NOW,
        LAST_FAILURE: NOW,
        EXCEPTION_TYPE: "ValueError",
        EXCEPTION_MESSAGE: "boom",
        TRACEBACK: "Traceback ...",
    }
    second = dead_letter_headers(
        first,
        queue="q",
        attempts=4,
        reason="again",
        failure=None,
        first=LATER,
        now=LATER,
    )
    assert (second[FIRST_FAILURE], second[LAST_FAILURE]) == (NOW, LATER)


@pytest.mark.parametrize("text", ["x" * 10**6, "\U0001f600" * 10**5, "\ud800" * 10**5])
def test_a_dead_letter_always_fits_into_a_frame(text: str) -> None:
    """Whatever an exception says, and in whatever script, the header frame stays small enough."""
    headers = dead_letter_headers(
        {},
        queue="q" * 250,
        attempts=1,
        reason=text,
        failure=Failure(text, text, text),
        first=NOW,
        now=NOW,
    )
    message = Message(b"", "q", headers=headers)
    wire = encode(message, frame_max=DEFAULT_FRAME_MAX, max_message_size=1)
    assert len(wire.header) < DEFAULT_FRAME_MAX


def test_a_long_traceback_keeps_its_end() -> None:
    """The end of a traceback names the error."""
    failure = Failure("E", "m", "start" + "." * 20_000 + "end")
    headers = dead_letter_headers(
        {}, queue="q", attempts=1, reason="r", failure=failure, first=None, now=NOW
    )
    assert headers[TRACEBACK].startswith("…")
    assert headers[TRACEBACK].endswith("end")
    assert len(headers[TRACEBACK]) == 8_000


def test_a_delivery_shows_its_message() -> None:
    """The handler reads what it needs off the delivery."""
    message = Message(
        b"b",
        "q",
        message_id="m",
        correlation_id="c",
        headers={"a": 1},
        priority=2,
        timestamp=NOW,
    )
    delivery = Delivery(message, queue="q", attempt=2, redelivered=True)
    assert delivery.body == b"b"
    assert delivery.headers == {"a": 1}
    assert (delivery.message_id, delivery.correlation_id) == ("m", "c")
    assert (delivery.priority, delivery.timestamp) == (2, NOW)
    assert repr(delivery) == "<Delivery of m from 'q', attempt 2>"
    delivery.lost = True
    assert repr(delivery) == "<Delivery of m from 'q', attempt 2, lost>"
    nameless = Delivery(Message(b"", "q"), queue="q", attempt=1, redelivered=False)
    assert "a message without id" in repr(nameless)


def test_what_others_wrote_into_our_counters_leaves_room_for_more() -> None:
    """A copy of their message can be encoded, and its attempts are used up."""
    headers = {COPIES: 2**63 - 1, ATTEMPTS: 2**63 - 1}
    copy = Message(b"", "q", headers=headers).copy_to("q", {})
    assert own_attempts(headers) == 2**31
    encode(copy, frame_max=4096, max_message_size=1)


@pytest.mark.parametrize("raw_text", [b"\xff\xfe", b"abc\x80", b"\xed\xa0\x80"])
def test_garbled_text_is_what_its_bytes_are(raw_text: bytes) -> None:
    """It can be shown, hashed, pickled; it equals only what came as the same bytes."""
    garbled = Garbled(raw_text)
    assert "\ufffd" in str(garbled)
    assert str(garbled).encode()
    assert garbled == Garbled(raw_text)
    assert garbled != str(garbled)
    assert garbled != Garbled(raw_text + b"\xff")
    assert {garbled: 1}[Garbled(raw_text)] == 1
    assert raw(pickle.loads(pickle.dumps(garbled))) == raw_text  # noqa: S301 - our own
    assert raw("ü") == b"\xc3\xbc"
