"""Messages as AMQP 0-9-1 frames.

The three frames of a publication are put together here by hand: pamqp builds four objects for each,
which costs more than everything else that publishing does, rounds floats in headers to 32 bits and
cuts long header names. The layout is that of the AMQP 0-9-1 specification, sections 2.3.5 (frames),
2.3.5.2 (content) and 1.8 (basic), and of RabbitMQ's errata for the types of table fields.
"""

from __future__ import annotations

import functools
import math
import struct
from datetime import datetime
from decimal import Context, Decimal
from typing import TYPE_CHECKING, Any, Final, cast

from msgspec import Struct

from aioworkq.errors import check_number, is_whole
from aioworkq.message import raw

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioworkq.message import Message

DEFAULT_FRAME_MAX: Final = 131_072
"""RabbitMQ's default limit of one frame in bytes; a connection may negotiate another."""

_FRAME_OVERHEAD: Final = 8
_FRAME_END: Final = b"\xce"
_METHOD, _HEADER, _BODY = 1, 2, 3
_MAX_SHORTSTR: Final = 255
_MAX_EXPIRATION_MS: Final = 2**32 - 1
_MAX_OCTET: Final = 255

_frame_head: Final = struct.Struct(">BHI").pack
_end_and_head: Final = struct.Struct(">BBHI").pack
_header_head: Final = struct.Struct(">HHQH").pack
_long: Final = struct.Struct(">I").pack
_signed: Final = struct.Struct(">i").pack
_longlong: Final = struct.Struct(">Q").pack
_double: Final = struct.Struct(">d").pack
_settle: Final = struct.Struct(">BHIHHQBB").pack

_BASIC: Final = 60
_OCTETS: Final = tuple(bytes((number,)) for number in range(256))
_PUBLISH_HEAD: Final = struct.pack(">HHH", _BASIC, 40, 0)
_MANDATORY: Final = b"\x01"
_GET_HEAD: Final = struct.pack(">HHH", _BASIC, 70, 0)
_ACK_EXPECTED: Final = b"\x00"
_ACK, _REJECT, _NACK = 80, 90, 120
_REQUEUE_OF_REJECT: Final = 1
_REQUEUE_OF_NACK: Final = 2


class Wire(Struct, frozen=True, gc=False):
    """A publication without its channel number: the payloads of its frames."""

    method: bytes
    header: bytes
    body: bytes

    def frames(self, channel: int, frame_max: int) -> Sequence[bytes | memoryview]:
        """Return the frames in parts, to be written one after the other.

        Raises:
            ValueError: The header frame is larger than this connection allows.
        """
        method, header, body = self.method, self.header, self.body
        room = frame_max - _FRAME_OVERHEAD
        if len(header) > room:
            raise ValueError(too_large_header(len(header), frame_max))
        head = _frame_head(_HEADER, channel, len(header))
        if 0 < len(body) <= room:
            body_head = _end_and_head(0xCE, _BODY, channel, len(body))
            return (_method_frame(channel, method), head, header, body_head, body, _FRAME_END)
        parts: list[bytes | memoryview] = [_method_frame(channel, method), head, header]
        whole = memoryview(body)
        for start in range(0, len(body), room):
            chunk = whole[start : start + room]
            parts += (_end_and_head(0xCE, _BODY, channel, len(chunk)), chunk)
        parts.append(_FRAME_END)
        return parts


@functools.lru_cache(maxsize=1024)
def _method_frame(channel: int, method: bytes) -> bytes:
    return b"".join((_frame_head(_METHOD, channel, len(method)), method, _FRAME_END))


def too_large_header(size: int, frame_max: int) -> str:
    """Return the sentence for a header frame that the broker would not take."""
    return (
        f"the message's properties and headers take {size} bytes: RabbitMQ takes at most "
        f"{frame_max - _FRAME_OVERHEAD} in one header frame. Put large values into the body."
    )


