"""What joins connections and queues: the calls under way, and the event loop they are made in."""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aioworkq.changes import Changes
from aioworkq.memory.connection import MemoryConnection, Owner
from aioworkq.memory.faults import Faults
from aioworkq.memory.node import Node
from aioworkq.memory.refusals import OtherLoopError
from aioworkq.topology import Queue, as_queue

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioworkq.memory.clock import Clock
    from aioworkq.message import Message
    from aioworkq.versions import Semantics

_RECORDED: Final = 10_000


class QueueCounts(NamedTuple):
    """What is in a queue: messages that are ready, and messages that are handed over."""

    ready: int
    unacked: int


class Hub:
    """The inner side of a `MemoryBroker`, which its connections see."""

    def __init__(self, semantics: Semantics, clock: Clock) -> None:
        self.semantics = semantics
        self.clock = clock
        self.node = Node(semantics, clock)
        self.faults = Faults()
        self.changes = Changes()
        """Notified after each turn in which something happened."""
        clock.after_firing = self._notify
        self.has_alarm = False
        self._is_down = False
        self._connections: dict[MemoryConnection, None] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._calls: deque[Callable[[], None]] = deque()
        self._turn = asyncio.Lock()
        self.published_messages: dict[str, deque[Message]] = {}

    @property
    def is_in_use(self) -> bool:
        """Whether a client is connected, in an event loop that is not closed."""
        return bool(self._connections) and self._loop is not None and not self._loop.is_closed()

    def connection(
        self,
        *,
        name: str,
        owner: Owner,
        max_message_size: int,
    ) -> MemoryConnection:
        """Return a new connection, for `aioworkq.connect`."""
        return MemoryConnection(self, name=name, owner=owner, max_message_size=max_message_size)

    @property
    def serves_this_loop(self) -> bool:
        """Whether the running event loop is the one that its clients are in."""
        return self._loop is asyncio.get_running_loop()

    def attach(self, connection: MemoryConnection) -> None:
        """Take a connection, and have it connect.

        Raises:
            OtherLoopError: Clients in another event loop are connected.
        """
        if not self.serves_this_loop:
            self._move(asyncio.get_running_loop())
        self._connections[connection] = None
        self.reconnect()

    def _move(self, loop: asyncio.AbstractEventLoop) -> None:
        """Serve another event loop from now on."""
        if self.is_in_use:
            raise OtherLoopError(
                f"connecting to {self!r}",
                reason="clients in another event loop are connected to it",
            )
        self._forsake_connections()
        self._turn = asyncio.Lock()
        self.changes = Changes()
        self._loop = loop
        self.clock.forget_pauses()
        self.clock.bind(loop)

    def _forsake_connections(self) -> None:
        """Forget clients that nobody closed and whose event loop has ended."""
        stale, self._connections = list(self._connections), {}
        for connection in stale:
            connection.forsake()
        self._calls.clear()

    def detach(self, connection: MemoryConnection) -> None:
        """Forget a closed connection; without any, the event loop may be another one."""
        self._connections.pop(connection, None)

    def reconnect(self) -> None:
        """Have everybody connect who is not, soon."""
        for connection in self._connections:
            if not connection.is_connected:
                self.post(partial(self._connect, connection))

    def _connect(self, connection: MemoryConnection) -> None:
        if not self._is_down and connection in self._connections:
            connection.connect()

    def post(self, call: Callable[[], None]) -> None:
        """Have something done between this step of the event loop and the next one, in order."""
        if self._loop is None or self._loop.is_closed():
            return  # nobody is there to hear of it
        if not self._calls:
            self._loop.call_soon(self._serve)
        self._calls.append(call)

    def _serve(self) -> None:
        calls, self._calls = self._calls, deque()
        for call in calls:
            call()
        self._notify()

    def _notify(self) -> None:
        self.changes.notify()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way between clients and queues."""
        return not self._calls

    def record(self, message: Message, *, owner: Owner) -> None:
        """Note a confirmed publication; copies that workers make are none."""
        if owner == "producer":
            self.published_messages.setdefault(message.queue, deque(maxlen=_RECORDED)).append(
                message
            )

    def counts(self, queue: Queue[Any] | str) -> QueueCounts:
        """Return how many messages are in a queue; a queue that does not exist has none."""
        found = self.node.queues.get(as_queue(queue).name)
        return QueueCounts(0, 0) if found is None else QueueCounts(len(found), found.unacked)
