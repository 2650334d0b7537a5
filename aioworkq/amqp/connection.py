"""A connection to RabbitMQ that comes back by itself, and the channels opened on it.

aio-pika's `RobustConnection` is the reconnecting transport, used through its public names only:
built as an object so that a cancelled connect can be closed, ``fail_fast`` off so that its loop
owns every attempt, its ``url`` and ``reconnect_interval`` set from its own ``close_callbacks`` to
rotate hosts with a jittered backoff. Its robust channels, queues and consumers are not used: they
cancel handlers, hang and go deaf (``docs/explanation/internals.md``). Plain aiormq channels are
opened on the transport instead, and every call on them is bounded and raced against their end.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import anyio
from aio_pika import RobustConnection
from aiormq import exceptions as aiormq_errors

from aioworkq.amqp.channel_numbers import ChannelNumbers
from aioworkq.amqp.declare import (
    ACCESS_REFUSED,
    NOT_FOUND,
    declare_on,
    delete,
    look_for,
    may_be_looked_for,
)
from aioworkq.amqp.features import explain, missing_names
from aioworkq.amqp.publish_channel import AmqpPublishChannel, close_bounded
from aioworkq.amqp.subscription import AmqpSubscription
from aioworkq.amqp.translate import closing_exception, describe, guarded, refusal, retrieve
from aioworkq.amqp.transport import BoundedTransportFactory
from aioworkq.amqp.url import display, parse_urls
from aioworkq.amqp.wire import DEFAULT_FRAME_MAX, Wire, encode
from aioworkq.changes import Changes
from aioworkq.errors import AccessRefusedError, ConnectionLostError, TopologyError
from aioworkq.topology import QueueDeclaration
from aioworkq.versions import semantics_of

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    from aiormq.abc import AbstractChannel, AbstractConnection

    from aioworkq.amqp.getter import AmqpGetter
    from aioworkq.amqp.transport import Link
    from aioworkq.broker import Event, Incoming, Subscription
    from aioworkq.message import Message
    from aioworkq.topology import Declaration
    from aioworkq.versions import Semantics

_log = logging.getLogger("aioworkq")

_BACKOFF_FIRST: Final = 0.1
_BACKOFF_MAX: Final = 5.0
_SETTLED_AFTER: Final = 5.0
"""A connection that lived so many seconds was a good one: the backoff starts anew after it."""
_ABORT_GRACE: Final = 1.0
_FORBIDDEN: Final = frozenset({403, 530})
_AT_A_TIME: Final = 8
"""So many queues are declared, or consumed from, at a time. aiormq's queue of what is to be written
has room for ten frames, and where it is full, the answer to a Channel.Close is dropped without a
word: RabbitMQ then closes the connection when the channel's number is used again."""
_TURN: Final = 2.0
"""Seconds until it is the next one's turn, if the broker does not answer: nothing is written."""


