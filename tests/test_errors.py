"""What the errors say: what, why, and what to do."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING

import pytest

from aioworkq import DeadLetter, Retry, errors
from aioworkq.errors import (
    AccessRefusedError,
    BatchError,
    ConnectionLostError,
    DecodeError,
    MessageError,
    NotConfirmedError,
    OutcomeUnknownError,
    PublishError,
    Reject,
    RetryLater,
    Signal,
    StateError,
    TopologyError,
    UnroutableError,
    WorkQueueError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

SENTENCES: list[tuple[Exception, str]] = [
    (
        ConnectionLostError("connecting to RabbitMQ", reason="Connection refused"),
        "connecting to RabbitMQ: Connection refused. Check that RabbitMQ runs and is reachable at "
        "the URL, or allow a longer timeout.",
    ),
    (
        ConnectionLostError("declaring queue 'a'"),
        "declaring queue 'a': the connection to RabbitMQ was lost. Check that RabbitMQ runs and is "
        "reachable at the URL, or allow a longer timeout.",
    ),
    (
        AccessRefusedError("connecting to amqp://a:5672/", reason="NOT_ALLOWED - no vhost x"),
        "connecting to amqp://a:5672/: NOT_ALLOWED - no vhost x. Correct the user, the "
        "password, the virtual host or the user's permissions.",
    ),
    (
        AccessRefusedError("connecting"),
        "connecting: RabbitMQ refused the access. Correct the user, the password, the virtual host "
        "or the user's permissions.",
    ),
    (
        TopologyError(
            "emails",
            reason="PRECONDITION_FAILED",
            expected={"x-queue-type": "quorum"},
            actual={"x-queue-type": "classic"},
        ),
        "queue 'emails' cannot be used: PRECONDITION_FAILED (x-queue-type: ours is 'quorum', the "
        "broker's is 'classic'). Declare it alike on both sides, or delete the one that is there.",
    ),
    (
        TopologyError("emails", reason="NOT_FOUND", advice="Declare it."),
        "queue 'emails' cannot be used: NOT_FOUND. Declare it.",
    ),
    (PublishError("m1", queue="q", reason="why"), "message m1 for queue 'q' failed: why."),
    (
        UnroutableError("m1", queue="q", reason="312 NO_ROUTE"),
        "message m1 was returned: no queue 'q' exists (312 NO_ROUTE). Declare the queue, or leave "
        "declare=True on it.",
    ),
    (
        NotConfirmedError("m1", queue="q", reason="RabbitMQ sent a negative confirm"),
        "message m1 was refused by queue 'q': RabbitMQ sent a negative confirm. Publish it again "
        "later; a queue with max_length may be full.",
    ),
    (
        OutcomeUnknownError("m1", queue="q", reason="the broker is silent"),
        "no confirm for message m1 to queue 'q' in time: the broker is silent. It may or may not "
        "be stored; publishing it again with the same message_id may duplicate it.",
    ),
    (
        DecodeError("Email", reason="Expected `int`"),
        "the body is not a valid Email: Expected `int`. Publish with the same Queue that the "
        "handler is registered for.",
    ),
    (
        StateError("this producer cannot publish", reason="it was closed", advice="Make another."),
        "this producer cannot publish: it was closed. Make another.",
    ),
]


@pytest.mark.parametrize(("error", "sentence"), SENTENCES, ids=lambda value: type(value).__name__)
def test_each_error_says_what_why_and_what_to_do(error: Exception, sentence: str) -> None:
    """One table holds every sentence."""
    assert str(error) == sentence


def test_every_error_has_a_sentence_in_the_table() -> None:
    """A new error class cannot be forgotten here."""
    classes = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, WorkQueueError)
    }
    assert classes - {WorkQueueError, MessageError} == {type(error) for error, _ in SENTENCES}


def test_the_tree_is_the_one_in_the_docstring() -> None:
    """Who catches a base catches what stands under it."""
    assert issubclass(AccessRefusedError, ConnectionLostError)
    assert issubclass(DecodeError, MessageError)
    of_publishing = (UnroutableError, NotConfirmedError, OutcomeUnknownError)
    assert all(issubclass(error, PublishError) for error in of_publishing)
    others = (ConnectionLostError, TopologyError, PublishError, MessageError, StateError)
    assert all(issubclass(error, WorkQueueError) for error in others)
    assert not issubclass(Signal, WorkQueueError)
    doc = errors.__doc__ or ""
    names = [name for name, value in vars(errors).items() if isinstance(value, type)]
    assert all(name in doc for name in names if not name.startswith("_"))


def test_signals_keep_what_the_handler_said() -> None:
    """Reject has a reason, RetryLater a delay that cannot be negative."""
    assert Reject("too old").reason == "too old"
    assert RetryLater(2.5, counts=False).delay == 2.5
    assert not RetryLater(1, counts=False).counts
    with pytest.raises(ValueError, match="at least 0 seconds"):
        RetryLater(-1)
    with pytest.raises(ValueError, match="at least 0 seconds"):
        RetryLater(float("nan"))


ACROSS = [
    *(error for error, _ in SENTENCES),
    Reject("no"),
    RetryLater(2.5, counts=False),
    BatchError({0: DeadLetter("too old"), 2: Reject("no"), 3: Retry(1.5)}),
]


@pytest.mark.parametrize("error", ACROSS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])  # noqa: S301 - our own bytes
def test_every_error_comes_back_from_another_process_as_it_was(
    error: Exception,
    way: Callable[[Exception], Exception],
) -> None:
    """Handlers and publishers may run in other processes."""
    error.add_note("seen here")
    back = way(error)
    assert type(back) is type(error)
    assert (str(back), repr(back)) == (str(error), repr(error))
    assert set(vars(back)) == set(vars(error))
    assert back.__notes__[-1] == "seen here"


def _fail(number: int) -> None:
    if number:
        raise OutcomeUnknownError("m-1", queue="emails", reason="no confirm within 30 s")


def test_an_error_does_not_break_the_process_pool_that_it_is_raised_in() -> None:
    """An exception that cannot be rebuilt ends all of a pool's work with BrokenProcessPool."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.raises(OutcomeUnknownError, match="no confirm for message m-1") as caught:
            pool.submit(_fail, 1).result()
        assert caught.value.queue == "emails"
        pool.submit(_fail, 0).result()
