"""Restart the broker: queues are durable, messages persistent, and both sides come back.

This script always starts a private RabbitMQ, since it has to end it.
"""

import asyncio

from aioworkq import Producer, Queue, Worker
from aioworkq.testing import RabbitMQ

jobs = Queue("broker_restart", int)


async def main() -> None:
    handled: list[int] = []
    all_handled = asyncio.Event()

    async with RabbitMQ() as node, Producer(node.url) as producer:
        for number in range(3):
            await producer.publish(jobs, number)
        print("3 messages are confirmed.")

        await node.kill()  # SIGKILL: what a power cut does
        print("RabbitMQ is gone.")
        waiting = asyncio.create_task(producer.publish(jobs, 3))  # waits for the connection

        await node.start()
        print("RabbitMQ is back.")
        await waiting
        print("1 message more is confirmed.")

        worker = Worker(node.url)

        @worker.handler(jobs)
        async def work(number: int) -> None:
            handled.append(number)
            if len(handled) == 4:
                all_handled.set()

        async with worker:
            await all_handled.wait()
    print(f"Handled: {sorted(handled)}")


if __name__ == "__main__":
    asyncio.run(main())
