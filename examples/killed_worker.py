"""Kill a worker process in the middle of its work: another one finishes its message."""

import asyncio
import multiprocessing
from multiprocessing.connection import Connection

from _broker import broker_url

import aioworkq
from aioworkq import Delivery, Producer, Queue, Worker

reports = Queue("killed_worker", str)


def run_worker(url: str, name: str, pipe: Connection) -> None:
    worker = Worker(url, name=name)

    @worker.handler(reports, concurrency=1)
    async def work(text: str, delivery: Delivery) -> None:
        pipe.send(f"{name} works on {text!r}, attempt {delivery.attempt}.")
        if delivery.attempt == 1:
            await asyncio.sleep(3600)  # it will not live so long
        pipe.send(f"{name} is done.")

    aioworkq.run(worker)


async def publish(url: str) -> None:
    async with Producer(url) as producer:
        await producer.publish(reports, "a report")


def main(url: str) -> None:
    asyncio.run(publish(url))
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()

    ann = spawn.Process(target=run_worker, args=(url, "Ann", there))
    ann.start()
    print(here.recv())
    ann.kill()
    ann.join()
    print(f"Ann was killed by signal {-(ann.exitcode or 0)}.")

    bob = spawn.Process(target=run_worker, args=(url, "Bob", there))
    bob.start()
    print(here.recv())
    print(here.recv())
    bob.terminate()  # SIGTERM: it drains, then exits
    bob.join()
    print(f"Bob exited with status {bob.exitcode}.")


if __name__ == "__main__":
    main(broker_url())
