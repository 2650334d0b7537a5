"""Publish messages that wait in RabbitMQ first; a long wait does not hold up a short one."""

import asyncio
from datetime import UTC, datetime, timedelta

from _broker import broker_url

from aioworkq import Producer, Queue, Worker

reminders = Queue("reminders", str)


async def main(url: str) -> None:
    worker = Worker(url)
    seen: asyncio.Queue[str] = asyncio.Queue()

    @worker.handler(reminders)
    async def remind(text: str) -> None:
        seen.put_nowait(text)

    async with worker, Producer(url) as producer:
        await producer.publish(
            reminders, "the last one", at=datetime.now(UTC) + timedelta(seconds=2)
        )
        await producer.publish(reminders, "the second one", delay=1)
        await producer.publish(reminders, "the first one")
        for _ in range(3):
            print(await seen.get())


if __name__ == "__main__":
    asyncio.run(main(broker_url()))
