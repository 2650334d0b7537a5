"""What was delivered or returned, as messages.

The properties of a delivery are decoded by hand: pamqp takes several times as long. Headers are
pamqp's: most messages have none. The layout is that of the AMQP 0-9-1 specification, 1.8.
"""

from __future__ import annotations

import logging
import struct
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from pamqp import decode

from aioworkq.message import Garbled, Message

if TYPE_CHECKING:
    from pamqp.commands import Basic

_log = logging.getLogger("aioworkq")

_PERSISTENT: Final = 2
_MAX_SECONDS: Final = 0xFFFFFFFF
"""A later timestamp, the year 2106, is one in milliseconds."""

_tag: Final = struct.Struct(">QB").unpack_from
_longlong: Final = struct.Struct(">Q").unpack_from
_long: Final = struct.Struct(">I").unpack_from
_short: Final = struct.Struct(">H").unpack_from


def delivery_of(arguments: bytes) -> tuple[int, bool, bytes]:
    """Return delivery tag, redelivered flag, and the encoded exchange and routing key."""
    start = 1 + arguments[0]  # behind the consumer tag
    tag, bits = _tag(arguments, start)
    return tag, bool(bits & 1), arguments[start + 9 :]


def got_of(arguments: bytes) -> tuple[int, bool, bytes]:
    """Return the same of a basic.get-ok."""
    tag, bits = _tag(arguments, 0)
    return tag, bool(bits & 1), arguments[9:]


def return_of(arguments: bytes) -> str:
    """Return the code and the text of a basic.return."""
    return f"{_short(arguments)[0]} {_shortstr(arguments, 2)[0]}"


def route_of(route: bytes) -> tuple[str, str]:
    """Return exchange and routing key."""
    exchange, start = _shortstr(route, 0)
    return exchange, _shortstr(route, start)[0]


def _shortstr(data: bytes, start: int) -> tuple[str, int]:
    end = start + 1 + data[start]
    try:
        return data[start + 1 : end].decode(), end
    except UnicodeDecodeError:  # other clients may write that; it must not end the connection
        return Garbled(data[start + 1 : end]), end


def message_of(
    properties: bytes,
    body: bytes,
    *,
    queue: str,
    exchange: str,
    routing_key: str,
) -> Message:
    """Return a delivery as a message; one whose properties are garbage is taken without them.

    Args:
        properties: Their flags and values, as in a content header.
        body: All of it.
        queue: Where it came from.
        exchange: As delivered.
        routing_key: As delivered.
    """
    message = Message(body, queue, exchange, routing_key)
    message.persistent = False
    try:
        _read(properties, message)
    except (struct.error, IndexError) as exc:  # a message must not end the connection
        _log.warning("The properties of a message are cut short, it is taken as it is: %s", exc)
    return message


def _read(properties: bytes, message: Message) -> None:  # noqa: C901, PLR0912 - one step each
    flags = _short(properties)[0]
    start = 2
    while _short(properties, start - 2)[0] & 1:  # more flags follow: no property has one
        start += 2
    if flags & 0x8000:
        message.content_type, start = _shortstr(properties, start)
    if flags & 0x4000:
        message.content_encoding, start = _shortstr(properties, start)
    if flags & 0x2000:
        end = start + 4 + _long(properties, start)[0]
        message.headers = _table(properties[start:end])
        start = end
    if flags & 0x1000:
        message.persistent = properties[start] == _PERSISTENT
        start += 1
    if flags & 0x0800:
        message.priority = properties[start]
        start += 1
    if flags & 0x0400:
        message.correlation_id, start = _shortstr(properties, start)
    if flags & 0x0200:
        message.reply_to, start = _shortstr(properties, start)
    if flags & 0x0100:
        text, start = _shortstr(properties, start)
        message.expiration = _seconds(text)
    if flags & 0x0080:
        message.message_id, start = _shortstr(properties, start)
    if flags & 0x0040:
        message.timestamp = _time(_longlong(properties, start)[0])
        start += 8
    if flags & 0x0020:
        message.type, start = _shortstr(properties, start)
    if flags & 0x0010:
        _, start = _shortstr(properties, start)  # user_id
    if flags & 0x0008:
        message.app_id, start = _shortstr(properties, start)


def _table(encoded: bytes) -> dict[str, Any]:
    try:
        headers: dict[str, Any] = decode.field_table(encoded)[1]
    except Exception as exc:  # pamqp raises what comes: a message must not end the connection
        _log.warning("The headers of a message cannot be decoded, it is taken without: %s", exc)
        return {}
    return headers


def _time(seconds: int) -> datetime | None:
    try:
        return datetime.fromtimestamp(
            seconds if seconds <= _MAX_SECONDS else seconds / 1000,
            UTC,
        )
    except (ValueError, OverflowError, OSError):
        return None


def _seconds(expiration: str | None) -> float | None:
    return int(expiration) / 1000 if expiration and expiration.isdecimal() else None


def message_from(
    properties: Basic.Properties,
    body: bytes,
    *,
    queue: str,
    exchange: str,
    routing_key: str,
) -> Message:
    """Return what pamqp has decoded as a message."""
    return Message(
        body,
        queue,
        exchange,
        routing_key,
        properties.message_id or "",
        properties.correlation_id,
        properties.content_type,
        properties.content_encoding,
        properties.headers or {},
        properties.priority,
        _seconds(properties.expiration),
        properties.timestamp,
        properties.delivery_mode == _PERSISTENT,
        properties.message_type,
        properties.app_id,
        properties.reply_to,
    )
