"""Publish one message and handle it, in one script."""

import asyncio
from dataclasses import dataclass

from aioworkq import Producer, Queue, Worker


@dataclass
class Email:
    """What the queue carries."""

    to: str
    subject: str


emails = Queue("emails", Email)


async def main(url: str) -> None:
    worker = Worker(url)
    handled = asyncio.Event()

    @worker.handler(emails, concurrency=10)
    async def send_email(email: Email) -> None:
        print(f"To {email.to}: {email.subject}")
        handled.set()

    async with worker, Producer(url) as producer:
        await producer.publish(emails, Email("ada@example.org", "Hello"))
        await handled.wait()


if __name__ == "__main__":
    from _broker import broker_url

    asyncio.run(main(broker_url()))
