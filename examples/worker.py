"""Handle the messages of `new_task.py`, one at a time; every dot is a second of work.

Start it in one terminal, or in several, and `new_task.py` in another.
"""

import asyncio
import os

from _broker import broker_url

import aioworkq
from aioworkq import Queue, Worker

texts = Queue("task_queue", str)
url = broker_url()
worker = Worker(url)


@worker.handler(texts, concurrency=1, prefetch_count=1)
async def work(text: str) -> None:
    print(f" [x] Received {text!r}", flush=True)
    await asyncio.sleep(text.count("."))
    print(" [x] Done", flush=True)


if __name__ == "__main__":
    if "AMQP_URL" not in os.environ:
        print(f"In another terminal:\n  AMQP_URL={url} python examples/new_task.py Hello...")
    print(" [*] Waiting for messages. To exit press Ctrl-C", flush=True)
    aioworkq.run(worker)
