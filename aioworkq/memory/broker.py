"""`MemoryBroker`: what tests and applications hold in their hands.

The queues are in ``node.py``, the connections in ``connection.py``, what joins them in ``hub.py``.
Here are time, faults, and what can be asked.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from typing import TYPE_CHECKING, Literal, TypeVar

from aioworkq.codec import codec_for
from aioworkq.errors import StateError
from aioworkq.memory.clock import Clock
from aioworkq.memory.hub import Hub
from aioworkq.memory.node import Refusal
from aioworkq.memory.rest import wait_at_rest
from aioworkq.memory.version import Version, semantics_of
from aioworkq.topology import Queue, as_queue

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable
    from datetime import datetime

    from aioworkq.memory.connection import Owner
    from aioworkq.memory.faults import Fault
    from aioworkq.message import Message

T = TypeVar("T")

_named: dict[str, MemoryBroker] = {}
_all: weakref.WeakSet[MemoryBroker] = weakref.WeakSet()


class MemoryBroker(Hub):
    """RabbitMQ in this process, for tests: hand it to a `Producer` or a `Worker` in place of a URL.

    The code above it is the production code, and it passes the same conformance tests as RabbitMQ:
    acks, returns, delivery counts and limits, prefetch, priorities, expiration, delays,
    dead-lettering, refusals. Where it differs is listed in ``docs/how-to/test-handlers.md``.

    It serves one event loop at a time. Made anew for each test, it needs no closing; its messages
    outlive an event loop, its connections do not.

    Args:
        version: The version of RabbitMQ whose rules it follows.
        clock: ``"real"``, or ``"virtual"``: then time stands still until `advance`, for messages
            and for the pauses of workers and producers. Time limits of handlers and timeouts of
            calls are always real.
        name: With a name, ``"memory://name"`` is this broker wherever a URL is taken.

    Raises:
        ValueError: There is no such version or clock, or the name is in use.
    """

    def __init__(
        self,
        *,
        version: Version = "4.3",
        clock: Literal["real", "virtual"] = "real",
        name: str | None = None,
    ) -> None:
        if clock not in {"real", "virtual"}:
            raise ValueError(f"clock is {clock!r}: it is 'real' or 'virtual'.")
        if name is not None and name in _named and _named[name].is_in_use:
            raise ValueError(f"there is a memory broker {name!r} in use: take another name.")
        super().__init__(semantics_of(version), Clock(is_virtual=clock == "virtual"))
        self._version: Version = version
        self.name = name
        _all.add(self)
        if name is not None:
            _named[name] = self

    def __repr__(self) -> str:
        name = f" {self.name!r}" if self.name else ""
        return f"<MemoryBroker{name} as RabbitMQ {self.version}>"

    @classmethod
    def named(cls, name: str) -> MemoryBroker:
        """Return the process-wide broker of this name, ``memory://name``; made when there is none.

        One with other options is made before its first use: ``MemoryBroker(name=..., ...)``.

        Raises:
            ValueError: The name is empty.
        """
        if not name:
            raise ValueError("the memory broker's name is empty: write it as memory://name.")
        return _named.get(name) or cls(name=name)

    @property
    def version(self) -> Version:
        """The version of RabbitMQ whose rules it follows."""
        return self._version

    # Time

    def now(self) -> datetime:
        """Return the broker's time, aware, in UTC. A virtual clock begins with the real time."""
        return self.clock.now()

    async def settle(self) -> None:
        """Wait until nothing happens any more without time, a thread or a socket."""
        self._check_loop("settle()")
        async with self._turn:
            await wait_at_rest(lambda: self.is_idle)

    async def advance(self, seconds: float) -> None:
        """Let virtual time pass, and return when all that it causes has happened.

        Everything that is due happens in its order and at its time: messages expire and arrive,
        pauses end, handlers run. Between two such moments the event loop goes on until nothing is
        left that can; a handler that waits for something real, such as a socket, a thread or
        `asyncio.sleep`, is not waited for. Cancelled, it stops at the moment it has come to.

        Args:
            seconds: How long, 0 or more. With 0 it is `settle`.

        Raises:
            StateError: The clock is real, or the event loop never comes to rest.
            ValueError: That is no number of seconds.
        """
        if not 0 <= seconds < math.inf:
            raise ValueError(f"seconds is {seconds}: it must be a number of seconds, 0 or more.")
        self._check_virtual()
        self._check_loop("advance()")
        async with self._turn:
            target = self.clock.time() + seconds
            await wait_at_rest(lambda: self.is_idle)
            while self.clock.step(target):
                await wait_at_rest(lambda: self.is_idle)

    def _check_virtual(self) -> None:
        if not self.clock.is_virtual:
            raise StateError(
                "time cannot be advanced",
                reason="this broker's clock is the real one",
                advice="Make it as MemoryBroker(clock='virtual').",
            )

    def _check_loop(self, what: str) -> None:
        if self.is_in_use and not self.serves_this_loop:
            raise StateError(
                f"{what} is not possible",
                reason="the broker serves another event loop",
                advice="Call it where the clients are.",
            )

    # Faults

    def drop_connections(
        self,
        owner: Owner | None = None,
        *,
        reason: str = "the connection was dropped on request",
    ) -> None:
        """Drop connections: all, or those of producers, of workers or of `DeadLetters`.

        Everything under way is lost, everything unsettled goes back to its queue. They connect
        again at once; a worker's consumers come back after their usual pause.

        Raises:
            ValueError: There is no such owner.
        """
        if owner not in {None, "producer", "worker", "dead letters"}:
            raise ValueError(f"owner is {owner!r}: it is 'producer', 'worker' or 'dead letters'.")
        if not self.is_in_use:
            self._forsake_connections()
        for connection in list(self._connections):
            if owner in {None, connection.owner}:
                connection.drop(reason)
        self.reconnect()

    @contextlib.contextmanager
    def outage(self, reason: str = "Connection refused") -> Generator[None]:
        """Be down inside of the ``with`` block: nobody is connected, and nobody can connect."""
        self._is_down = True
        self.drop_connections(reason=reason)
        try:
            yield
        finally:
            self._is_down = False
            self.reconnect()

    @contextlib.contextmanager
    def alarm(self) -> Generator[None]:
        """Have a memory alarm inside of the ``with`` block: publishers are blocked."""
        self.has_alarm = True
        try:
            yield
        finally:
            self.has_alarm = False
            for connection in list(self._connections):
                connection.unblock()

    def fail_next(
        self,
        fault: Fault,
        *,
        queue: Queue[T] | str | None = None,
        times: int = 1,
        code: int = 406,
    ) -> None:
        """Have something go wrong the next time it is due.

        Args:
            fault: ``"lose confirm"``: the message is stored, and the connection drops before the
                confirm is sent. ``"lose ack"``: the connection drops before an ack arrives.
                ``"refuse publish"``: a negative confirm. ``"refuse declaration"``: with ``code``.
            queue: Only for this queue; None for any.
            times: How often.
            code: For a declaration: 403, 404, 405 or 406.

        Raises:
            ValueError: There is no such fault, or a number makes no sense.
        """
        name = None if queue is None else as_queue(queue).name
        self.faults.plan(fault, queue=name, times=times, code=code)

    def cancel_consumers(self, queue: Queue[T] | str) -> None:
        """Cancel the consumers of a queue, as RabbitMQ does when the queue moves.

        Raises:
            StateError: There is none.
        """
        name = as_queue(queue).name
        takers = self.node.queues[name].takers if name in self.node.queues else []
        if not takers:
            raise StateError(
                f"no consumer of queue {name!r} can be cancelled",
                reason="it has none",
                advice="Start a worker first, and wait until it is ready.",
            )
        for taker in takers:
            taker.lose_queue("RabbitMQ cancelled the consumer: its queue was deleted or moved")

    def delete_queue(self, queue: Queue[T] | str) -> None:
        """Delete a queue with its messages, under its consumers' feet.

        Raises:
            StateError: It does not exist.
        """
        name = as_queue(queue).name
        try:
            self.node.delete_queue(name)
        except Refusal:
            raise StateError(
                f"queue {name!r} cannot be deleted",
                reason="it does not exist",
                advice="It is declared when a producer or a worker first uses it.",
            ) from None

    # What can be asked

    def published(self, queue: Queue[T] | str) -> list[T]:
        """Return the bodies that producers have published to a queue, whatever became of them.

        In the order of their confirms, delayed ones included, the last 10,000.

        Raises:
            StateError: Nothing was published to it here, but to another memory broker it was.
            DecodeError: A body is not what the queue's body type says.
        """
        asked: Queue[T] = as_queue(queue)
        if asked.name not in self.published_messages:
            self.check_elsewhere(asked.name)
        return _decoded(asked, self.published_messages.get(asked.name, ()))

    def dead(self, queue: Queue[T] | str) -> list[T]:
        """Return the bodies in a queue's dead-letter queue, the oldest first.

        Why each of them is there, `aioworkq.DeadLetters` tells.

        Raises:
            DecodeError: A body is not what the queue's body type says; that may be why it is dead.
        """
        asked: Queue[T] = as_queue(queue)
        dead = self.node.queues.get(asked.dead_letter_queue)
        return _decoded(asked, dead.messages() if dead is not None else ())

    def check_elsewhere(self, queue: str) -> None:
        """Find out whether somebody talks to the wrong broker; for `aioworkq.testing.drain` too.

        Raises:
            StateError: So it is.
        """
        for other in _all:
            if other is not self and other.is_in_use and queue in other.published_messages:
                raise StateError(
                    f"nothing was published to queue {queue!r} on {self!r}",
                    reason=f"but to a queue of this name on {other!r}, another one",
                    advice="Give the producer and the worker the same MemoryBroker.",
                )


def _decoded(queue: Queue[T], messages: Iterable[Message]) -> list[T]:
    codec = codec_for(queue.body_type)
    return [codec.decode(message.body, message.content_type) for message in messages]
