"""A function as a handler: signature, options, call."""

from __future__ import annotations

import functools
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

import anyio
import pytest

from aioworkq import Delivery, Message, Queue, RetryPolicy
from aioworkq.handler import Handler, ThreadCall, make_handler
from aioworkq.options import Options

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator


@dataclass
class Email:
    to: str


@dataclass
class HtmlEmail(Email):
    html: str = ""


EMAILS = Queue("emails", Email)


def make(function: Callable[..., Any], queue: Queue[Any] = EMAILS, **options: Any) -> Handler:
    defaults: dict[str, Any] = {
        "concurrency": None,
        "prefetch_count": None,
        "timeout": None,
        "attempts": 20,
        "on_error": "requeue",
        "on_connection_loss": "finish",
        "retry": None,
        "slow_down": True,
    }
    return make_handler(queue, function, Options(**{**defaults, **options}))


def delivery(body: bytes = b'{"to": "ada"}') -> Delivery:
    message = Message(body, "emails", content_type="application/json")
    return Delivery(message, queue="emails", attempt=1, redelivered=False)


async def body_only(email: Email) -> None: ...
async def body_and_delivery(email: Email, delivery: Delivery) -> None: ...
async def delivery_first(delivery: Delivery, email: Email) -> None: ...
async def unannotated(email) -> None: ...  # type: ignore[no-untyped-def]  # noqa: ANN001  # pyright: ignore[reportMissingParameterType]
async def quoted(email: "Email", it: "Delivery") -> None: ...  # noqa: UP037
async def with_default(email: Email, retries: int = 3) -> None: ...
async def keyword_only(*, email: Email, it: Delivery) -> None: ...
async def wider(email: Email | None) -> None: ...
async def widest(email: object) -> None: ...
def plain(email: Email, it: Delivery) -> None: ...


@pytest.mark.parametrize(
    ("function", "body", "takes_delivery"),
    [
        (body_only, "email", None),
        (body_and_delivery, "email", "delivery"),
        (delivery_first, "email", "delivery"),
        (unannotated, "email", None),
        (quoted, "email", "it"),
        (with_default, "email", None),
        (keyword_only, "email", "it"),
        (wider, "email", None),
        (widest, "email", None),
        (plain, "email", "it"),
    ],
)
def test_parameters_are_bound_by_annotation(
    function: Callable[..., Any],
    body: str,
    takes_delivery: str | None,
) -> None:
    """One takes the body, one may take the delivery, in any order."""
    handler = make(function)
    assert (handler.body_parameter, handler.delivery_parameter) == (body, takes_delivery)
    assert handler.is_async is (function is not plain)


async def no_parameters() -> None: ...
async def two_bodies(email: Email, other: Email) -> None: ...
async def two_deliveries(email: Email, one: Delivery, two: Delivery) -> None: ...
async def positional_only(email: Email, /) -> None: ...
async def other_type(email: int) -> None: ...
async def narrower(email: HtmlEmail) -> None: ...
async def other_union(email: int | str) -> None: ...
def yielding(email: Email) -> Iterator[int]:
    yield 1


async def async_yielding(email: Email) -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (no_parameters, "body in exactly one parameter; it has none"),
        (two_bodies, "it has 'email', 'other'"),
        (two_deliveries, "asks for the delivery twice"),
        (positional_only, "positional-only parameter 'email'"),
        (other_type, "takes int, but the bodies of queue 'emails' are Email"),
        (narrower, "takes HtmlEmail, but"),
        (other_union, "but the bodies of queue 'emails' are Email"),
        (yielding, "is a generator function"),
        (async_yielding, "is a generator function"),
        (5, "a handler is a function, not 5"),
    ],
)
def test_a_wrong_signature_fails_at_registration(function: Any, sentence: str) -> None:
    """And says what a handler looks like."""
    with pytest.raises(TypeError, match=sentence):
        make(function)


def test_annotations_that_cannot_be_evaluated_are_read_as_text() -> None:
    """Types of a function's inside, or for type checkers only."""

    class Local:
        pass

    async def handle(email: Local, it: Delivery) -> None: ...

    handler = make(handle, Queue("q", Local))
    assert handler.delivery_parameter == "it"


def test_each_annotation_is_read_by_itself() -> None:
    """One that cannot be evaluated takes no other one with it."""

    class Local:
        pass

    async def handle(
        email: Email, it: Delivery | None = None, more: Local | None = None
    ) -> None: ...

    handler = make(handle, Queue("emails"))
    assert handler.delivery_parameter == "it"
    assert handler.decode(delivery()) == Email("ada")

    async def local(email: Local) -> None: ...

    with pytest.raises(TypeError, match=r"takes Local, a name that cannot be read .* Queue\('q', "):
        make(local, Queue("q"))


