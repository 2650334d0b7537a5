"""Kill a worker in the middle of its work: another one finishes its message.

The workers are processes of this script: ``python killed_worker.py worker NAME``.
"""

import asyncio
import os
import sys

import aioworkq
from _broker import broker_url
from aioworkq import Delivery, Producer, Queue, Worker

jobs = Queue("killed_worker", str)


def run_worker(name: str) -> None:
    worker = Worker(os.environ["AMQP_URL"], name=name)

    @worker.handler(jobs, concurrency=1)
    async def work(text: str, delivery: Delivery) -> None:
        print(f"{name} works on {text!r}, attempt {delivery.attempt}", flush=True)
        if delivery.attempt == 1:
            await asyncio.sleep(3600)  # it will not live so long
        print(f"{name} is done", flush=True)

    aioworkq.run(worker)


async def start_worker(url: str, name: str) -> tuple[asyncio.subprocess.Process, asyncio.StreamReader]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, "worker", name),
        env=os.environ | {"AMQP_URL": url},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    return process, process.stdout


async def main(url: str) -> None:
    async with Producer(url) as producer:
        await producer.publish(jobs, "a report")

    ann, lines = await start_worker(url, "Ann")
    print((await lines.readline()).decode(), end="")
    ann.kill()
    print(f"Ann was killed by signal {-await ann.wait()}")

    bob, lines = await start_worker(url, "Bob")
    print((await lines.readline()).decode(), end="")
    print((await lines.readline()).decode(), end="")
    bob.terminate()  # SIGTERM: it drains, then exits
    print(f"Bob exited with status {await bob.wait()}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        run_worker(sys.argv[2])
    else:
        asyncio.run(main(broker_url()))
