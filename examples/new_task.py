"""Publish a message to the task queue: ``python new_task.py A very hard task...``.

Every dot in the text is a second of work for `worker.py`.
"""

import asyncio
import sys

from _broker import broker_url

from aioworkq import Producer, Queue

texts = Queue("task_queue", str)


async def main(url: str, text: str) -> None:
    async with Producer(url) as producer:
        await producer.publish(texts, text)
        print(f" [x] Published {text!r}")


if __name__ == "__main__":
    asyncio.run(main(broker_url(), " ".join(sys.argv[1:]) or "Hello World!"))