@pytest.mark.parametrize(
    "annotation",
    [Delivery | None, Optional[Delivery], "Optional[Delivery]", "Delivery | None"],  # noqa: UP045
)
def test_a_delivery_may_be_optional(annotation: Any) -> None:
    """It is given all the same."""

    async def handle(email: Email, it: Any = None) -> None: ...

    handle.__annotations__["it"] = annotation
    assert make(handle).delivery_parameter == "it"


def test_a_bare_queue_takes_the_type_of_the_parameter() -> None:
    """@worker.handler("emails") with an annotated body."""
    handler = make(body_only, Queue("emails"))
    assert handler.decode(delivery()) == Email("ada")


def test_callables_of_all_kinds_are_handlers() -> None:
    """Methods, partials and objects with __call__."""

    class Mailer:
        async def send(self, email: Email) -> None: ...
        async def __call__(self, email: Email) -> None: ...

    class Plain:
        def __call__(self, email: Email) -> None: ...

    async def with_option(option: int, email: Email) -> None: ...

    assert make(Mailer().send).is_async
    assert make(Mailer()).is_async
    assert not make(Plain()).is_async
    assert make(functools.partial(with_option, 5)).is_async
    by_name = make(functools.partial(with_option, option=5))
    assert by_name.body_parameter == "email"

    async def plain(email: Email) -> None: ...

    assert make(staticmethod(plain)).is_async


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"concurrency": 0}, "concurrency is 0"),
        ({"concurrency": 1.5}, r"concurrency is 1\.5"),
        ({"concurrency": True}, "concurrency is True"),
        ({"prefetch_count": 0}, "prefetch_count is 0"),
        ({"prefetch_count": -1}, "prefetch_count is -1"),
        ({"prefetch_count": 65_536}, "prefetch_count is 65536"),
        ({"timeout": 0}, "timeout is 0"),
        ({"timeout": -5}, "timeout is -5"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"attempts": 0}, "attempts is 0"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
        ({"on_connection_loss": "wait"}, "on_connection_loss is 'wait'"),
        ({"retry": RetryPolicy(), "on_error": "discard"}, "retry and on_error='discard'"),
    ],
)
def test_an_option_that_cannot_be_right_is_refused(options: dict[str, Any], sentence: str) -> None:
    """Where the handler is registered."""
    with pytest.raises(ValueError, match=sentence):
        make(body_only, **options)


def test_prefetch_follows_concurrency() -> None:
    """Unless it is given."""
    assert make(body_only).prefetch_count == make(body_only).concurrency == 10
    assert make(body_only, concurrency=3).prefetch_count == 3
    assert make(body_only, concurrency=3, prefetch_count=9).prefetch_count == 9
    assert make(body_only, retry=RetryPolicy(attempts=4)).options.attempts == 4


@pytest.mark.parametrize(("cpus", "threads"), [(1, 1), (7, 7), (None, 1)])
def test_as_many_threads_as_cpus(
    monkeypatch: pytest.MonkeyPatch, cpus: int | None, threads: int
) -> None:
    """Unless `concurrency` is given; one where their number is unknown."""
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    assert make(plain).concurrency == make(plain).prefetch_count == threads
    assert make(plain, concurrency=3).concurrency == 3
    assert make(body_only).concurrency == 10


@pytest.mark.anyio
async def test_a_plain_function_runs_in_a_thread() -> None:
    """And its end is told."""
    threads: list[threading.Thread] = []

    def handle(email: Email, it: Delivery) -> None:
        threads.append(threading.current_thread())

    call = ThreadCall()
    await make(handle).call_in_thread(Email("ada"), delivery(), call)
    await call.has_ended.wait()
    assert threads
    assert threads[0] is not threading.main_thread()


@pytest.mark.anyio
async def test_a_thread_goes_on_when_nobody_waits_any_more() -> None:
    """Threads cannot be stopped; that one has ended is still told."""
    started, release = threading.Event(), threading.Event()

    def handle(email: Email) -> None:
        started.set()
        release.wait(10)

    call = ThreadCall()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(make(handle).call_in_thread, Email("ada"), delivery(), call)
        await anyio.to_thread.run_sync(started.wait, 10)
        tasks.cancel_scope.cancel()
    assert not call.has_ended.is_set()
    release.set()
    with anyio.fail_after(10):
        await call.has_ended.wait()


@pytest.mark.anyio
async def test_a_plain_function_that_returns_a_coroutine_has_failed() -> None:
    """Nobody would ever await it."""

    def handle(email: Email) -> Any:
        return body_only(email)

    with pytest.raises(TypeError, match="was never awaited"):
        await make(handle).call_in_thread(Email("ada"), delivery(), ThreadCall())
