"""The bytes of one connection: frames that are ours go straight to their channel, others to aiormq.

aiormq reads one frame at a time from a `asyncio.StreamReader`, with three waits and several objects
for each, puts it into its channel's queue, and runs each consumer callback as a task that it
cancels when the channel dies. This reader stands where aiormq's would, which is what a
``TransportFactory`` is for. It cuts what the socket brings into frames, hands deliveries, returns
and confirms of the channels that asked for them to a `Tap`, at once and without a task, and passes
on all others as they came. The layout of frames is that of the AMQP 0-9-1 specification, 2.3.5.
"""

from __future__ import annotations

import asyncio
import io
import logging
import struct
from typing import TYPE_CHECKING, Any, Final

import pamqp.frame
from msgspec import Struct
from pamqp.commands import Connection
from pamqp.exceptions import PAMQPException

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger("aioworkq")

_HANDSHAKE_BYTES: Final = 4096
_TELL_EVERY: Final = 1.0

_FRAME_HEAD: Final = 7
_FRAME_END: Final = 0xCE
_METHOD, _HEADER, _BODY = 1, 2, 3
_HEARTBEAT: Final = b"\x08\x00\x00\x00\x00\x00\x00\xce"
_NO_FRAME: Final = b"AMQP"
_ENDLESS: Final = b"\x03\x00\x00\x00\x00\x00\x01x"
"""A frame without its end, for aiormq to complain of what it finds there."""

_DELIVER: Final = struct.pack(">HH", 60, 60)
_RETURN: Final = struct.pack(">HH", 60, 50)
_GET_OK: Final = struct.pack(">HH", 60, 71)
_GET_EMPTY: Final = struct.pack(">HH", 60, 72)
_ACK: Final = struct.pack(">HH", 60, 80)
_NACK: Final = struct.pack(">HH", 60, 120)
_CONFIRMS: Final = frozenset({_ACK, _NACK})
_CLOSE: Final = struct.pack(">HH", 20, 40)
_ENDS: Final = frozenset({_CLOSE, struct.pack(">HH", 20, 41)})
_PROPERTIES: Final = 12
"""Where the properties begin in a content header: behind class, weight and the body's size."""

_frame_head: Final = struct.Struct(">BHI").unpack_from
_body_size: Final = struct.Struct(">Q").unpack_from
_confirm: Final = struct.Struct(">QB").unpack_from


class Content(Struct, frozen=True):
    """A delivery or a return, as it came.

    Attributes:
        method: The arguments of the method, encoded.
        properties: The flags and the values of the properties, encoded.
        body: The body.
    """

    method: bytes
    properties: bytes
    body: bytes


class Tap:
    """Takes the frames of one channel that are not for aiormq.

    Args:
        on_delivery: Called with each complete delivery; None leaves them to aiormq.
        on_return: Called with each complete return; None leaves them to aiormq.
        on_get: Called with each complete answer to a basic.get, with None for an empty queue; None
            leaves them to aiormq.
        on_confirm: Called with the number in each confirm, whether it is meant for all up to it,
            and whether it is positive; None leaves them to aiormq.

    Attributes:
        has_close: Whether the broker has closed the channel. aiormq tells of it a few steps of the
            event loop later; what is written in between makes RabbitMQ close the connection.
        has_ended: Whether nothing more comes on the channel: its number may be another one's now.
    """

    def __init__(
        self,
        *,
        on_delivery: Callable[[Content], None] | None = None,
        on_return: Callable[[Content], None] | None = None,
        on_get: Callable[[Content | None], None] | None = None,
        on_confirm: Callable[[int, bool, bool], None] | None = None,
    ) -> None:
        self._on_content = {_DELIVER: on_delivery, _RETURN: on_return, _GET_OK: on_get}
        self._on_get = on_get
        self._on_confirm = on_confirm
        self._complete: Callable[[Content], None] | None = None
        self._method = self._properties = b""
        self._body: io.BytesIO | None = None
        self._missing = 0
        self.has_close = False
        self.has_ended = False

    def take(self, kind: int, data: bytes, start: int, end: int) -> bool:
        """Handle the frame whose payload is ``data[start:end]``, and say whether it was ours."""
        if kind == _METHOD:
            return self._take_method(data[start : start + 4], data, start + 4, end)
        if self._complete is None:
            return False
        if kind == _BODY:
            if self._body is None and end - start >= self._missing:
                self._finish(data[start:end])
            else:
                self.add(memoryview(data)[start:end])
                self.end_frame()
        elif kind == _HEADER:
            self._properties = data[start + _PROPERTIES : end]
            self._missing = _body_size(data, start + 4)[0]
            if not self._missing:
                self._finish(b"")
        return True

    @property
    def takes_body(self) -> bool:
        """Whether the body of what came last is ours."""
        return self._complete is not None

    def add(self, part: memoryview) -> None:
        """Take a part of the body, which may end within a frame."""
        if self._body is None:
            # It hands out what it holds, where joining parts would copy them once more.
            self._body = io.BytesIO()
        self._missing -= self._body.write(part)

    def end_frame(self) -> None:
        """Take note that a frame of the body is through."""
        if self._missing <= 0:
            self._finish(self._body.getvalue() if self._body is not None else b"")

    def _take_method(self, method: bytes, data: bytes, start: int, end: int) -> bool:
        complete = self._on_content.get(method)
        if complete is not None:
            self._complete = complete
            self._method = data[start:end]
            return True
        if self._on_confirm is not None and method in _CONFIRMS:
            number, bits = _confirm(data, start)
            self._on_confirm(number, bool(bits & 1), method == _ACK)
            return True
        if method == _GET_EMPTY and self._on_get is not None:
            self._on_get(None)
            return True
        self.has_close |= method == _CLOSE
        self.has_ended |= method in _ENDS
        return False

    def _finish(self, body: bytes) -> None:
        complete, content = self._complete, Content(self._method, self._properties, body)
        self._complete = self._body = None
        if complete is not None:
            complete(content)


