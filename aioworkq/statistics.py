"""What producers, workers and their consumers tell of themselves: one moment, as plain values."""

from __future__ import annotations

from msgspec import Struct

from aioworkq.lifecycle import ConsumerState


class ProducerStatistics(Struct, frozen=True):
    """A producer at one moment; the numbers count from its start.

    Attributes:
        is_connected: Whether the connection is usable, as far as this side can know.
        is_blocked: Whether RabbitMQ blocks publishers (memory or disk alarm).
        pending: Messages whose outcome is not known yet.
        in_flight: Those of them that were sent.
        confirmed: Messages that RabbitMQ took responsibility for.
        unroutable: Messages returned because no queue took them.
        not_confirmed: Messages that RabbitMQ refused.
        unknown: Messages that got no answer in time.
        resent: Messages sent again because a connection was lost before their confirm.
        reconnects: How often the connection came back.
        last_error: Why it was last lost or not made; empty if it never was.
    """

    is_connected: bool
    is_blocked: bool
    pending: int
    in_flight: int
    confirmed: int
    unroutable: int
    not_confirmed: int
    unknown: int
    resent: int
    reconnects: int
    last_error: str


class ConsumerStatistics(Struct, frozen=True):
    """One consumer at one moment; the numbers count from the worker's start.

    A batch handler counts once for each message of its batch.

    Attributes:
        queue: The queue's name.
        state: See `aioworkq.lifecycle`.
        in_flight: Handlers that run now.
        waiting: Deliveries that are here and not started.
        handled: Handlers that returned and whose message is done.
        failed: Handlers that raised, or exceeded their time limit.
        requeued: Messages given back to the queue.
        retried: Messages that wait in the broker for another attempt.
        dead_lettered: Messages put into the dead-letter queue.
        duplicates: Redeliveries acked without a second run, because the first run had succeeded.
        stale_settles: Outcomes that came too late, because the channel was lost.
        is_slowed: Whether one runs at a time, because nearly everything fails.
        losses: How often the subscription was lost.
        last_error: Why it was last lost or refused; empty if it never was.
    """

    queue: str
    state: ConsumerState
    in_flight: int
    waiting: int
    handled: int
    failed: int
    requeued: int
    retried: int
    dead_lettered: int
    duplicates: int
    stale_settles: int
    is_slowed: bool
    losses: int
    last_error: str

    @property
    def is_subscribed(self) -> bool:
        """Whether RabbitMQ delivers to it, as far as this side can know."""
        return self.state is ConsumerState.SUBSCRIBED


class WorkerStatistics(Struct, frozen=True):
    """A worker at one moment.

    Attributes:
        is_ready: Whether every consumer is subscribed.
        is_connected: Whether the consuming connection is usable, as far as this side can know.
        reconnects: How often it came back.
        consumers: Each consumer's statistics, by the name of its queue.
    """

    is_ready: bool
    is_connected: bool
    reconnects: int
    consumers: dict[str, ConsumerStatistics]

    @property
    def in_flight(self) -> int:
        """Handlers that run now."""
        return sum(one.in_flight for one in self.consumers.values())

    @property
    def waiting(self) -> int:
        """Deliveries that are here and not started."""
        return sum(one.waiting for one in self.consumers.values())

    @property
    def handled(self) -> int:
        """Handlers that returned."""
        return sum(one.handled for one in self.consumers.values())

    @property
    def failed(self) -> int:
        """Handlers that raised, or exceeded their time limit."""
        return sum(one.failed for one in self.consumers.values())

    @property
    def requeued(self) -> int:
        """Messages given back to their queue."""
        return sum(one.requeued for one in self.consumers.values())

    @property
    def retried(self) -> int:
        """Messages that wait in the broker for another attempt."""
        return sum(one.retried for one in self.consumers.values())

    @property
    def dead_lettered(self) -> int:
        """Messages put into a dead-letter queue."""
        return sum(one.dead_lettered for one in self.consumers.values())

    @property
    def duplicates(self) -> int:
        """Redeliveries acked without a second run."""
        return sum(one.duplicates for one in self.consumers.values())

    @property
    def stale_settles(self) -> int:
        """Outcomes that came too late, because the channel was lost."""
        return sum(one.stale_settles for one in self.consumers.values())