def encode(message: Message, *, frame_max: int, max_message_size: int) -> Wire:
    """Encode a publication, mandatory, and check that the broker can take it.

    Raises:
        ValueError: It is too large, or a name too long.
        TypeError: A header has a value that AMQP does not know.
    """
    if len(message.body) > max_message_size:
        raise ValueError(
            f"the body has {len(message.body)} bytes: at most {max_message_size} are allowed. "
            "Store large data elsewhere and publish a reference, or raise max_message_size here "
            "and max_message_size in RabbitMQ.",
        )
    method = _publish(message.exchange, message.routing_key or message.queue)
    header = _content_header(message)
    if len(header) + _FRAME_OVERHEAD > frame_max:
        raise ValueError(too_large_header(len(header), frame_max))
    return Wire(method, header, message.body)


@functools.lru_cache(maxsize=1024)
def _publish(exchange: str, routing_key: str) -> bytes:
    """Return the method; most messages go to few queues."""
    return b"".join(
        (
            _PUBLISH_HEAD,
            _shortstr("exchange", exchange),
            _shortstr("routing key", routing_key),
            _MANDATORY,
        ),
    )


def _content_header(message: Message) -> bytes:
    if (
        message.headers
        or message.priority is not None
        or message.correlation_id is not None
        or message.reply_to is not None
        or message.expiration is not None
        or message.type is not None
        or message.app_id is not None
        or message.timestamp is None
        or not message.message_id
        or not message.persistent
    ):
        return _full_content_header(message)
    # What most messages have, in less time.
    flags, values = _content(message.content_type, message.content_encoding)
    return b"".join(
        (
            _header_head(_BASIC, 0, len(message.body), flags | 0x00C0),
            values,
            b"\x02",
            _shortstr("message_id", message.message_id),
            _timestamp(message.timestamp),
        ),
    )


def _full_content_header(message: Message) -> bytes:
    flags, values = _content(message.content_type, message.content_encoding)
    if message.headers:
        flags |= 0x2000
        values += _headers(message.headers)
    values += b"\x02" if message.persistent else b"\x01"
    if message.priority is not None:
        if not is_whole(message.priority):
            raise TypeError(f"priority is {message.priority!r}: it must be an int.")
        if not 0 <= message.priority <= _MAX_OCTET:
            raise ValueError(f"priority is {message.priority}: it must be from 0 to 255.")
        flags |= 0x0800
        values += _OCTETS[message.priority]
    if message.correlation_id is not None:
        flags |= 0x0400
        values += _shortstr("correlation_id", message.correlation_id)
    if message.reply_to is not None:
        flags |= 0x0200
        values += _shortstr("reply_to", message.reply_to)
    if message.expiration is not None:
        flags |= 0x0100
        values += _shortstr("expiration", expiration_ms(message.expiration))
    if message.message_id:
        flags |= 0x0080
        values += _shortstr("message_id", message.message_id)
    if message.timestamp is not None:
        flags |= 0x0040
        values += _timestamp(message.timestamp)
    if message.type is not None:
        flags |= 0x0020
        values += _shortstr("type", message.type)
    if message.app_id is not None:
        flags |= 0x0008
        values += _shortstr("app_id", message.app_id)
    return _header_head(_BASIC, 0, len(message.body), flags) + values


@functools.lru_cache(maxsize=16)
def _timestamp(time: datetime) -> bytes:
    """Return a message's time, in UTC. A producer gives all messages of one step the same."""
    return _seconds(time)


def _seconds(time: datetime) -> bytes:
    return _longlong(max(0, int(time.timestamp())))


