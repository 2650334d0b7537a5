"""Run a worker beside other tasks of an event loop, here beside a clock."""

import asyncio

import anyio
from _broker import broker_url

from aioworkq import Producer, Queue, Worker

reports = Queue("beside_other_tasks", str)


async def main(url: str) -> None:
    worker = Worker(url)
    ticks = 0
    handled = anyio.Event()

    @worker.handler(reports)
    async def work(text: str) -> None:
        before = ticks
        await anyio.sleep(0.5)
        print(f"Handled {text!r}. The clock ticked meanwhile: {ticks > before}")
        handled.set()

    async def clock() -> None:
        nonlocal ticks
        while not handled.is_set():
            await anyio.sleep(0.05)
            ticks += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(clock)
        await tasks.start(worker.run)  # goes on once the worker consumes
        print(f"The worker is ready: {worker.is_ready}")
        async with Producer(url) as producer:
            await producer.publish(reports, "a report")
        await handled.wait()
        worker.stop()  # returns at once; `worker.run` ends when all is done
    print("The worker and the clock have ended.")


if __name__ == "__main__":
    asyncio.run(main(broker_url()))
