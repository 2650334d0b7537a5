"""How the public API is typed: checked by mypy and pyright, never run.

Every line with an ignore must be an error: both checkers report an ignore that is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, assert_type

import aioworkq
from aioworkq import BatchError, Delivery, Outcome, Producer, Queue, Reject, RetryPolicy, Worker

if TYPE_CHECKING:
    from collections.abc import Sequence


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


@worker.batch_handler(emails, max_size=50, max_wait=0.5)
async def send_all(emails: list[Email]) -> None:
    raise BatchError({0: Reject("no"), 1: aioworkq.Retry(5)})


@worker.batch_handler(emails, retry=RetryPolicy(), timeout=60)
def send_all_in_thread(emails: list[Email], deliveries: list[Delivery]) -> int:
    return len(emails) + len(deliveries)


@worker.batch_handler(emails)
async def takes_any_sequence(emails: Sequence[object]) -> None: ...


@worker.batch_handler("bare")
async def bare_batch(bodies: list[dict[str, int]]) -> None: ...


@worker.batch_handler(emails)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
async def wrong_items(emails: list[int]) -> None: ...


@worker.batch_handler(emails)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
async def too_narrow_items(emails: list[HtmlEmail]) -> None: ...


@worker.batch_handler(emails)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
async def no_list(email: Email) -> None: ...


BatchError({"first": Reject("no")})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]
BatchError({0: "no"})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]


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
    assert_type(send_all_in_thread([Email("ada")], [delivery()]), int)
    await send(Email("ada"))


def delivery() -> Delivery:
    message = aioworkq.Message(b"", "emails")
    return Delivery(message, queue="emails", attempt=1, redelivered=False)
