"""Fail in every way there is, and see what becomes of each message."""

import asyncio
from dataclasses import dataclass

from _broker import broker_url

from aioworkq import Delivery, Producer, Queue, Reject, RetryLater, RetryPolicy, Worker


@dataclass
class Payment:
    """What the queue carries."""

    to: str
    amount: int


payments = Queue("payments", Payment)
dead_payments = Queue(payments.dead_letter_queue, bytes)


async def main(url: str) -> None:
    worker = Worker(url)
    lines: asyncio.Queue[str] = asyncio.Queue()

    @worker.handler(payments, retry=RetryPolicy(attempts=3, first=0.125, jitter=0))
    async def pay(payment: Payment, delivery: Delivery) -> None:
        if payment.amount < 0:
            raise Reject("a negative amount")
        if payment.to == "Bob" and delivery.attempt == 1:
            raise RetryLater(0.5)
        if payment.to == "Eve":
            raise ConnectionError("the bank does not answer")
        lines.put_nowait(f"{payment.to} is paid at attempt {delivery.attempt}.")

    @worker.handler(dead_payments)
    async def inspect(_body: bytes, delivery: Delivery) -> None:
        lines.put_nowait(f"Dead: {delivery.headers['x-aioworkq-reason']}")

    async with worker, Producer(url) as producer:
        await producer.publish(payments, Payment("Ada", 10))
        await producer.publish(payments, Payment("Bob", 20))
        await producer.publish(payments, Payment("Eve", 30))
        await producer.publish(payments, Payment("Sam", -1))
        await producer.publish(payments.name, {"to": "nobody"})  # not a Payment
        for line in sorted([await lines.get() for _ in range(5)]):
            print(line)


if __name__ == "__main__":
    asyncio.run(main(broker_url()))