class FrameReader(asyncio.StreamReader):
    """A reader that takes the frames of some channels out of the stream.

    It also remembers the last bytes of the handshake: aiormq 7.2 drops the broker's reason when it
    refuses a virtual host ("Expected one of ['Connection.OpenOk']"); `refusal` finds it again.
    """

    def __init__(self, *, limit: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limit=limit, loop=loop)
        self._time = loop.time
        self._tail: bytes | None = b""
        self._taps: dict[int, Tap] = {}
        self._parts: list[bytes] = []
        self._have = 0
        self._need = _FRAME_HEAD
        self._is_raw = False
        self._tell_at = 0.0
        self._open: Tap | None = None
        self._left = 0

    def tap(self, channel: int, tap: Tap) -> None:
        """Hand the frames of a channel to a tap, until the channel's end on the wire."""
        self._taps[channel] = tap

    def feed_data(self, data: Any) -> None:
        """Take bytes from the socket."""
        data = bytes(data)
        if self._tail is not None:
            self._tail = (self._tail + data)[-_HANDSHAKE_BYTES:]
        if self._is_raw:
            super().feed_data(data)
            return
        self._have += len(data)
        if self._parts:
            self._parts.append(data)
            if self._have < self._need:
                return
            data = b"".join(self._parts)
            self._parts.clear()
        try:
            done = self._split(data, self._go_on(data, 0))
        except Exception as exc:  # an error of ours must not end the connection in silence
            _log.exception("aioworkq failed on a frame of RabbitMQ: please report this.")
            self._taps.clear()
            self._is_raw = True
            self.set_exception(exc)
            return
        self._have = len(data) - done
        if self._have:
            self._parts.append(data[done:])

    def _split(self, data: bytes, position: int) -> int:
        """Deal with all complete frames, and return where the incomplete one begins."""
        taps = self._taps
        size = len(data)
        passed = position
        has_taken = position > 0
        opened: Tap | None = None
        self._need = _FRAME_HEAD
        while size - position >= _FRAME_HEAD:
            kind, channel, length = _frame_head(data, position)
            end = position + _FRAME_HEAD + length
            if end >= size:
                self._need = _FRAME_HEAD + length + 1
                self._is_raw = data.startswith(_NO_FRAME, position)
                opened, self._left = self._taker_of(kind, channel), length
                break
            if data[end] != _FRAME_END:
                self._is_raw = True
                break
            tap = taps.get(channel)
            if tap is not None:
                if tap.take(kind, data, position + _FRAME_HEAD, end):
                    has_taken = True
                    if passed < position:
                        super().feed_data(data[passed:position])
                    passed = end + 1
                elif tap.has_ended:
                    del taps[channel]
            position = end + 1
        if self._is_raw:
            # Another version of AMQP, or garbage: aiormq says what is wrong with it.
            position = size
        if passed < position:
            super().feed_data(data[passed:position])
        elif has_taken:
            self._tell()
        if opened is None:
            return position
        self._open = opened
        return self._go_on(data, position + _FRAME_HEAD)

    def _taker_of(self, kind: int, channel: int) -> Tap | None:
        """Return whose a frame is that is not complete, if it is a body's and ours."""
        tap = self._taps.get(channel)
        return tap if kind == _BODY and tap is not None and tap.takes_body else None

    def _go_on(self, data: bytes, start: int) -> int:
        """Hand on what has come of a body's frame that is not complete, if there is one.

        So most of a large body is copied once only, to where it is put together.

        Returns:
            Where the rest begins.
        """
        if self._open is None:
            return start
        end = min(start + self._left, len(data))
        self._open.add(memoryview(data)[start:end])
        self._left -= end - start
        if end == len(data):
            return end
        tap, self._open = self._open, None
        if data[end] != _FRAME_END:
            self._is_raw = True
            super().feed_data(_ENDLESS + data[end:])
            return len(data)
        tap.end_frame()
        return end + 1

    def _tell(self) -> None:
        """Let aiormq know that the peer lives: it waits for frames, and does not see ours."""
        now = self._time()
        if now >= self._tell_at:
            self._tell_at = now + _TELL_EVERY
            super().feed_data(_HEARTBEAT)

    def feed_eof(self) -> None:
        """Take note that nothing comes any more; what is incomplete is aiormq's to complain of."""
        if self._parts:
            super().feed_data(b"".join(self._parts))
            self._parts.clear()
        elif self._open is not None:
            super().feed_data(_ENDLESS)
        super().feed_eof()

    def end_handshake(self) -> None:
        """Stop remembering."""
        self._tail = None

    def refusal(self) -> tuple[int, str] | None:
        """Return code and text of the Connection.Close that the broker sent last, if it did."""
        tail = self._tail or b""
        start = tail.rfind(b"\x01\x00\x00")
        while start >= 0:
            try:
                _, _, frame = pamqp.frame.unmarshal(tail[start:])
            except (PAMQPException, ValueError, IndexError, KeyError):
                frame = None
            if isinstance(frame, Connection.Close):
                return frame.reply_code or 0, frame.reply_text or ""
            start = tail.rfind(b"\x01\x00\x00", 0, start)
        return None
