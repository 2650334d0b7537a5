"""Running handlers in tests: one delivery through the production path, or all that is ready.

`aioworkq.testing` offers what is here.
"""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from msgspec import structs

from aioworkq.batches import BatchRuns
from aioworkq.errors import StateError
from aioworkq.memory import MemoryBroker
from aioworkq.memory.connection import MemoryConnection
from aioworkq.message import ATTEMPTS, Message
from aioworkq.outbox import Outbox
from aioworkq.outcome import Ack
from aioworkq.runs import Runs
from aioworkq.settle import Settled, Settler, Unsettled
from aioworkq.topology import Queue, QueueDeclaration, as_queue
from aioworkq.trials import Trials
from aioworkq.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioworkq.handler import Handler
    from aioworkq.outcome import Outcome

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Drained:
    """What `drain` did; see `aioworkq.ConsumerStatistics` for each number."""

    handled: int = 0
    failed: int = 0
    requeued: int = 0
    retried: int = 0
    dead_lettered: int = 0
    duplicates: int = 0


class _Recorder(Settler):
    """Notes the outcome of a delivery instead of carrying it out."""

    def __init__(self, queue: Queue[Any], connection: MemoryConnection) -> None:
        super().__init__(
            queue,
            connection=connection,
            outbox=Outbox(connection, window=1, window_bytes=1),
            stopping=anyio.Event(),
            timeout=1,
        )
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    async def settle(self, unsettled: Unsettled, outcome: Outcome) -> Settled:
        unsettled.is_settled = True
        self.outcome.set_result(outcome)
        return Settled.ACKED

    def ack(self, unsettled: Unsettled) -> Settled:
        unsettled.is_settled = True
        self.outcome.set_result(Ack())
        return Settled.ACKED


class _WithoutPauses(Runs):
    """Gives a failed message back at once."""

    async def _pause(self, seconds: float) -> None:
        pass


class _BatchOfOne(_WithoutPauses, BatchRuns):
    """Waits for no others."""

    def _time_left(self) -> float:
        return 0


async def deliver(
    worker: Worker,
    queue: Queue[T] | str,
    body: T | Message,
    *,
    attempt: int = 1,
    headers: Mapping[str, Any] | None = None,
    message_id: str = "",
) -> Outcome:
    """Hand one message to a worker's handler as a worker does, and return what becomes of it.

    The body is encoded and decoded, the handler runs with its time limit, in a thread if it is a
    plain function, and its options say what an error means. Nothing is settled, nothing waits, and
    the worker need not run; it may be one for RabbitMQ. Cancelling it cancels the handler. A batch
    handler gets a batch of one: for larger ones publish to a `MemoryBroker`, and `drain`.

    Args:
        worker: Where the handler is registered.
        queue: The handler's queue.
        body: A body of the queue, or a whole `Message`, which may be one that cannot be decoded.
        attempt: Which attempt it is, from 1.
        headers: The message's headers, of a body.
        message_id: The message's id, of a body.

    Returns:
        `Ack`, `Requeue`, `Retry` or `DeadLetter`.

    Raises:
        StateError: The worker has no handler for this queue.
        TypeError: The body is not of the queue's type.
        ValueError: The attempt is less than 1.
    """
    name = as_queue(queue).name
    if attempt < 1:
        raise ValueError(f"attempt is {attempt}: attempts count from 1.")
    handler = _handlers(worker).get(name)
    if handler is None:
        raise StateError(
            f"nothing can be delivered from queue {name!r}",
            reason="the worker has no handler for it",
            advice="Register one with @worker.handler(queue).",
        )
    if isinstance(body, Message):
        message = structs.replace(body, headers=dict(body.headers))
    else:
        encoded = handler.codec.encode(body)
        message = Message(
            encoded.body,
            name,
            message_id=message_id,
            content_type=encoded.content_type,
            content_encoding=encoded.content_encoding,
            headers=dict(headers or {}),
        )
    message.exchange, message.routing_key = "", name
    if attempt > 1:
        message.headers[ATTEMPTS] = attempt - 1
    return await _outcome_of(handler, message)


