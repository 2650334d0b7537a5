"""Fail in every way there is, and see what becomes of each message."""

import asyncio
from dataclasses import dataclass

from _broker import broker_url

from aioworkq import DeadLetters, Delivery, Producer, Queue, Reject, RetryLater, RetryPolicy, Worker


@dataclass
class Payment:
    """What the queue carries."""

    to: str
    amount: int


payments = Queue("payments", Payment)


async def main(url: str) -> None:
    worker = Worker(url)
    started: asyncio.Queue[str] = asyncio.Queue()

    @worker.handler(payments, retry=RetryPolicy(attempts=3, first=0.125, jitter=0))
    async def pay(payment: Payment, delivery: Delivery) -> None:
        started.put_nowait(payment.to)
        if payment.amount < 0:
            raise Reject("a negative amount")
        if payment.to == "Bob" and delivery.attempt == 1:
            raise RetryLater(0.5)
        if payment.to == "Eve":
            raise ConnectionError("the bank does not answer")
        print(f"{payment.to} is paid at attempt {delivery.attempt}.")

    async with worker, Producer(url) as producer:
        for to, amount in {"Ada": 10, "Bob": 20, "Eve": 30, "Sam": -1}.items():
            await producer.publish(payments, Payment(to, amount))
        await producer.publish(payments.name, {"to": "nobody"})  # not a Payment
        for _ in range(1 + 2 + 3 + 1):
            await started.get()

    async with DeadLetters(url, payments) as dead:
        letters = await dead.peek()
        await dead.purge()
    for letter in sorted(letters, key=lambda letter: letter.reason):
        print(f"Dead: {letter.message.body.decode()}: {letter.reason}")


if __name__ == "__main__":
    asyncio.run(main(broker_url()))