class AmqpConnection:
    """The `aioworkq.broker.Connection` of RabbitMQ.

    Args:
        urls: One URL, or several hosts of one cluster, tried in turn.
        name: Shown in RabbitMQ's list of connections.
        heartbeat: Seconds; a dead peer is noticed after three times as many, plus three.
        connect_timeout: Seconds for one attempt, the AMQP handshake included.
        ssl_context: For ``amqps://``; None for the system's certificate authorities.
        max_message_size: Bodies may have so many bytes.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        name: str,
        heartbeat: int,
        connect_timeout: float,
        ssl_context: ssl.SSLContext | None,
        max_message_size: int,
    ) -> None:
        self._urls = parse_urls(urls)
        in_clear = [display(url) for url in self._urls if url.scheme != "amqps"]
        if ssl_context is not None and in_clear:
            raise ValueError(
                f"ssl_context is given, but {in_clear[0]} is without TLS: write it as amqps://.",
            )
        access = {(url.raw_user, url.raw_password, url.raw_path) for url in self._urls}
        self._have_same_access = len(access) == 1
        self._name = name
        self._heartbeat = heartbeat
        self._connect_timeout = connect_timeout
        self._ssl_context = ssl_context
        self._max_message_size = max_message_size
        self._transport = BoundedTransportFactory(timeout=connect_timeout)
        self._robust: RobustConnection | None = None
        self._current: AbstractConnection | None = None
        self._frame_max = DEFAULT_FRAME_MAX
        self._link: Link | None = None
        self._changes = Changes()
        self._tasks: list[asyncio.Task[None]] = []
        self._going_on: set[asyncio.Task[None]] = set()
        self._numbers = ChannelNumbers()
        self._turns = asyncio.Semaphore(_AT_A_TIME)
        self._attempt_ended: asyncio.Event | None = None
        self._failures = 0
        self._refusals = 0
        self._connected_at = 0.0
        self._connects = 0
        self._last_error = ""
        self._refused: ConnectionLostError | None = None
        self._is_closed = False

    def __repr__(self) -> str:
        hosts = ", ".join(display(url) for url in self._urls)
        return f"<AmqpConnection {self._name!r} to {hosts}>"

    async def start(self) -> None:
        """Begin to connect; does not wait for it."""
        if self._robust is not None or self._is_closed:
            return
        self._attempt_ended = asyncio.Event()
        query = {"heartbeat": str(self._heartbeat)}
        self._urls = tuple(url.with_query({**query, **url.query}) for url in self._urls)
        robust = RobustConnection(
            self._urls[0],
            ssl_context=self._ssl_context,
            client_properties={"connection_name": self._name, "product": "aioworkq"},
            fail_fast="0",
            reconnect_interval=_BACKOFF_FIRST,
        )
        robust.kwargs["transport_factory"] = self._transport
        robust.close_callbacks.add(self._on_attempt_ended)
        self._robust = robust
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._connect(robust), name="aioworkq connects"),
            loop.create_task(self._watch(robust), name="aioworkq watches its connection"),
        ]

    async def _connect(self, robust: RobustConnection) -> None:
        await robust.connect(timeout=self._connect_timeout)

    async def _watch(self, robust: RobustConnection) -> None:
        """Follow the transport from connection to connection."""
        ended = self._attempt_ended
        if ended is None:  # pragma: no cover - start() made it
            return
        while True:
            await robust.connected.wait()
            # Cleared before looking: an end after this point sets it again.
            ended.clear()
            transport = robust.transport
            if transport is None or not robust.connected.is_set():
                await asyncio.sleep(0)
                continue
            connection = transport.connection
            self._set_connected(connection)
            closing = connection.closing
            closing.add_done_callback(self._on_closing)
            await ended.wait()
            self._set_lost("")

    def _on_closing(self, future: asyncio.Future[Any]) -> None:
        self._set_lost(describe(closing_exception(future)))

    def _on_attempt_ended(self, _: object, exc: BaseException | None) -> None:
        """Choose host and pause for the next attempt; called for each failure and each loss."""
        robust, ended = self._robust, self._attempt_ended
        if robust is None or ended is None:  # pragma: no cover - start() made them
            return
        was_connected = self._connects > 0 and self._connected_at > 0
        if was_connected:
            lived = asyncio.get_running_loop().time() - self._connected_at
            self._connected_at = 0.0
            self._failures = 0 if lived >= _SETTLED_AFTER else self._failures + 1
        else:
            self._failures += 1
        if self._is_closed:
            ended.set()
            return
        self._judge(exc, was_connected=was_connected)
        hosts = len(self._urls)
        robust.url = self._urls[self._failures % hosts]
        rounds = self._failures // hosts
        pause = min(_BACKOFF_MAX, _BACKOFF_FIRST * 2.0 ** min(rounds, 20))
        if self._failures % hosts and hosts > 1:
            pause = _BACKOFF_FIRST
        robust.reconnect_interval = pause * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
        self._set_lost(self._last_error)
        ended.set()

    def _judge(self, exc: BaseException | None, *, was_connected: bool) -> None:
        """Remember why an attempt failed, and whether another one can ever succeed."""
        reason = describe(exc)
        if was_connected:
            self._last_error = reason
            self._refusals = 0
            return
        refusal_text: str | None = None
        refused = self._transport.refusal()
        if refused is not None:
            reason = refused[1]
            if refused[0] in _FORBIDDEN:
                refusal_text = reason
        elif isinstance(exc, aiormq_errors.ProbableAuthenticationError):
            refusal_text = reason
        elif isinstance(exc, aiormq_errors.AuthenticationError):
            refusal_text = reason = "no authentication mechanism is common to both sides"
        self._last_error = reason
        if refusal_text is not None:
            self._refusals += 1
        elif not self._have_same_access:
            self._refusals = 0  # it may be right for this host, once it answers
        where = display(self._robust.url) if self._robust is not None else "RabbitMQ"
        what = f"connecting to {where}"
        if refusal_text is not None and self._refusals >= len(self._urls):
            self._refuse(AccessRefusedError(what, reason=refusal_text))
        elif self._connects == 0 and len(self._urls) == 1 and _is_tls_refusal(exc):
            self._refuse(ConnectionLostError(what, reason=reason))

    def _refuse(self, error: ConnectionLostError) -> None:
        self._refused = error
        self._changes.notify()
        if self._robust is not None:
            # Trying again cannot help, and may get the user locked out.
            stop = asyncio.get_running_loop().create_task(self._robust.close())
            self._tasks.append(stop)
            stop.add_done_callback(retrieve)

    def _raise_refused(self) -> None:
        """Raise the error of a connection that can never be: a new one for everybody."""
        if self._refused is not None:
            raise type(self._refused)(self._refused.what, reason=self._refused.reason)

    def _set_connected(self, connection: AbstractConnection) -> None:
        self._transport.end_handshake()
        self._current = connection
        self._frame_max = _frame_max_of(connection)
        self._link = self._transport.link
        self._connects += 1
        self._refusals = 0
        self._connected_at = asyncio.get_running_loop().time()
        self._changes.notify()

    def _set_lost(self, reason: str) -> None:
        if self._current is not None:
            self._current = None
            self._last_error = reason or self._last_error
            self._changes.notify()

    async def wait_connected(self) -> None:
        """Wait until it is usable; see the protocol."""
        while True:
            self._raise_refused()
            if self._is_closed:
                raise ConnectionLostError("connecting to RabbitMQ", reason="this side closed it")
            if self._current is not None and not self._current.is_closed:
                return
            await self._changes.wait()

    @property
    def is_connected(self) -> bool:
        """Whether it is usable, as far as is known."""
        return self._current is not None and not self._current.is_closed

    @property
    def is_blocked(self) -> bool:
        """Whether the broker blocks publishers (memory or disk alarm).

        aiormq tells only through ``ready()``, which waits while the connection is blocked: it is
        asked without waiting, by taking its first step.
        """
        connection = self._current
        if connection is None or connection.is_closed:
            return False
        probe = connection.ready()
        try:
            probe.send(None)
        except StopIteration:
            return False
        probe.close()
        return True

    @property
    def reconnects(self) -> int:
        """How often it came back after a loss."""
        return max(0, self._connects - 1)

    @property
    def last_error(self) -> str:
        """Why it was last lost or not made; empty if neither happened."""
        return self._last_error

    @property
    def counts_nacks(self) -> bool:
        """Whether a quorum queue counts a delivery that is nacked (RabbitMQ before 4.3)."""
        return self._semantics.counts_nack

    @property
    def keeps_refusing(self) -> bool:
        """Whether a queue that refuses all on a channel may take it on another one."""
        return self._semantics.keeps_refusing

    @property
    def _semantics(self) -> Semantics:
        properties = getattr(self._current, "server_properties", {})
        return semantics_of(str(properties.get("version", "")))

    def now(self) -> datetime:
        """Return the time, aware."""
        return datetime.now(UTC)

    async def sleep(self, seconds: float, *, until: Event | None = None) -> None:
        """Wait for so many seconds, or until an event is set."""
        if until is None:
            await anyio.sleep(seconds)
            return
        with anyio.move_on_after(seconds):
            await until.wait()

    def prepare(self, message: Message) -> Wire:
        """Encode all that does not depend on a channel; see the protocol."""
        return encode(
            message,
            frame_max=self._frame_max,
            max_message_size=self._max_message_size,
        )

    def _require(self, what: str) -> AbstractConnection:
        self._raise_refused()
        if self._current is None or self._current.is_closed:
            raise ConnectionLostError(what, reason=self._last_error)
        return self._current

    async def _open_channel(
        self,
        what: str,
        *,
        confirms: bool,
        frame_buffer: int,
        timeout: float,
    ) -> AbstractChannel:
        connection = self._require(what)
        # Without a time limit of aiormq's: it waits by `asyncio.wait_for`, which on Python 3.11 may
        # forget the cancellation of a call that it delays. `guarded` has the limit.

        opened: list[AbstractChannel] = []

        async def open_one() -> AbstractChannel:
            number = self._next_number(connection, what)
            channel = await connection.channel(
                channel_number=number,
                publisher_confirms=confirms,
                frame_buffer_size=frame_buffer,
            )
            opened.append(channel)
            return channel

        try:
            return await guarded(open_one(), connection, timeout=timeout, what=what)
        except BaseException as exc:
            for channel in opened:  # just when the caller was cancelled
                self._go_on(close_bounded(channel, timeout=timeout))
            if isinstance(exc, aiormq_errors.ChannelClosed):
                raise ConnectionLostError(what, reason=describe(exc)) from exc
            raise

    def _next_number(self, connection: AbstractConnection, what: str) -> int:
        channel_max = connection.connection_tune.channel_max or 0
        number = self._numbers.take(connection.channels, channel_max)
        if number is None:
            reason = f"all {channel_max:,} channels that RabbitMQ allows a connection are in use"
            raise ConnectionLostError(what, reason=reason)
        return number

    def _link_for(self, channel: AbstractChannel) -> Link | None:
        """Return where a fast path reads and writes; None if aiormq lacks what it needs.

        Raises:
            ConnectionLostError: The channel's connection was lost since it was opened.
        """
        if channel.connection is not self._current:
            raise ConnectionLostError("opening a channel", reason=self._last_error)
        missing = missing_names(channel)
        if not missing:
            return self._link
        explain(*missing)
        return None

    def _go_on(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start bounded work that is not cancelled with who asked for it."""
        task = asyncio.ensure_future(work)
        self._going_on.add(task)
        task.add_done_callback(self._going_on.discard)
        task.add_done_callback(retrieve)
        return task

    async def declare(self, declarations: Iterable[Declaration], *, timeout: float) -> None:
        """Declare what does not exist yet; see the protocol.

        It is not cancelled with its caller but goes on by itself: aiormq closes the channel of a
        cancelled call, and where that crosses the broker's own Channel.Close, by which it tells of
        a missing queue, RabbitMQ closes the connection (504 CHANNEL_ERROR).
        """
        end_turn = await self._take_turn()
        task = self._go_on(self._declare(tuple(declarations), timeout=timeout))
        task.add_done_callback(lambda _: end_turn())
        await asyncio.wait({task})
        task.result()

    async def _take_turn(self) -> Callable[[], None]:
        """Wait until few others are declaring or subscribing.

        Returns:
            What ends the turn, which else ends by itself after a while: queues that hang, because
            their node does, must not keep others from being declared or consumed from.
        """
        await self._turns.acquire()
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle | None = None

        def end() -> None:
            nonlocal timer
            if timer is not None:
                timer.cancel()
                timer = None
                self._turns.release()

        def end_in_time() -> None:
            nonlocal timer
            if self._link is not None and self._link.is_full:  # nobody at all is heard
                timer = loop.call_later(_TURN, end_in_time)
            else:
                end()

        timer = loop.call_later(_TURN, end_in_time)
        return end

    async def _declare(self, declarations: tuple[Declaration, ...], *, timeout: float) -> None:
        what = "declaring queues"
        channel: AbstractChannel | None = None
        try:
            for declaration in declarations:
                channel = await self._usable(channel, what, timeout=timeout)
                if isinstance(declaration, QueueDeclaration):
                    if await self._has_queue(channel, declaration, timeout=timeout):
                        continue
                    channel = await self._usable(channel, what, timeout=timeout)
                await declare_on(channel, declaration, timeout=timeout)
        finally:
            if channel is not None:
                await close_bounded(channel, timeout=timeout)

    async def _usable(
        self, channel: AbstractChannel | None, what: str, *, timeout: float
    ) -> AbstractChannel:
        """Return a channel to declare on: another one where a refusal has closed it."""
        if channel is not None and not channel.is_closed:
            return channel
        return await self._open_channel(what, confirms=False, frame_buffer=8, timeout=timeout)

    async def _has_queue(
        self,
        channel: AbstractChannel,
        declaration: QueueDeclaration,
        *,
        timeout: float,
    ) -> bool:
        """Look for a queue, and say whether there is nothing left to do about it."""
        name = declaration.name
        if declaration.if_missing == "create" and not may_be_looked_for(channel, name):
            return False
        try:
            await look_for(channel, name, timeout=timeout)
        except TopologyError as exc:
            if exc.code == NOT_FOUND and declaration.if_missing == "create":
                return False
            if exc.code == NOT_FOUND and declaration.if_missing == "warn":
                _log.warning("%s Messages that are given up will go back to their queue.", exc)
            elif exc.code != ACCESS_REFUSED or declaration.if_missing == "create":
                raise  # who may not look (RabbitMQ 4.3) may still consume: the consumer will tell
        return True

    async def open_publish_channel(self, *, timeout: float) -> AmqpPublishChannel:
        """Open a channel in confirm mode; see the protocol."""
        what = "opening a channel to publish"
        channel = await self._open_channel(what, confirms=True, frame_buffer=256, timeout=timeout)
        link = self._link_for(channel)
        kind = AmqpPublishChannel if link is not None else _documented()[0]
        return kind(channel, link=link, frame_max=self._frame_max)

    async def count_messages(self, queue: str, *, timeout: float) -> int:
        """Return how many messages of a queue are ready; see the protocol."""
        what = f"counting the messages of queue {queue!r}"
        channel = await self._open_channel(what, confirms=False, frame_buffer=8, timeout=timeout)
        try:
            return await look_for(channel, queue, timeout=timeout)
        finally:
            await close_bounded(channel, timeout=timeout)

    async def delete_queue(self, queue: str, *, timeout: float) -> None:
        """Delete a queue; see the protocol."""
        what = f"deleting queue {queue!r}"
        channel = await self._open_channel(what, confirms=False, frame_buffer=8, timeout=timeout)
        try:
            await delete(channel, queue, timeout=timeout)
        finally:
            await close_bounded(channel, timeout=timeout)

    async def open_getter(self, queue: str, *, timeout: float) -> AmqpGetter:
        """Open a channel to take single messages; see the protocol."""
        what = f"reading queue {queue!r}"
        channel = await self._open_channel(what, confirms=False, frame_buffer=64, timeout=timeout)
        from aioworkq.amqp import getter  # noqa: PLC0415 - for `DeadLetters` only

        return getter.AmqpGetter(channel, queue, link=self._link_for(channel))

    async def subscribe(
        self,
        queue: str,
        *,
        prefetch_count: int,
        on_delivery: Callable[[Subscription, Incoming], None],
        timeout: float,
    ) -> AmqpSubscription:
        """Open a channel and consume from a queue; see the protocol."""
        end_turn = await self._take_turn()
        try:
            return await self._subscribe(
                queue,
                prefetch_count=prefetch_count,
                on_delivery=on_delivery,
                timeout=timeout,
            )
        finally:
            end_turn()

    async def _subscribe(
        self,
        queue: str,
        *,
        prefetch_count: int,
        on_delivery: Callable[[Subscription, Incoming], None],
        timeout: float,
    ) -> AmqpSubscription:
        what = f"consuming from queue {queue!r}"
        buffer = min(max(64, 4 * prefetch_count), 65_535)
        channel = await self._open_channel(
            what,
            confirms=False,
            frame_buffer=buffer,
            timeout=timeout,
        )
        link = self._link_for(channel)
        kind = AmqpSubscription if link is not None else _documented()[1]
        subscription = kind(
            channel,
            queue,
            link=link,
            charges_returns=self.counts_nacks,
            on_delivery=on_delivery,
        )
        try:
            await subscription.consume(prefetch_count=prefetch_count, timeout=timeout)
        except BaseException as exc:
            await subscription.aclose(timeout=timeout)
            if isinstance(exc, aiormq_errors.ChannelClosed):
                raise refusal(exc, queue, what=what) from exc
            raise
        return subscription

    async def aclose(self, *, timeout: float) -> None:
        """Close it. Bounded, twice harmless, effective while it still connects."""
        self._is_closed = True
        self._changes.notify()
        robust = self._robust
        for task in self._tasks:
            task.cancel()
        with anyio.CancelScope(shield=True):
            if robust is not None and not robust.is_closed:
                closing = asyncio.ensure_future(robust.close())
                closing.add_done_callback(retrieve)
                try:
                    await asyncio.wait({closing}, timeout=timeout)
                finally:
                    # Whatever is left hangs on the socket: without it, everything ends by itself.
                    self._transport.abort()
                await asyncio.wait({closing}, timeout=_ABORT_GRACE)
            if self._tasks:
                await asyncio.wait(self._tasks)
            if self._going_on:
                await asyncio.wait(self._going_on, timeout=_ABORT_GRACE)
        self._current = self._link = None


def _documented() -> tuple[type[AmqpPublishChannel], type[AmqpSubscription]]:
    """Return what takes the place of the fast paths."""
    from aioworkq.amqp import documented  # noqa: PLC0415 - nearly no program needs it

    return documented.DocumentedPublishChannel, documented.DocumentedSubscription


def _is_tls_refusal(exc: BaseException | None) -> bool:
    while exc is not None:
        if isinstance(exc, ssl.SSLCertVerificationError):
            return True
        exc = exc.__cause__
    return False


def _frame_max_of(connection: AbstractConnection) -> int:
    tune = getattr(connection, "connection_tune", None)
    return int(tune.frame_max or DEFAULT_FRAME_MAX) if tune is not None else DEFAULT_FRAME_MAX
