"""What is remembered of deliveries whose channel was lost."""

from __future__ import annotations

from datetime import UTC, datetime

from aioworkq.message import Message
from aioworkq.redelivery import RedeliveryMemory, common_key

ONE = Message(b"one", "q", message_id="1")
TWO = Message(b"two", "q", message_id="2")
NAMELESS = Message(b"none", "q")


def test_an_ack_is_remembered_with_its_subscription() -> None:
    """So that a redelivery is acked only when that subscription was lost."""
    memory: RedeliveryMemory[str] = RedeliveryMemory(size=10)
    assert memory.acked_on(ONE) is None
    memory.acked(ONE, "first")
    assert memory.acked_on(ONE) == "first"
    assert memory.acked_on(TWO) is None


def test_a_message_that_is_started_again_is_no_duplicate_any_more() -> None:
    """What runs now must be settled by itself."""
    memory: RedeliveryMemory[str] = RedeliveryMemory(size=10)
    memory.acked(ONE, "first")
    memory.started(ONE)
    assert memory.acked_on(ONE) is None


def test_excuses_add_up_until_the_message_is_acked() -> None:
    """The broker's count goes on too."""
    memory: RedeliveryMemory[str] = RedeliveryMemory(size=10)
    memory.excuse(ONE)
    memory.excuse(ONE)
    assert memory.excused(ONE) == 2
    memory.acked(ONE, "first")
    assert memory.excused(ONE) == 0


def test_what_was_acked_says_nothing_of_its_copies() -> None:
    """Whatever they have in common; nor of another message that was given the same id."""
    memory: RedeliveryMemory[str] = RedeliveryMemory(size=10)
    memory.acked(ONE, "first")
    copy = ONE.copy_to("q", ONE.headers)
    assert memory.acked_on(copy) is None
    memory.acked(copy, "first")
    assert memory.acked_on(copy.copy_to("q", {})) is None
    later = datetime(2026, 1, 1, tzinfo=UTC)
    assert memory.acked_on(Message(b"one", "q", message_id="1", timestamp=later)) is None
    assert memory.acked_on(Message(b"one", "q", message_id="1")) == "first"


def test_large_bodies_are_told_apart_by_size_and_ends() -> None:
    """They are not looked through."""
    size = 100_000
    memory: RedeliveryMemory[str] = RedeliveryMemory(size=10)
    memory.acked(Message(b"x" * size, "q", message_id="1"), "first")
    assert memory.acked_on(Message(b"x" * size, "q", message_id="1")) == "first"
    for other in (b"x" * (size + 1), b"y" + b"x" * (size - 1), b"x" * (size - 1) + b"y"):
        assert memory.acked_on(Message(other, "q", message_id="1")) is None


def test_messages_without_an_id_are_not_remembered() -> None:
    """Two equal messages may be two pieces of work."""
    memory: RedeliveryMemory[str] = RedeliveryMemory(size=10)
    memory.acked(NAMELESS, "first")
    memory.excuse(NAMELESS)
    assert memory.acked_on(NAMELESS) is None
    assert memory.excused(NAMELESS) == 0
    assert len(memory) == 0


def test_the_memory_is_bounded() -> None:
    """The oldest are forgotten first."""
    memory: RedeliveryMemory[str] = RedeliveryMemory(size=3)
    for number in range(10):
        memory.acked(Message(b"", "q", message_id=f"a{number}"), "s")
        memory.excuse(Message(b"", "q", message_id=f"e{number}"))
    assert len(memory) == 6
    assert memory.acked_on(Message(b"", "q", message_id="a9")) == "s"
    assert memory.acked_on(Message(b"", "q", message_id="a6")) is None


def test_messages_are_told_apart_by_id_and_else_by_body() -> None:
    """Ids go before bodies."""
    assert common_key(ONE) == common_key(Message(b"other", "q", message_id="1"))
    assert common_key(ONE) != common_key(Message(b"one", "q", message_id="2"))
    assert common_key(ONE) != common_key(Message(b"one", "q"))
    assert common_key(NAMELESS) == common_key(Message(b"none", "q"))
    assert common_key(NAMELESS) != common_key(Message(b"some", "q"))
