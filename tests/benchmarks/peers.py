"""Other work queues doing the same, each by its own documentation.

They live in an environment of their own, ``.venv-bench``, which `make bench` makes from
``peers.txt``; this file imports nothing of aioworkq. Each handles a body of 256
characters, persistent, in a durable queue, with publisher confirms and an ack after the handler.

``python -m tests.benchmarks.peers NAME JOB`` prints lines of JSON, as the contestants do. What
consumes publishes its messages first, outside of the measurement, unless it is timed.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, Final

from tests.benchmarks.clock import Count, Measurement
from tests.benchmarks.job import PREFETCH, Job, Latencies, publish_stamped, say

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

BODY: Final = "x" * 256
TASKS: Final = 100
THREADS: Final = 8


async def in_tasks(publish: Callable[[], Coroutine[Any, Any, Any]], count: int) -> Measurement:
    async def publisher() -> None:
        for _ in range(count // TASKS):
            await publish()

    await publish()
    clock = Measurement()
    await asyncio.gather(*(publisher() for _ in range(TASKS)))
    return clock.stop()


# FastStream


def faststream_publish(job: Job) -> Measurement:
    rabbit = importlib.import_module("faststream.rabbit")

    async def run() -> Measurement:
        async with rabbit.RabbitBroker(job.url, logger=None) as broker:
            await broker.declare_queue(rabbit.RabbitQueue(job.queue, durable=True))
            return await in_tasks(lambda: broker.publish(BODY, job.queue, persist=True), job.count)

    return asyncio.run(run())


def faststream_consume(job: Job) -> Measurement:
    rabbit = importlib.import_module("faststream.rabbit")
    faststream_publish(job)  # one more than it counts

    async def run() -> Measurement:
        done = asyncio.Event()
        counting = Count(job.count, done.set)
        qos = rabbit.Channel(prefetch_count=PREFETCH)
        broker = rabbit.RabbitBroker(job.url, logger=None, default_channel=qos)

        async def handle(body: str) -> None:
            counting.add()

        broker.subscriber(rabbit.RabbitQueue(job.queue, durable=True))(handle)

        async with broker:
            await broker.start()
            await done.wait()
        return counting.clock

    return asyncio.run(run())


def faststream_timed_publish(job: Job) -> Measurement:
    rabbit = importlib.import_module("faststream.rabbit")

    async def run() -> Measurement:
        async with rabbit.RabbitBroker(job.url, logger=None) as broker:
            clock = Measurement()
            await publish_stamped(job, lambda body: broker.publish(body, job.queue, persist=True))
            return clock.stop()

    return asyncio.run(run())


def faststream_timed_consume(job: Job) -> Measurement:
    rabbit = importlib.import_module("faststream.rabbit")

    async def run() -> Measurement:
        latencies = Latencies(job.count)
        qos = rabbit.Channel(prefetch_count=PREFETCH)
        broker = rabbit.RabbitBroker(job.url, logger=None, default_channel=qos)

        async def handle(body: str) -> None:
            latencies.take(body)

        broker.subscriber(rabbit.RabbitQueue(job.queue, durable=True))(handle)

        async with broker:
            await broker.start()
            say(ready=True)
            clock = Measurement()
            await latencies.done.wait()
            clock.stop()
        say(**latencies.summary())
        return clock

    return asyncio.run(run())


# taskiq


def _taskiq(job: Job) -> Any:
    module = importlib.import_module("taskiq_aio_pika")
    if hasattr(module, "Queue"):
        return module.AioPikaBroker(
            job.url,
            qos=PREFETCH,
            task_queues=[module.Queue(name=job.queue, durable=True)],
        )
    return module.AioPikaBroker(job.url, qos=PREFETCH, queue_name=job.queue)


def taskiq_publish(job: Job) -> Measurement:
    async def run() -> Measurement:
        broker = _taskiq(job)

        async def one(body: str) -> None: ...

        task = broker.register_task(one, task_name="job")
        await broker.startup()
        try:
            return await in_tasks(lambda: task.kiq(BODY), job.count)
        finally:
            await broker.shutdown()

    return asyncio.run(run())


def taskiq_consume(job: Job) -> Measurement:
    taskiq_publish(job)
    receive = importlib.import_module("taskiq.api").run_receiver_task

    async def run() -> Measurement:
        done = asyncio.Event()
        counting = Count(job.count, done.set)
        broker = _taskiq(job)
        broker.is_worker_process = True

        async def one(body: str) -> None:
            counting.add()

        broker.register_task(one, task_name="job")
        receiver = asyncio.create_task(
            receive(broker, max_async_tasks=PREFETCH, max_prefetch=0, run_startup=True),
        )
        await done.wait()
        receiver.cancel()
        await asyncio.gather(receiver, return_exceptions=True)
        await broker.shutdown()
        return counting.clock

    return asyncio.run(run())


def taskiq_timed_publish(job: Job) -> Measurement:
    async def run() -> Measurement:
        broker = _taskiq(job)

        async def one(body: str) -> None: ...

        task = broker.register_task(one, task_name="job")
        await broker.startup()
        try:
            clock = Measurement()
            await publish_stamped(job, task.kiq)
            return clock.stop()
        finally:
            await broker.shutdown()

    return asyncio.run(run())


def taskiq_timed_consume(job: Job) -> Measurement:
    receive = importlib.import_module("taskiq.api").run_receiver_task

    async def run() -> Measurement:
        latencies = Latencies(job.count)
        broker = _taskiq(job)
        broker.is_worker_process = True

        async def one(body: str) -> None:
            latencies.take(body)

        broker.register_task(one, task_name="job")
        await broker.startup()
        receiver = asyncio.create_task(receive(broker, max_async_tasks=PREFETCH, max_prefetch=0))
        say(ready=True)
        clock = Measurement()
        await latencies.done.wait()
        clock.stop()
        receiver.cancel()
        await asyncio.gather(receiver, return_exceptions=True)
        await broker.shutdown()
        say(**latencies.summary())
        return clock

    return asyncio.run(run())


# Dramatiq


def _dramatiq(job: Job, function: Callable[[str], None]) -> tuple[Any, Any]:
    dramatiq = importlib.import_module("dramatiq")
    rabbitmq = importlib.import_module("dramatiq.brokers.rabbitmq")
    broker = rabbitmq.RabbitmqBroker(url=job.url, confirm_delivery=True)
    dramatiq.set_broker(broker)
    return broker, dramatiq.actor(function, queue_name=job.queue, actor_name="job")


def dramatiq_publish(job: Job) -> Measurement:
    def one(body: str) -> None: ...

    broker, actor = _dramatiq(job, one)
    actor.send(BODY)
    clock = Measurement()
    for _ in range(job.count):
        actor.send(BODY)
    clock.stop()
    broker.close()
    return clock


def dramatiq_consume(job: Job) -> Measurement:
    dramatiq_publish(job)
    done = threading.Event()
    counting = Count(job.count, done.set)

    def one(body: str) -> None:
        counting.add()

    broker, _ = _dramatiq(job, one)
    worker = importlib.import_module("dramatiq").Worker(broker, worker_threads=THREADS)
    worker.start()
    done.wait()
    worker.stop()
    broker.close()
    return counting.clock


# Celery


def _celery(job: Job, function: Callable[[str], None]) -> tuple[Any, Any]:
    app = importlib.import_module("celery").Celery("bench", broker=job.url)
    app.conf.update(
        task_default_queue=job.queue,
        broker_transport_options={"confirm_publish": True},
        task_ignore_result=True,
        task_acks_late=True,
        worker_prefetch_multiplier=PREFETCH,
        worker_redirect_stdouts=False,
    )
    return app, app.task(name="job")(function)


def celery_publish(job: Job) -> Measurement:
    def one(body: str) -> None: ...

    _, task = _celery(job, one)
    task.delay(BODY)
    clock = Measurement()
    for _ in range(job.count):
        task.delay(BODY)
    return clock.stop()


def celery_consume(job: Job) -> Measurement:
    state: Any = importlib.import_module("celery.worker.state")

    def stop() -> None:
        state.should_terminate = 0

    counting = Count(job.count, stop)

    def one(body: str) -> None:
        counting.add()

    app, task = _celery(job, one)  # a name is for one function only
    for _ in range(job.count):
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
    return counting.clock


CONTESTANTS: Final[dict[str, Callable[[Job], Measurement]]] = {
    "faststream_publish": faststream_publish,
    "faststream_consume": faststream_consume,
    "faststream_timed_publish": faststream_timed_publish,
    "faststream_timed_consume": faststream_timed_consume,
    "taskiq_publish": taskiq_publish,
    "taskiq_consume": taskiq_consume,
    "taskiq_timed_publish": taskiq_timed_publish,
    "taskiq_timed_consume": taskiq_timed_consume,
    "dramatiq_publish": dramatiq_publish,
    "dramatiq_consume": dramatiq_consume,
    "celery_publish": celery_publish,
    "celery_consume": celery_consume,
}


def main() -> None:
    """Run one contestant and print what it took."""
    name, job = sys.argv[1], Job.from_json(sys.argv[2])
    logging.basicConfig(level=logging.ERROR)
    taken = CONTESTANTS[name](job)
    say(messages=job.count, wall=taken.wall, cpu=taken.cpu)
    os._exit(0)  # whatever threads of theirs still wait for


if __name__ == "__main__":
    main()
