"""The states of one consumer, as a table.

Two rules: a consumer is subscribed only between the broker's ConsumeOk and the first sign that the
subscription is gone; and every state but the last two leads back to ``SUBSCRIBED`` or to an end, so
that no consumer can be deaf for ever.
"""

from __future__ import annotations

from enum import Enum
from typing import Final


class ConsumerState(Enum):
    """Where a consumer is between registration and its end."""

    REGISTERED = "registered"
    """Known to the worker, which does not run yet."""
    CONNECTING = "connecting"
    """Waits for a connection, declares its queue, subscribes."""
    SUBSCRIBED = "subscribed"
    """RabbitMQ delivers to it."""
    LOST = "lost"
    """The subscription is gone; it waits a moment before it comes back."""
    DRAINING = "draining"
    """Takes no more deliveries; finishes those that run."""
    STOPPED = "stopped"
    """Ended as asked."""
    FAILED = "failed"
    """Ended because it can never subscribe; the worker's ``run`` raises why."""


TRANSITIONS: Final[dict[ConsumerState, frozenset[ConsumerState]]] = {
    ConsumerState.REGISTERED: frozenset({ConsumerState.CONNECTING, ConsumerState.DRAINING}),
    ConsumerState.CONNECTING: frozenset(
        {
            ConsumerState.SUBSCRIBED,
            ConsumerState.LOST,
            ConsumerState.DRAINING,
            ConsumerState.FAILED,
        },
    ),
    ConsumerState.SUBSCRIBED: frozenset({ConsumerState.LOST, ConsumerState.DRAINING}),
    ConsumerState.LOST: frozenset({ConsumerState.CONNECTING, ConsumerState.DRAINING}),
    ConsumerState.DRAINING: frozenset({ConsumerState.STOPPED}),
    ConsumerState.STOPPED: frozenset(),
    ConsumerState.FAILED: frozenset({ConsumerState.DRAINING}),
}


def change(old: ConsumerState, new: ConsumerState) -> ConsumerState:
    """Return the new state.

    Raises:
        RuntimeError: The table does not allow it: a bug of the library.
    """
    if new not in TRANSITIONS[old]:
        raise RuntimeError(f"a consumer cannot go from {old.value} to {new.value}.")
    return new
