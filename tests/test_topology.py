"""Queues and what has to be declared for them."""

from __future__ import annotations

from typing import Any

import pytest

from aioworkq.topology import (
    Queue,
    QueueDeclaration,
    as_queue,
    declarations,
    refuses_when_full,
)


def test_a_quorum_queue_never_drops_a_message() -> None:
    """What the broker gives up itself goes to the dead-letter queue, at least once."""
    dead, queue = declarations(Queue("emails", dict))
    assert dead == QueueDeclaration(
        "emails.dead",
        {"x-queue-type": "quorum", "x-delivery-limit": 2**31 - 1},
    )
    assert queue == QueueDeclaration(
        "emails",
        {
            "x-queue-type": "quorum",
            "x-delivery-limit": 2**31 - 1,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": "emails.dead",
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        },
    )


def test_a_classic_queue_is_what_other_clients_declare() -> None:
    """queue_declare(queue, durable=True) has no arguments, and neither have we."""
    assert declarations(Queue("task_queue", type="classic")) == (
        QueueDeclaration("task_queue.dead", {}),
        QueueDeclaration("task_queue", {}),
    )


def test_options_become_arguments() -> None:
    """Those of RabbitMQ's names, and any others given."""
    queue = Queue(
        "q", type="classic", max_priority=5, max_length=10, arguments={"x-queue-mode": "lazy"}
    )
    assert declarations(queue)[1].arguments == {
        "x-max-priority": 5,
        "x-max-length": 10,
        "x-overflow": "reject-publish",
        "x-queue-mode": "lazy",
    }


def test_a_queue_of_operators_is_only_looked_for() -> None:
    """It must be there; its dead-letter queue should be."""
    dead, queue = declarations(Queue("q", declare=False))
    assert (dead.if_missing, queue.if_missing) == ("warn", "fail")


def test_a_queue_is_a_value() -> None:
    """Equal, hashable, frozen."""
    assert Queue("q", dict) == Queue("q", dict)
    other: Queue[Any] = Queue("q", list)
    assert Queue("q", dict) != other
    assert len({Queue("q", dict), Queue("q", dict)}) == 1
    with pytest.raises(AttributeError):
        Queue("q").name = "other"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    given = {"x-a": 1}
    queue = Queue("q", arguments=given)
    given["x-a"] = 2
    assert queue.arguments == {"x-a": 1}


def test_a_bare_name_is_short_for_a_queue() -> None:
    """With bodies of any type."""
    queue: Queue[Any] = as_queue("q")
    assert queue == Queue("q")
    assert queue.body_type is Any
    assert as_queue(queue) is queue
    with pytest.raises(TypeError, match="by its name or as a Queue, not by 5"):
        as_queue(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("", "name is empty"),
        ("q" * 251, "has 251 bytes: it may have 250"),
        ("ü" * 130, "has 260 bytes"),
        ("amq.gen", "starts with 'amq.'"),
        ("read from a file\n", "has a line break, which RabbitMQ leaves out"),
        ("\ud800", "not valid Unicode"),
    ],
)
def test_a_name_that_cannot_be_a_queues_is_refused(name: str, sentence: str) -> None:
    """Before anything is sent."""
    with pytest.raises(ValueError, match=sentence):
        Queue(name)


def test_the_longest_name_is_allowed() -> None:
    """250 bytes, and .dead makes 255."""
    assert len(Queue("q" * 250).dead_letter_queue) == 255


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"type": "stream"}, "'quorum' or 'classic'"),
        ({"max_priority": 3}, "for classic queues"),
        ({"max_priority": 0, "type": "classic"}, "from 1 to 255"),
        ({"max_priority": 256, "type": "classic"}, "from 1 to 255"),
        ({"max_length": 0}, "whole number from 1"),
    ],
)
def test_an_option_that_cannot_be_right_is_refused(options: dict[str, Any], sentence: str) -> None:
    """Where the queue is made."""
    with pytest.raises(ValueError, match=sentence):
        Queue("q", **options)


@pytest.mark.parametrize(
    ("queue", "refuses"),
    [
        (Queue("q"), False),
        (Queue("q", type="classic"), False),
        (Queue("q", max_length=5), True),
        (Queue("q", type="classic", max_length=5), True),
        (Queue("q", declare=False, max_length=5), True),
        (Queue("q", arguments={"x-max-length-bytes": 5}), True),
        (Queue("q", type="classic", arguments={"x-max-length": 5}), False),
        (Queue("q", arguments={"x-max-length": 5, "x-overflow": "drop-head"}), False),
        (Queue("q", arguments={"x-expires": 5}), False),
        (Queue("q", max_length=5, arguments={"x-overflow": "reject-publish-dlx"}), True),
    ],
)
def test_which_queues_refuse_when_they_are_full(queue: Queue[Any], *, refuses: bool) -> None:
    """Those with a length that do not drop their oldest messages."""
    assert refuses_when_full(queue) is refuses
