"""Other work queues doing the same, each by its own documentation.

They live in an environment of their own, ``.venv-bench``, which `make bench` makes from
``peers.txt``; this file imports nothing of aioworkq but its clock. Each handles a body of 256
characters, persistent, in a durable queue, with publisher confirms and an ack after the handler.

``python -m tests.benchmarks.peers NAME URL QUEUE COUNT`` prints one line of JSON. What consumes
publishes its messages first, outside of the measurement.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, Final

from tests.benchmarks.clock import Measurement

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

BODY: Final = "x" * 256
PREFETCH: Final = 100
TASKS: Final = 100
THREADS: Final = 8


class Count:
    """Counts messages, from the first to the last; calls back at the end."""

    def __init__(self, last: int, done: Callable[[], None]) -> None:
        self._last = last
        self._done = done
        self._seen = 0
        self._lock = threading.Lock()
        self.clock: Measurement | None = None

    def one(self) -> None:
        with self._lock:
            self.clock = self.clock or Measurement()
            self._seen += 1
            if self._seen == self._last:
                self.clock.stop()
                self._done()


async def in_tasks(publish: Callable[[], Coroutine[Any, Any, Any]], count: int) -> Measurement:
    async def publisher() -> None:
        for _ in range(count // TASKS):
            await publish()

    await publish()
    clock = Measurement()
    await asyncio.gather(*(publisher() for _ in range(TASKS)))
    return clock.stop()


# FastStream


def faststream_publish(url: str, queue: str, count: int) -> Measurement:
    rabbit = importlib.import_module("faststream.rabbit")

    async def run() -> Measurement:
        async with rabbit.RabbitBroker(url, logger=None) as broker:
            await broker.declare_queue(rabbit.RabbitQueue(queue, durable=True))
            return await in_tasks(lambda: broker.publish(BODY, queue, persist=True), count)

    return asyncio.run(run())


def faststream_consume(url: str, queue: str, count: int) -> Measurement:
    rabbit = importlib.import_module("faststream.rabbit")
    faststream_publish(url, queue, count)  # one more than it counts

    async def run() -> Measurement:
        done = asyncio.Event()
        counting = Count(count, done.set)
        qos = rabbit.Channel(prefetch_count=PREFETCH)
        broker = rabbit.RabbitBroker(url, logger=None, default_channel=qos)

        async def handle(body: str) -> None:
            counting.one()

        broker.subscriber(rabbit.RabbitQueue(queue, durable=True))(handle)

        async with broker:
            await broker.start()
            await done.wait()
        assert counting.clock is not None
        return counting.clock

    return asyncio.run(run())


# taskiq


def _taskiq(url: str, queue: str) -> Any:
    module = importlib.import_module("taskiq_aio_pika")
    if hasattr(module, "Queue"):
        return module.AioPikaBroker(
            url,
            qos=PREFETCH,
            task_queues=[module.Queue(name=queue, durable=True)],
        )
    return module.AioPikaBroker(url, qos=PREFETCH, queue_name=queue)


def taskiq_publish(url: str, queue: str, count: int) -> Measurement:
    async def run() -> Measurement:
        broker = _taskiq(url, queue)

        async def job(body: str) -> None: ...

        task = broker.register_task(job, task_name="job")
        await broker.startup()
        try:
            return await in_tasks(lambda: task.kiq(BODY), count)
        finally:
            await broker.shutdown()

    return asyncio.run(run())


def taskiq_consume(url: str, queue: str, count: int) -> Measurement:
    taskiq_publish(url, queue, count)
    receive = importlib.import_module("taskiq.api").run_receiver_task

    async def run() -> Measurement:
        done = asyncio.Event()
        counting = Count(count, done.set)
        broker = _taskiq(url, queue)
        broker.is_worker_process = True

        async def job(body: str) -> None:
            counting.one()

        broker.register_task(job, task_name="job")
        receiver = asyncio.create_task(
            receive(broker, max_async_tasks=PREFETCH, max_prefetch=0, run_startup=True),
        )
        await done.wait()
        receiver.cancel()
        await asyncio.gather(receiver, return_exceptions=True)
        await broker.shutdown()
        assert counting.clock is not None
        return counting.clock

    return asyncio.run(run())


# Dramatiq


def _dramatiq(url: str, queue: str, function: Callable[[str], None]) -> tuple[Any, Any]:
    dramatiq = importlib.import_module("dramatiq")
    rabbitmq = importlib.import_module("dramatiq.brokers.rabbitmq")
    broker = rabbitmq.RabbitmqBroker(url=url, confirm_delivery=True)
    dramatiq.set_broker(broker)
    return broker, dramatiq.actor(function, queue_name=queue, actor_name="job")


def dramatiq_publish(url: str, queue: str, count: int) -> Measurement:
    def job(body: str) -> None: ...

    broker, actor = _dramatiq(url, queue, job)
    actor.send(BODY)
    clock = Measurement()
    for _ in range(count):
        actor.send(BODY)
    clock.stop()
    broker.close()
    return clock


def dramatiq_consume(url: str, queue: str, count: int) -> Measurement:
    dramatiq_publish(url, queue, count)
    done = threading.Event()
    counting = Count(count, done.set)

    def job(body: str) -> None:
        counting.one()

    broker, _ = _dramatiq(url, queue, job)
    worker = importlib.import_module("dramatiq").Worker(broker, worker_threads=THREADS)
    worker.start()
    done.wait()
    worker.stop()
    broker.close()
    assert counting.clock is not None
    return counting.clock


# Celery


def _celery(url: str, queue: str, function: Callable[[str], None]) -> tuple[Any, Any]:
    app = importlib.import_module("celery").Celery("bench", broker=url)
    app.conf.update(
        task_default_queue=queue,
        broker_transport_options={"confirm_publish": True},
        task_ignore_result=True,
        task_acks_late=True,
        worker_prefetch_multiplier=PREFETCH,
        worker_redirect_stdouts=False,
    )
    return app, app.task(name="job")(function)


def celery_publish(url: str, queue: str, count: int) -> Measurement:
    def job(body: str) -> None: ...

    _, task = _celery(url, queue, job)
    task.delay(BODY)
    clock = Measurement()
    for _ in range(count):
        task.delay(BODY)
    return clock.stop()


def celery_consume(url: str, queue: str, count: int) -> Measurement:
    state: Any = importlib.import_module("celery.worker.state")

    def stop() -> None:
        state.should_terminate = 0

    counting = Count(count, stop)

    def job(body: str) -> None:
        counting.one()

    app, task = _celery(url, queue, job)  # a name is for one function only
    for _ in range(count):
        task.delay(BODY)
    worker = app.Worker(
        pool="solo",
        loglevel="ERROR",
        without_gossip=True,
        without_mingle=True,
        quiet=True,
    )
    with contextlib.suppress(SystemExit):
        worker.start()
    assert counting.clock is not None
    return counting.clock


CONTESTANTS: Final[dict[str, Callable[[str, str, int], Measurement]]] = {
    "faststream_publish": faststream_publish,
    "faststream_consume": faststream_consume,
    "taskiq_publish": taskiq_publish,
    "taskiq_consume": taskiq_consume,
    "dramatiq_publish": dramatiq_publish,
    "dramatiq_consume": dramatiq_consume,
    "celery_publish": celery_publish,
    "celery_consume": celery_consume,
}


def main() -> None:
    """Run one contestant and print what it took."""
    name, url, queue, count = sys.argv[1:]
    logging.basicConfig(level=logging.ERROR)
    taken = CONTESTANTS[name](url, queue, int(count))
    print(json.dumps({"messages": int(count), "wall": taken.wall, "cpu": taken.cpu}), flush=True)
    os._exit(0)  # whatever threads of theirs still wait for


if __name__ == "__main__":
    main()
