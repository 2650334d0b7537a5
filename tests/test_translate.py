"""What the broker and the network say, as our errors; and URLs without their secrets."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import pytest
from aiormq import exceptions as aiormq_errors

from aioworkq.amqp import AmqpConnection
from aioworkq.amqp.translate import CLOSING_REASON, describe, refusal
from aioworkq.amqp.url import display, parse_urls
from aioworkq.errors import ConnectionLostError, TopologyError


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (None, CLOSING_REASON),
        (asyncio.CancelledError(), CLOSING_REASON),
        (TimeoutError(), "no answer in time"),
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer"),
        (aiormq_errors.ConnectionClosed(320, "CONNECTION_FORCED"), "320 CONNECTION_FORCED"),
        (aiormq_errors.ChannelClosed(None, None), "ChannelClosed"),
        (
            caused(
                aiormq_errors.AMQPConnectionError(111, "x"),
                ConnectionRefusedError(111, "Connection refused"),
            ),
            "Connection refused",
        ),
        (ssl.SSLCertVerificationError("bad"), "the server's certificate was refused: ('bad',)"),
    ],
)
def test_every_end_of_a_connection_has_words(error: BaseException | None, text: str) -> None:
    """A log line and an error's sentence tell them."""
    assert describe(error) == text


def test_an_inequivalent_argument_is_named_with_both_sides() -> None:
    """Field by field, and what to write."""
    text = (
        "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'q' in vhost '/': "
        "received 'quorum' but current is 'classic'"
    )
    error = refusal(aiormq_errors.ChannelPreconditionFailed(text), "q", what="declaring")
    assert isinstance(error, TopologyError)
    assert error.expected == {"x-queue-type": "quorum"}
    assert error.actual == {"x-queue-type": "classic"}
    assert error.code == 406
    assert "declare=False" in str(error)


def test_a_missing_argument_is_named_too() -> None:
    """RabbitMQ says "none" and the type."""
    text = (
        "PRECONDITION_FAILED - inequivalent arg 'x-max-length' for queue 'q' in vhost '/': "
        "received the value '5' of type 'signedint' but current is none"
    )
    error = refusal(
        aiormq_errors.ChannelPreconditionFailed(text),
        "q",
        what="declaring",
        asked={"x-max-length": 5},
    )
    assert isinstance(error, TopologyError)
    assert error.expected == {"x-max-length": 5}
    assert error.actual == {"x-max-length": "none"}


@pytest.mark.parametrize(
    ("error", "code", "advice"),
    [
        (aiormq_errors.ChannelPreconditionFailed("PRECONDITION_FAILED - other"), 406, "alike"),
        (aiormq_errors.ChannelAccessRefused("ACCESS_REFUSED"), 403, "set_permissions"),
        (aiormq_errors.ChannelNotFoundEntity("NOT_FOUND - no queue 'q'"), 404, "declare=True"),
        (aiormq_errors.ChannelLockedResource("RESOURCE_LOCKED"), 405, "exclusively"),
    ],
)
def test_a_refusal_says_what_to_do(error: Any, code: int, advice: str) -> None:
    """By AMQP's reply code."""
    translated = refusal(error, "q", what="declaring")
    assert isinstance(translated, TopologyError)
    assert translated.code == code
    assert advice in str(translated)


@pytest.mark.parametrize(
    "error",
    [
        aiormq_errors.ChannelNotFoundEntity(
            "NOT_FOUND - home node 'b@x' of durable queue 'q' in vhost '/' is down or inaccessible",
        ),
        aiormq_errors.ChannelNotFoundEntity("NOT_FOUND - queue 'q' process is stopped"),
        aiormq_errors.ChannelPreconditionFailed(
            "PRECONDITION_FAILED - delivery acknowledgement on channel 5 timed out. Timeout value "
            "used: 1000 ms. This timeout value can be configured",
        ),
        aiormq_errors.ChannelClosed(541, "INTERNAL_ERROR"),
    ],
)
def test_what_is_no_fault_of_the_queue_is_a_lost_connection(error: Any) -> None:
    """A queue whose node is down is not a missing one; a late ack is no reason to delete one."""
    assert isinstance(refusal(error, "q", what="declaring"), ConnectionLostError)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("", "has the scheme ''"),
        ("localhost", "has the scheme ''"),
        ("http://localhost/", "has the scheme 'http'"),
        ("amqp://", "has no host"),
        ("amqp:///vhost", "has no host"),
        ("amqp://guest:secret@host:port/", "cannot be parsed"),
        ("amqp://guest:secret@host:99999/", "cannot be parsed"),
        ("amqp://guest:secret@host:0/", "has port 0"),
        ("amqp://guest:secret@host/.", "a virtual host that would be taken for another one"),
        ("amqp://guest:secret@host/%2E", "a virtual host that would be taken for another one"),
        ("amqp://guest:secret@host/a/../b", "a virtual host that would be taken for another one"),
        ("amqp://guest:secret@host/a%252Fb", "a virtual host that would be taken for another one"),
        ("amqp://guest:@host/", "has an empty password"),
        ("amqp://guest:secret@[::1/", "cannot be parsed"),
        ("amqp://guest:123/secret@host/", "cannot be parsed"),
        ("amqp://guest:123?secret@host/", "cannot be parsed"),
        ("amqp://guest:123#secret@host/", "cannot be parsed"),
    ],
)
def test_a_wrong_url_is_refused_without_showing_its_password(url: str, sentence: str) -> None:
    """And says how one is written."""
    with pytest.raises(ValueError, match=sentence) as caught:
        parse_urls(url)
    assert "secret" not in str(caught.value)
    assert "amqp://user:password@host:port/vhost" in str(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__


@pytest.mark.parametrize("urls", [5, None, [5], {"a": 1}, b"amqp://localhost/"])
def test_what_is_no_url_at_all_is_refused(urls: Any) -> None:
    """A type error, at once."""
    with pytest.raises(TypeError, match="a URL, or a list of URLs, is needed"):
        parse_urls(urls)
    with pytest.raises(ValueError, match="list of URLs is empty"):
        parse_urls([])


def test_ports_are_filled_in_and_secrets_left_out() -> None:
    """5672, and 5671 for TLS."""
    plain, secure = parse_urls(["amqp://u:secret@a/", "amqps://u:secret@b/v?heartbeat=5"])
    assert (plain.port, secure.port) == (5672, 5671)
    assert display(plain) == "amqp://a:5672/"
    assert display(secure) == "amqps://b:5671/v"


def test_a_connection_shows_no_password() -> None:
    """Its repr ends up in logs."""
    connection = AmqpConnection(
        ["amqp://user:secret@one/", "amqp://user:secret@two/"],
        name="n",
        heartbeat=1,
        connect_timeout=1,
        ssl_context=None,
        max_message_size=1,
    )
    assert repr(connection) == "<AmqpConnection 'n' to amqp://one:5672/, amqp://two:5672/>"
