"""A confirm channel: publications out, confirms and returns in.

Publications are numbered and written in the same order, one write per step of the event loop, or a
few where there are many. A confirm for many (``multiple``) takes them off the front. A return comes
before its own confirm (https://www.rabbitmq.com/docs/confirms#when-publishes-are-confirmed); it is
told apart by the message id, and where the same id is in flight twice, by a header with the number.

``documented.py`` does the same by documented calls of aiormq alone.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

import anyio
from aiormq.exceptions import ChannelClosed, ChannelNotFoundEntity
from msgspec import structs

from aioworkq.amqp.decode import message_of, return_of
from aioworkq.amqp.reader import Content, Tap
from aioworkq.amqp.translate import closing_exception, describe
from aioworkq.amqp.wire import Wire, encode
from aioworkq.amqp.writer import TickWriter
from aioworkq.broker import Confirm, Publication

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from aiormq.abc import AbstractChannel

    from aioworkq.amqp.transport import Link
    from aioworkq.amqp.writer import Writer

_log = logging.getLogger("aioworkq")

_NUMBER_HEADER: Final = "x-aioworkq-publish-number"
_PIECE: Final = 128 * 6
"""So many parts of frames, those of 128 small messages, do not wait for the end of a step: RabbitMQ
works on them meanwhile."""
_LARGE: Final = 64 * 1024
"""Nor does a body of so many bytes: several together are more than a processor's cache holds."""
_ACK: Final = Confirm.ACK
"""To look up a member of an Enum takes 80 ns before Python 3.12."""
NEGATIVE: Final = "RabbitMQ sent a negative confirm"


class AmqpPublishChannel:
    """The `aioworkq.broker.PublishChannel` of RabbitMQ."""

    def __init__(self, channel: AbstractChannel, *, link: Link | None, frame_max: int) -> None:
        self._channel = channel
        self._frame_max = frame_max
        self._number = 0
        self._unconfirmed: dict[int, Publication] = {}
        self._by_message_id: dict[str, int] = {}
        self._returned: dict[int, str] = {}
        self._buffer: list[bytes | memoryview] = []
        self._writer = self.attach(link)
        self._lost = asyncio.Event()
        self._reason = ""
        self._refusal: Confirm | None = None
        self._is_taken = False
        self._closing = channel.closing
        self._closing.add_done_callback(self._on_closing)

    def attach(self, link: Link | None) -> Writer:
        """Have confirms and returns come, and return what sends."""
        if link is None:
            raise TypeError("this channel needs the link of its connection.")
        tap = Tap(on_return=self._on_return, on_confirm=self._on_confirm)
        link.reader.tap(self._channel.number, tap)
        return TickWriter(link, tap, self._take_buffer)

    def send(self, publication: Publication) -> None:
        """Send without waiting; see the protocol."""
        number = self._number + 1
        message_id = publication.message.message_id
        wire: Wire = publication.wire
        try:
            if (
                message_id in self._by_message_id
                # A copy of a message that had it: the number would be another one's.
                or _NUMBER_HEADER in publication.message.headers
            ):
                wire = self._with_number(publication, number)
            frames = wire.frames(self._channel.number, self._frame_max)
        except (ValueError, TypeError) as exc:
            publication.settle(Confirm.UNSENDABLE, str(exc))
            return
        self._number = number
        self._unconfirmed[number] = publication
        self._by_message_id.setdefault(message_id, number)
        if not self._lost.is_set():
            self._buffer += frames
            self._writer.wake()
            if len(self._buffer) >= _PIECE or len(wire.body) >= _LARGE:
                self._writer.push()

    def _with_number(self, publication: Publication, number: int) -> Wire:
        message = publication.message
        headers = {**message.headers, _NUMBER_HEADER: number}
        copy = structs.replace(message, headers=headers)
        return encode(copy, frame_max=self._frame_max, max_message_size=len(message.body))

    def _take_buffer(self) -> bytes:
        payload = b"".join(self._buffer)
        self._buffer.clear()
        return payload

    def _on_confirm(self, last: int, multiple: bool, is_ack: bool) -> None:  # noqa: FBT001 - of Tap
        confirm = _ACK if is_ack else Confirm.NACK
        if not multiple:
            self._settle(last, confirm)
            return
        covered: list[int] = []
        for number in self._unconfirmed:
            if number > last:
                break
            covered.append(number)
        for number in covered:
            self._settle(number, confirm)

    def _settle(self, number: int, confirm: Confirm) -> None:
        publication = self._unconfirmed.pop(number, None)
        if publication is None:
            if not self._is_taken:  # else it is late: the message goes out again elsewhere
                _log.error("RabbitMQ confirmed number %d, which is not in flight.", number)
            return
        message_id = publication.message.message_id
        if self._by_message_id.get(message_id) == number:
            del self._by_message_id[message_id]
        returned = self._returned.pop(number, None) if self._returned else None
        if returned is not None:
            publication.settle(Confirm.RETURNED, returned)
        else:
            publication.settle(confirm, "" if confirm is _ACK else NEGATIVE)

    def _on_return(self, content: Content) -> None:
        message = message_of(content.properties, b"", queue="", exchange="", routing_key="")
        number = message.headers.get(_NUMBER_HEADER)
        if not isinstance(number, int) or number not in self._unconfirmed:
            number = self._by_message_id.get(message.message_id)
        reason = return_of(content.method)
        if number is None:
            _log.error("RabbitMQ returned a message that is not in flight: %s.", reason)
            return
        self._returned[number] = reason

    def _on_closing(self, future: asyncio.Future[Any]) -> None:
        error = closing_exception(future)
        if isinstance(error, ChannelClosed) and error.args[0] is not None:
            not_found = isinstance(error, ChannelNotFoundEntity)
            self._refusal = Confirm.RETURNED if not_found else Confirm.NACK
        self.lose(describe(error))

    def lose(self, reason: str) -> None:
        """Take note that the channel is of no more use."""
        if not self._lost.is_set():
            self._reason = reason
            self._writer.close()
            self._lost.set()

    @property
    def refusal(self) -> Confirm | None:
        """What the broker's closing of the channel means for its message; see the protocol."""
        return self._refusal

    async def wait_lost(self) -> str:
        """Wait until the channel is unusable, and return why."""
        await self._lost.wait()
        return self._reason

    def take_unconfirmed(self) -> list[Publication]:
        """Return what was sent and not answered, in order, and forget it."""
        self._is_taken = True
        left = list(self._unconfirmed.values())
        self._unconfirmed.clear()
        self._by_message_id.clear()
        self._returned.clear()
        self._buffer.clear()
        return left

    async def aclose(self, *, timeout: float) -> None:
        """Close the channel. Bounded, twice harmless. Meanwhile it still settles."""
        # After a Channel.Close nothing may follow on it: RabbitMQ would close the connection.
        self._writer.close()
        await close_bounded(self._channel, timeout=timeout)
        self._lost.set()


async def close_bounded(
    channel: AbstractChannel,
    *,
    timeout: float,
    close: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> None:
    """Close a channel, by a way of its own if it has one; give up after ``timeout`` seconds.

    A cancelled scope does not interrupt it: a channel left open would go on receiving deliveries
    that nobody sees. What is given up on goes on in the background; the end of its connection
    ends it at last.
    """
    if channel.is_closed:
        return
    task = asyncio.ensure_future(close() if close else channel.close())
    task.add_done_callback(_retrieve)
    with anyio.CancelScope(shield=True):
        await asyncio.wait({task}, timeout=timeout)


def _retrieve(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()
