"""Publish with confirms: one message, a thousand of them, and one that no queue takes."""

import asyncio

from _broker import broker_url

from aioworkq import Producer, Queue, UnroutableError, Worker

numbers = Queue("confirms", int)
many = range(1000)


async def main(url: str) -> None:
    async with Producer(url) as producer:
        await producer.publish(numbers, 0)
        print("1 message is confirmed.")

        report = await producer.publish_many(numbers, many[1:])
        print(f"{report.confirmed} messages are confirmed, {report.failed} failed.")

        try:
            await producer.publish(Queue("nobody_made_it", declare=False), 0)
        except UnroutableError as exc:
            print(f"Returned: {exc.reason}")

    worker = Worker(url)
    seen: set[int] = set()
    all_seen = asyncio.Event()

    @worker.handler(numbers, concurrency=100)
    async def add(number: int) -> None:
        seen.add(number)
        if len(seen) == len(many):
            all_seen.set()

    async with worker:
        await all_seen.wait()
    print(f"{len(seen)} messages are handled.")


if __name__ == "__main__":
    asyncio.run(main(broker_url()))
