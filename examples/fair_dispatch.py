"""Share uneven work between two workers: each takes the next message when it is free.

The first message is four seconds of work, the other seven are a moment each. With
``prefetch_count=1`` nothing waits behind the long one.
"""

import asyncio
from collections import Counter

from _broker import broker_url

from aioworkq import Producer, Queue, Worker

durations = Queue("fair_dispatch", float)
seconds = [4.0] + [0.05] * 7


async def main(url: str) -> None:
    async with Producer(url) as producer:
        report = await producer.publish_many(durations, seconds)
        report.raise_for_errors()
        print(f"{report.confirmed} messages are confirmed.")

    done: Counter[str] = Counter()
    all_done = asyncio.Event()

    def make_worker(name: str) -> Worker:
        worker = Worker(url, name=name)

        @worker.handler(durations, concurrency=1, prefetch_count=1)
        async def work(duration: float) -> None:
            await asyncio.sleep(duration)
            done[name] += 1
            if done.total() == len(seconds):
                all_done.set()

        return worker

    async with make_worker("first"), make_worker("second"):
        await all_done.wait()
    few, many = sorted(done.values())
    print(f"One worker handled {few} message, the other one {many}.")


if __name__ == "__main__":
    asyncio.run(main(broker_url()))
