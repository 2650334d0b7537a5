"""Look at messages that were given up, and publish them again once the mistake is corrected."""

import asyncio

from _broker import broker_url

from aioworkq import DeadLetters, Producer, Queue, Worker

fractions = Queue("fractions", dict[str, int])


async def work_through(url: str, *, default: int) -> None:
    worker = Worker(url)
    started: asyncio.Queue[int] = asyncio.Queue()

    @worker.handler(fractions, on_error="dead-letter")
    async def divide(fraction: dict[str, int]) -> None:
        started.put_nowait(0)
        print(f"1 / {fraction['of']} = {1 / (fraction['of'] or default)}")

    async with worker:
        for _ in range(2):
            await started.get()


async def main(url: str) -> None:
    async with Producer(url) as producer:
        await producer.publish_many(fractions, [{"of": 0}, {"of": 0}])
    await work_through(url, default=0)

    async with DeadLetters(url, fractions) as dead:
        for group, number in (await dead.counts()).items():
            print(f"{number} messages: {group.reason}")
        letter = (await dead.peek(1))[0]
        print(f"{letter.exception_type}: {letter.exception_message}, attempts: {letter.attempts}")
        print(f"Replayed: {await dead.replay()}")
    await work_through(url, default=1)


if __name__ == "__main__":
    asyncio.run(main(broker_url()))
