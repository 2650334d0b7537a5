"""How the public API is typed: checked by mypy and pyright, never run.

Every line with an ignore must be an error: both checkers report an ignore that is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, assert_type

import aioworkq
from aioworkq import Delivery, Outcome, Producer, Queue, Reject, RetryPolicy, Worker


@dataclass
class Email:
    to: str


@dataclass
class HtmlEmail(Email):
    html: str


emails = Queue("emails", Email)
anything = Queue("anything")
worker = Worker("amqp://localhost/")

assert_type(emails, Queue[Email])
assert_type(anything, Queue[Any])
assert_type(Queue("numbers", int), Queue[int])


@worker.handler(emails, concurrency=10)
async def send(email: Email) -> None: ...


@worker.handler(emails, retry=RetryPolicy(attempts=8, first=1, max=3600), timeout=60)
def send_in_thread(email: Email, delivery: Delivery) -> str:
    if delivery.attempt > 3:
        raise Reject("gave up on this one")
    return email.to


@worker.handler(emails)
async def takes_more(email: object, retries: int = 3) -> None: ...


@worker.handler("bare")
async def bare(body: dict[str, int]) -> None: ...


@worker.handler(emails)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
async def wrong_type(email: int) -> None: ...


@worker.handler(emails)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
async def too_narrow(email: HtmlEmail) -> None: ...


@worker.handler(emails)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
async def no_body() -> None: ...


def decide(exc: Exception, delivery: Delivery) -> Outcome:
    return aioworkq.Retry(5) if delivery.attempt < 3 else aioworkq.DeadLetter(str(exc))


@worker.handler(emails, on_error=decide)
async def with_function(email: Email) -> None: ...


@worker.handler(emails, on_error="ignore")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
async def with_unknown_word(email: Email) -> None: ...


async def publish(producer: Producer) -> None:
    assert_type(await producer.publish(emails, Email("ada")), str)
    await producer.publish(emails, HtmlEmail("ada", "<p>"))
    await producer.publish("bare", {"a": 1}, delay=60, headers={"a": 1})
    await producer.publish(emails, "ada")  # type: ignore[misc]  # pyright: ignore[reportArgumentType]
    report = await producer.publish_many(emails, [Email("ada"), Email("bob")])
    assert_type(report[0], Exception | None)
    await producer.publish_many(emails, ["ada"])  # type: ignore[misc]  # pyright: ignore[reportArgumentType]


async def handlers_stay_functions() -> None:
    assert_type(send_in_thread(Email("ada"), delivery()), str)
    await send(Email("ada"))


def delivery() -> Delivery:
    message = aioworkq.Message(b"", "emails")
    return Delivery(message, queue="emails", attempt=1, redelivered=False)