def expiration_ms(expiration: float) -> str:
    """Return an expiration as AMQP wants it, rounded up to whole milliseconds.

    Raises:
        ValueError: It is negative or longer than the 49 days that RabbitMQ takes.
    """
    check_number("expiration", expiration)
    if not 0 <= expiration * 1000 <= _MAX_EXPIRATION_MS:
        raise ValueError(
            f"expiration is {expiration} seconds: it must be from 0 to "
            f"{_MAX_EXPIRATION_MS / 1000}.",
        )
    return str(-int(-expiration * 1000 // 1))


def _shortstr(what: str, text: str) -> bytes:
    try:
        encoded = text.encode() if type(text) is str else raw(text)
    except UnicodeEncodeError as exc:
        raise _not_unicode(what) from exc
    size = len(encoded)
    if size > _MAX_SHORTSTR:
        raise ValueError(f"the {what} has {size} bytes: AMQP allows at most 255.")
    return _OCTETS[size] + encoded


@functools.lru_cache(maxsize=256)
def _content(content_type: str | None, content_encoding: str | None) -> tuple[int, bytes]:
    """Return the flags and values of what is the same in most messages."""
    flags, values = 0x1000, b""
    if content_type is not None:
        flags |= 0x8000
        values += _shortstr("content type", content_type)
    if content_encoding is not None:
        flags |= 0x4000
        values += _shortstr("content encoding", content_encoding)
    return flags, values


def _headers(headers: dict[str, Any]) -> bytes:
    try:
        return _table(headers)
    except RecursionError as exc:
        raise ValueError("headers that contain themselves cannot be encoded.") from exc


def _table(table: dict[str, Any]) -> bytes:
    encoded = b"".join(_field_name(name) + _field(name, value) for name, value in table.items())
    return _long(len(encoded)) + encoded


def _field_name(name: Any) -> bytes:
    if not isinstance(name, str):
        raise TypeError(f"a header's name is a str, not {type(name).__name__}.")
    encoded = _utf8(f"header name {name[:40]!r}", name)
    size = len(encoded)
    if size > _MAX_SHORTSTR:
        raise ValueError(f"header name {name[:40]!r}… has {size} bytes: RabbitMQ takes 255.")
    return _OCTETS[size] + encoded


def _field(name: str, value: Any) -> bytes:
    match value:
        case None:
            return b"V"
        case bool():
            return b"t\x01" if value else b"t\x00"
        case int() if -(2**63) <= value < 2**63:
            return b"l" + value.to_bytes(8, "big", signed=True)
        case float() if math.isfinite(value):
            return b"d" + _double(value)
        case float():
            raise ValueError(
                f"header {name!r} is {value}: RabbitMQ closes the connection over a float that is "
                "no finite number.",
            )
        case str():
            text = _utf8(f"header {name!r}", value)
            return b"S" + _long(len(text)) + text
        case Decimal():
            return b"D" + _decimal(name, value)
        case bytes() | bytearray():
            return b"x" + _long(len(value)) + value
        case datetime():
            return b"T" + _seconds(value)
        case dict():
            return b"F" + _table(cast("dict[str, Any]", value))
        case list() | tuple():
            items = b"".join(_field(name, item) for item in cast("list[Any]", value))
            return b"A" + _long(len(items)) + items
        case _:
            raise TypeError(
                f"header {name!r} is {value!r:.60}: AMQP takes str, int of 64 bits, float, bool, "
                "None, bytes, datetime, Decimal, and lists and dicts of them.",
            )


def _decimal(name: str, value: Decimal) -> bytes:
    """Return the number of decimal places in one byte, and the digits as a number in four."""
    exponent = value.as_tuple().exponent
    if isinstance(exponent, int) and abs(exponent) <= _MAX_OCTET:  # a number, neither NaN nor ∞
        places = max(0, -exponent)
        number = int(value.scaleb(places, Context(prec=_MAX_OCTET)))
        if -(2**31) <= number < 2**31:
            return _OCTETS[places] + _signed(number)
    raise ValueError(f"header {name!r} is {value}: AMQP takes a Decimal of 32 bits.")


def _utf8(what: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as exc:
        raise _not_unicode(what) from exc


def _not_unicode(what: str) -> ValueError:
    return ValueError(f"the {what} is not valid Unicode text.")


def ack_frame(channel: int, tag: int, *, multiple: bool) -> bytes:
    """Return a basic.ack."""
    return _settle(_METHOD, channel, 13, _BASIC, _ACK, tag, multiple, 0xCE)


def get_frame(channel: int, queue: str) -> bytes:
    """Return a basic.get, whose message has to be acked.

    Raises:
        ValueError: The name is too long.
    """
    method = b"".join((_GET_HEAD, _shortstr("queue's name", queue), _ACK_EXPECTED))
    return b"".join((_frame_head(_METHOD, channel, len(method)), method, _FRAME_END))


def requeue_frame(channel: int, tag: int, *, counts: bool) -> bytes:
    """Return a basic.reject, which counts as a failure, or a basic.nack; both requeue."""
    if counts:
        return _settle(_METHOD, channel, 13, _BASIC, _REJECT, tag, _REQUEUE_OF_REJECT, 0xCE)
    return _settle(_METHOD, channel, 13, _BASIC, _NACK, tag, _REQUEUE_OF_NACK, 0xCE)
