"""A broker under test, through the door that the library uses, and what differs by version."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from aioworkq import MemoryBroker, Message
from aioworkq.broker import Confirm
from aioworkq.connect import connection_to
from aioworkq.topology import QueueDeclaration
from tests.consuming import Broker, eventually
from tests.publishing import memory_alarm

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine

    from aioworkq.broker import Connection, Incoming, PublishChannel, Subscription
    from aioworkq.testing import RabbitMQ

T = TypeVar("T")

QUORUM = {"x-queue-type": "quorum", "x-delivery-limit": 1000}
"""Arguments of a quorum queue that gives nothing up by itself: so it is with those we declare."""
TIMEOUT = 30.0


@dataclass
class Sent:
    """A publication of a test: what the broker answers is kept."""

    message: Message
    wire: Any
    answer: asyncio.Future[tuple[Confirm, str]]

    def settle(self, confirm: Confirm, reason: str) -> None:
        self.answer.set_result((confirm, reason))


class Publisher:
    """A publish channel, and publishing on it."""

    def __init__(self, connection: Connection, channel: PublishChannel) -> None:
        self._connection = connection
        self.channel = channel

    def send(self, message: Message) -> Sent:
        answer: asyncio.Future[tuple[Confirm, str]] = asyncio.get_running_loop().create_future()
        sent = Sent(message, self._connection.prepare(message), answer)
        self.channel.send(sent)
        return sent

    async def publish(self, message: Message) -> Confirm:
        async with asyncio.timeout(TIMEOUT):
            confirm, _ = await self.send(message).answer
        return confirm

    async def publish_bodies(self, queue: str, *bodies: bytes) -> None:
        for body in bodies:
            assert await self.publish(Message(body, queue)) is Confirm.ACK


@dataclass
class Consumer:
    """A subscription, and what it was handed over."""

    subject: Subject
    deliveries: list[Incoming] = field(default_factory=list)
    subscription: Subscription | None = None

    def on_delivery(self, _: Subscription, incoming: Incoming) -> None:
        self.deliveries.append(incoming)

    @property
    def bodies(self) -> list[bytes]:
        return [incoming.message.body for incoming in self.deliveries]

    async def wait(self, number: int) -> list[Incoming]:
        """Wait until so many deliveries came; not one more may be there."""
        await self.subject.eventually(lambda: len(self.deliveries) >= number)
        assert len(self.deliveries) == number
        return self.deliveries

    def settled(self) -> Subscription:
        assert self.subscription is not None
        return self.subscription


class Subject:
    """RabbitMQ, or a memory broker as one of its versions.

    Args:
        address: What is handed to producers and workers.
        version: The version whose rules hold, as two numbers.
        node: The node, where it is a real one.
    """

    def __init__(self, address: str | MemoryBroker, version: str, node: RabbitMQ | None) -> None:
        self.address = address
        self.number = tuple(int(part) for part in version.split(".")[:2])
        self._node = node

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncGenerator[Connection]:
        """Open a connection as producers and workers do."""
        connection = connection_to(
            self.address,
            owner="producer",
            name="conformance",
            heartbeat=10,
            connect_timeout=10.0,
            ssl_context=None,
            max_message_size=16 * 1024 * 1024,
        )
        await connection.start()
        try:
            async with asyncio.timeout(TIMEOUT):
                await connection.wait_connected()
            yield connection
        finally:
            await connection.aclose(timeout=5)

    # What takes time, on either

    async def pass_time(self, seconds: float) -> None:
        """Let the broker's time pass: real time on a node, virtual time in memory."""
        if isinstance(self.address, MemoryBroker):
            await self.address.advance(seconds)
        else:
            await asyncio.sleep(seconds)

    async def eventually(self, fact: Callable[[], Any]) -> None:
        """Wait until a function, or a coroutine function, returns something true."""
        await eventually(fact, sleep=self.pass_time)

    async def wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        """Do what needs the broker's time to pass."""
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(work)
            await self.eventually(task.done)
        return task.result()

    async def consume(
        self, connection: Connection, queue: str, *, prefetch_count: int = 100
    ) -> Consumer:
        consumer = Consumer(self)
        consumer.subscription = await connection.subscribe(
            queue,
            prefetch_count=prefetch_count,
            on_delivery=consumer.on_delivery,
            timeout=TIMEOUT,
        )
        return consumer

    async def take_all(self, connection: Connection, queue: str, number: int) -> list[Message]:
        """Take and ack what is in a queue, which must come to so many messages."""
        taken: list[Message] = []
        getter = await connection.open_getter(queue, timeout=TIMEOUT)

        async def take() -> bool:
            while (incoming := await getter.get(timeout=TIMEOUT)) is not None:
                taken.append(incoming.message)
                await getter.ack(incoming.tag, timeout=TIMEOUT)
            return len(taken) >= number

        await self.eventually(take)
        assert len(taken) == number
        await getter.aclose(timeout=5)
        return taken

    async def wait_ready(self, connection: Connection, queue: str, number: int) -> None:
        """Wait until so many messages are ready in a queue."""

        async def has() -> bool:
            return await connection.count_messages(queue, timeout=TIMEOUT) == number

        await self.eventually(has)

    # What a fault is, on either

    async def drop_connections(self) -> None:
        if isinstance(self.address, MemoryBroker):
            self.address.drop_connections()
        else:
            assert self._node is not None
            vhost = self.address.rpartition("/")[2]
            await self._node.eval(
                '[rabbit_networking:close_connection(Pid, "on request") || '
                "Pid <- rabbit_networking:connections(), "
                "(catch proplists:get_value(vhost, "
                "rabbit_networking:connection_info(Pid, [vhost]))) "
                f'=:= <<"{vhost}">>]'
            )

    async def delete_queue(self, name: str) -> None:
        if isinstance(self.address, MemoryBroker):
            self.address.delete_queue(name)
        else:
            async with Broker(self.address) as broker:
                await broker.delete(name)

    @contextlib.asynccontextmanager
    async def alarm(self) -> AsyncGenerator[None]:
        if isinstance(self.address, MemoryBroker):
            with self.address.alarm():
                yield
        else:
            assert self._node is not None
            async with memory_alarm(self._node):
                yield


async def declare(connection: Connection, name: str, **arguments: Any) -> None:
    """Declare a queue; underscores in the names of arguments stand for hyphens."""
    plain = {f"x-{key.replace('_', '-')}": value for key, value in arguments.items()}
    await connection.declare([QueueDeclaration(name, plain)], timeout=TIMEOUT)


async def publisher(connection: Connection) -> Publisher:
    return Publisher(connection, await connection.open_publish_channel(timeout=TIMEOUT))