async def _outcome_of(handler: Handler, message: Message) -> Outcome:
    """Deliver a message through a broker of its own."""
    broker = MemoryBroker(clock="virtual")
    connection = broker.connection(name="deliver", owner="worker", max_message_size=2**31)
    await connection.start()
    await connection.wait_connected()
    broker.node.declare(QueueDeclaration(handler.queue.name, {}))
    broker.node.publish(connection.prepare(message))
    recorder = _Recorder(handler.queue, connection)
    runs = (_WithoutPauses if handler.options.batching is None else _BatchOfOne)(
        handler,
        settler=recorder,
        stopping=anyio.Event(),
        trials=Trials(connection, timeout=1),
        on_change_of_prefetch=_ignore,
    )
    try:
        async with anyio.create_task_group() as tasks:
            runs.start_in(tasks)
            await connection.subscribe(
                handler.queue.name,
                prefetch_count=1,
                on_delivery=runs.on_delivery,
                timeout=1,
            )
            await recorder.outcome
            runs.end_pauses()
    finally:
        await connection.aclose(timeout=1)
    return recorder.outcome.result()


async def drain(worker: Worker, *, timeout: float = 30.0) -> Drained:
    """Have a worker work until nothing is ready in its queues, and return what it did.

    What fails is handed over again until it is done, dead-lettered or delayed. On a virtual clock
    the pauses in between pass by themselves; messages that wait for a delay stay where they are:
    let time pass with `MemoryBroker.advance`, and drain again.

    A worker that runs goes on afterwards, and what it did since the call is counted. For one that
    does not, its handlers run in a worker made for this call: it can be drained again and again.

    Args:
        worker: A worker on a `MemoryBroker`.
        timeout: Real seconds after which this is given up.

    Raises:
        StateError: The worker is not on a memory broker; its messages are on another one; or the
            queues are not empty in time.
        WorkQueueError: What `Worker.run` raises.
    """
    broker = _broker(worker)
    if _runs(worker):
        return await _drain(worker, broker, timeout, since=_counts(worker))
    twin = Worker(broker, grace=timeout)
    twin._handlers = _handlers(worker)  # noqa: SLF001 - a worker runs once; its handlers may again
    async with twin:
        return await _drain(twin, broker, timeout, since=Drained())


async def _drain(
    worker: Worker,
    broker: MemoryBroker,
    timeout: float,
    *,
    since: Drained,
) -> Drained:
    queues = list(_handlers(worker))
    try:
        async with asyncio.timeout(timeout):
            await _wait_drained(broker, queues)
    except TimeoutError:
        left = ", ".join(f"{queue!r} has {broker.counts(queue)}" for queue in queues)
        raise StateError(
            f"the queues are not empty after {timeout:g} s",
            reason=left,
            advice="A handler may wait for something, or a message may have no bound of attempts.",
        ) from None
    counts = zip(dataclasses.astuple(_counts(worker)), dataclasses.astuple(since), strict=True)
    done = Drained(*(now - before for now, before in counts))
    if done == Drained():
        for queue in queues:
            broker.check_elsewhere(queue)
    return done


async def _wait_drained(broker: MemoryBroker, queues: list[str]) -> None:
    while True:
        await broker.settle()
        if not any(sum(broker.counts(queue)) for queue in queues):
            return
        pause = broker.clock.next_pause() if broker.clock.is_virtual else None
        if pause is not None:
            await broker.advance(max(0.0, pause - broker.clock.time()))
        else:
            await broker.changes.wait()  # a handler waits for something real


def _counts(worker: Worker) -> Drained:
    consumers = worker.statistics().consumers.values()
    names = [field.name for field in dataclasses.fields(Drained)]
    return Drained(*(sum(getattr(one, name) for one in consumers) for name in names))


def _ignore() -> None:
    """Keep the prefetch."""


def _handlers(worker: Worker) -> dict[str, Handler]:
    return worker._handlers  # noqa: SLF001 - the kit is the worker's other half, for tests


def _runs(worker: Worker) -> bool:
    return worker._was_started and not worker._has_ended  # noqa: SLF001 - as above


def _broker(worker: Worker) -> MemoryBroker:
    connection = worker._connection  # noqa: SLF001 - as above
    if isinstance(connection, MemoryConnection) and isinstance(connection.broker, MemoryBroker):
        return connection.broker
    raise StateError(
        "this worker cannot be drained",
        reason="it is not on a memory broker",
        advice="Make it as Worker(MemoryBroker()), or let RabbitMQ deliver.",
    )
