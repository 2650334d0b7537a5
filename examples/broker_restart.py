"""Restart the broker: queues are durable, messages persistent, and both sides come back.

This script always starts a private RabbitMQ, since it has to stop it.
"""

import asyncio
import logging

from aioworkq import Producer, Queue, Worker
from aioworkq.testing import RabbitMQ

numbers = Queue("broker_restart", int)


async def main() -> None:
    handled: asyncio.Queue[int] = asyncio.Queue()

    async with RabbitMQ() as node, Producer(node.url) as producer:
        for number in (0, 1, 2):
            await producer.publish(numbers, number)
        print("3 messages are confirmed.")

        await node.stop()
        print("RabbitMQ is down.")
        waiting = asyncio.create_task(producer.publish(numbers, 3))  # it waits for the connection

        await node.start()
        print("RabbitMQ is up.")
        await waiting
        print("1 message more is confirmed.")

        worker = Worker(node.url)

        @worker.handler(numbers)
        async def work(number: int) -> None:
            handled.put_nowait(number)

        async with worker:
            print(f"Handled: {sorted([await handled.get() for _ in range(4)])}")


if __name__ == "__main__":
    # aioworkq tells of an outage in one line; what it stands on tells the same at length.
    logging.getLogger("aiormq").setLevel(logging.CRITICAL)
    logging.getLogger("aio_pika").setLevel(logging.CRITICAL)
    asyncio.run(main())
