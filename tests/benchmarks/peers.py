"""Other work queues doing the same, each by its own documentation.

They live in an environment of their own, ``.venv-bench``, which `make bench` makes from
``peers.txt``; this file imports nothing of aioworkq. Each publishes the fields of an `Order`, which
it encodes, and handles what it decodes of them: persistent, in a durable classic queue, with
publisher confirms, prefetch 100 and an ack after the handler. All with asyncio run on its own event
loop, as ours does.

Above each stands which of its configurations were tried. What they gave is CPU µs of the part that
differs, the least of many runs of it without a broker: beside one, the noise is larger.

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
from tests.benchmarks.job import PREFETCH, TASKS, Job, Latencies, Order, publish_stamped, say

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine


async def in_tasks(publish: Callable[[], Coroutine[Any, Any, Any]], count: int) -> Measurement:
    async def publisher() -> None:
        for _ in range(count // TASKS):
            await publish()

    await publish()
    clock = Measurement()
    await asyncio.gather(*(publisher() for _ in range(TASKS)))
    return clock.stop()


# FastStream
#
# To decode and call, 11.4 µs by pydantic, the default, with orjson, which it uses when it is there;
# 13.5 without. A pydantic model takes as long as a dataclass. With MsgSpecSerializer() 14.1, 11.9
# without its error messages, for a msgspec.Struct 11.6. To encode, all take 0.8 to 1.5.
# apply_types=False takes 2.2 and serializer=None 8.3, but hand over a dictionary.
# https://faststream.ag2.ai/latest/getting-started/subscription/annotation/ and .../msgspec/


def _faststream(job: Job) -> tuple[Any, Any]:
    """Return a broker and its queue."""
    rabbit = importlib.import_module("faststream.rabbit")
    broker = rabbit.RabbitBroker(
        job.url,
        logger=None,
        default_channel=rabbit.Channel(prefetch_count=PREFETCH),
    )
    return broker, rabbit.RabbitQueue(job.queue, durable=True)


def faststream_publish(job: Job) -> Measurement:
    async def run() -> Measurement:
        broker, queue = _faststream(job)
        fields = job.fields
        async with broker:
            await broker.declare_queue(queue)
            return await in_tasks(
                lambda: broker.publish(fields, job.queue, persist=True), job.count
            )

    return asyncio.run(run())


def faststream_consume(job: Job) -> Measurement:
    faststream_publish(job)  # one more than it counts

    async def run() -> Measurement:
        done = asyncio.Event()
        counting = Count(job.count, done.set)
        broker, queue = _faststream(job)

        async def handle(order: Order) -> None:
            counting.add()

        broker.subscriber(queue)(handle)

        async with broker:
            await broker.start()
            await done.wait()
        return counting.clock

    return asyncio.run(run())


def faststream_timed_publish(job: Job) -> Measurement:
    async def run() -> Measurement:
        broker, _ = _faststream(job)
        async with broker:
            clock = Measurement()
            await publish_stamped(
                job, lambda fields: broker.publish(fields, job.queue, persist=True)
            )
            return clock.stop()

    return asyncio.run(run())


def faststream_timed_consume(job: Job) -> Measurement:
    async def run() -> Measurement:
        latencies = Latencies(job.count)
        broker, queue = _faststream(job)

        async def handle(order: Order) -> None:
            latencies.take(order.stamp)

        broker.subscriber(queue)(handle)

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
#
# To decode and to encode, 4.9 and 2.9 µs with JSONFormatter, 5.0 and 3.5 with ORJSONSerializer,
# 5.3 and 4.5 with MSGPackSerializer, 6.8 and 7.1 with the default. A pydantic model takes no less
# than a dataclass. --no-parse saves 2.1, but hands over a dictionary.
# https://taskiq-python.github.io/guide/message-format.html and .../guide/cli.html


def _taskiq(job: Job) -> Any:
    module = importlib.import_module("taskiq_aio_pika")
    queue = module.Queue(name=job.queue, type=module.QueueType.CLASSIC, durable=True)
    broker = module.AioPikaBroker(job.url, qos=PREFETCH, task_queues=[queue])
    formatter = importlib.import_module("taskiq.formatters.json_formatter").JSONFormatter()
    return broker.with_formatter(formatter)


def taskiq_publish(job: Job) -> Measurement:
    async def run() -> Measurement:
        broker = _taskiq(job)
        fields = job.fields

        async def one(order: Order) -> None: ...

        task = broker.register_task(one, task_name="job")
        await broker.startup()
        try:
            return await in_tasks(lambda: task.kiq(fields), job.count)
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

        async def one(order: Order) -> None:
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

        async def one(order: Order) -> None: ...

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

        async def one(order: Order) -> None:
            latencies.take(order.stamp)

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
#
# The hooks of the default middleware take 14.4 µs to handle and 2.7 to publish, with Retries alone
# 1.8 and 0.8: a time limit, an age limit, callbacks and pipelines are off for ours, too, and
# retries are not. PickleEncoder would save 3.5 of 6.8 and 3.4 of 5.8, but warns of itself. Of about
# 150 to handle a message beside a broker, 8 threads, the default, take as much as 1 or 2.
# https://dramatiq.io/advanced.html and https://dramatiq.io/reference.html

THREADS: Final = 8


def _dramatiq(job: Job, function: Callable[[dict[str, Any]], None]) -> tuple[Any, Any]:
    os.environ["dramatiq_queue_prefetch"] = str(PREFETCH)  # noqa: SIM112 - read when it is imported
    dramatiq = importlib.import_module("dramatiq")
    rabbitmq = importlib.import_module("dramatiq.brokers.rabbitmq")
    retries = importlib.import_module("dramatiq.middleware").Retries()
    broker = rabbitmq.RabbitmqBroker(url=job.url, confirm_delivery=True, middleware=[retries])
    dramatiq.set_broker(broker)
    return broker, dramatiq.actor(function, queue_name=job.queue, actor_name="job")


def dramatiq_publish(job: Job) -> Measurement:
    def one(fields: dict[str, Any]) -> None: ...

    broker, actor = _dramatiq(job, one)
    fields = job.fields
    actor.send(fields)
    clock = Measurement()
    for _ in range(job.count):
        actor.send(fields)
    clock.stop()
    broker.close()
    return clock


def dramatiq_consume(job: Job) -> Measurement:
    dramatiq_publish(job)
    done = threading.Event()
    counting = Count(job.count, done.set)

    def one(fields: dict[str, Any]) -> None:
        counting.add()

    broker, _ = _dramatiq(job, one)
    worker = importlib.import_module("dramatiq").Worker(broker, worker_threads=THREADS)
    worker.start()
    done.wait()
    worker.stop()
    broker.close()
    return counting.clock


# Celery
#
# Of about 400 µs to handle a message beside a broker, neither a pool of threads nor gossip and
# mingle made a difference that was more than noise; nor did a producer of its own, of 900 µs to
# publish one. They and the heartbeat are off, and the pool is the one that its documentation calls
# fast. msgpack would save 3 each way, but is not JSON.
# https://docs.celeryq.dev/en/stable/userguide/optimizing.html and .../reference/cli.html


def _celery(job: Job, function: Callable[[dict[str, Any]], None]) -> tuple[Any, Any]:
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
    def one(fields: dict[str, Any]) -> None: ...

    _, task = _celery(job, one)
    fields = job.fields
    task.delay(fields)
    clock = Measurement()
    for _ in range(job.count):
        task.delay(fields)
    return clock.stop()


def celery_consume(job: Job) -> Measurement:
    state: Any = importlib.import_module("celery.worker.state")

    def stop() -> None:
        state.should_terminate = 0

    counting = Count(job.count, stop)

    def one(fields: dict[str, Any]) -> None:
        counting.add()

    app, task = _celery(job, one)  # a name is for one function only
    fields = job.fields
    for _ in range(job.count):
        task.delay(fields)
    worker = app.Worker(
        pool="solo",
        concurrency=1,  # times the multiplier is the prefetch; the default counts processors
        loglevel="ERROR",
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
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
