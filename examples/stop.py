"""Stop a worker: what runs may finish within the grace period, the rest goes back unharmed."""

import asyncio

from _broker import broker_url

from aioworkq import Delivery, Producer, Queue, Worker

durations = Queue("stop", float)


def make_worker(url: str, started: asyncio.Queue[float], *, grace: float) -> Worker:
    worker = Worker(url, grace=grace)

    @worker.handler(durations)
    async def work(seconds: float, delivery: Delivery) -> None:
        started.put_nowait(seconds)
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            print(f"{seconds} s of work are cancelled, attempt {delivery.attempt}.")
            raise  # never swallow it: the message would be acked
        print(f"{seconds} s of work are done, attempt {delivery.attempt}.")

    return worker


async def main(url: str) -> None:
    started: asyncio.Queue[float] = asyncio.Queue()
    async with Producer(url) as producer:
        await producer.publish_many(durations, [0.2, 3.0])

    async with make_worker(url, started, grace=1.5):
        for _ in range(2):
            await started.get()
        print("The first worker stops.")
    async with make_worker(url, started, grace=30):
        await started.get()
        print("The second worker stops.")


if __name__ == "__main__":
    asyncio.run(main(broker_url()))
