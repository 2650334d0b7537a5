"""What differs between the versions of RabbitMQ that we run on: one table, and how to read it.

A test asks a real broker for each cell, whichever version the tests run with. What is read off
messages instead of the version (`message.returns`) needs no row here.
"""

from __future__ import annotations

import re
from typing import Final, Literal

from msgspec import Struct


class Semantics(Struct, frozen=True, kw_only=True):
    """How one line of RabbitMQ behaves, where lines differ.

    Attributes:
        counts_nack: Whether a quorum queue counts ``basic.nack`` with requeue in
            ``x-delivery-count``.
        counts_reject: The same for ``basic.reject`` with requeue.
        counts_lost_channel: The same for every delivery that was not settled when its channel or
            connection ended.
        has_zero_count: Whether the first delivery of a quorum queue has an ``x-delivery-count``.
        has_acquired_count: Whether ``x-acquired-count`` tells of every delivery that came back.
        delivery_limit: After how many counted returns a quorum queue that was declared without a
            limit drops or dead-letters a message; None for never.
        priorities: What a quorum queue makes of priorities: nothing, a share of two in three for
            those above 4, or a strict order.
        timeout_of_quorum: What ends when a delivery of a quorum queue is not settled within the
            ``consumer_timeout``: the whole channel, or its consumer only.
        timeout_of_classic: The same for a classic queue; None if nothing does.
        keeps_refusing: Whether a quorum queue of a cluster that had no leader when a channel first
            published to it may refuse everything on that channel for good. This needs a cluster:
            ``tests/faults/test_cluster.py`` asks it.
        has_last_death: Whether a dead-lettered message tells its last death beside its first one,
            in ``x-last-death-*``.
        believes_x_death: Whether an ``x-death`` header that a client publishes takes part in the
            search for dead-letter cycles, which drops messages.
    """

    counts_nack: bool
    counts_reject: bool
    counts_lost_channel: bool
    has_zero_count: bool
    has_acquired_count: bool
    delivery_limit: int | None
    priorities: Literal["none", "shares", "strict"]
    timeout_of_quorum: Literal["channel", "consumer"]
    timeout_of_classic: Literal["channel"] | None
    keeps_refusing: bool
    has_last_death: bool
    believes_x_death: bool


TABLE: Final[dict[tuple[int, int], Semantics]] = {
    (3, 10): Semantics(
        counts_nack=True,
        counts_reject=True,
        counts_lost_channel=True,
        has_zero_count=True,
        has_acquired_count=False,
        delivery_limit=None,
        priorities="none",
        timeout_of_quorum="channel",
        timeout_of_classic="channel",
        keeps_refusing=True,
        has_last_death=False,
        believes_x_death=True,
    ),
    (4, 0): Semantics(
        counts_nack=True,
        counts_reject=True,
        counts_lost_channel=True,
        has_zero_count=False,
        has_acquired_count=False,
        delivery_limit=20,
        priorities="shares",
        timeout_of_quorum="channel",
        timeout_of_classic="channel",
        keeps_refusing=False,
        has_last_death=True,
        believes_x_death=False,
    ),
    (4, 3): Semantics(
        counts_nack=False,
        counts_reject=True,
        counts_lost_channel=True,
        has_zero_count=False,
        has_acquired_count=True,
        delivery_limit=20,
        priorities="strict",
        timeout_of_quorum="consumer",
        timeout_of_classic=None,
        keeps_refusing=False,
        has_last_death=True,
        believes_x_death=False,
    ),
}
"""The lines by the first version of each, oldest first."""


def semantics_of(version: str) -> Semantics:
    """Return how a version of RabbitMQ behaves.

    Args:
        version: As the broker tells it: ``4.0.5``. Of one that cannot be read the oldest line is
            assumed: there every return counts, so none is made that must not.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    own = (int(found[1]), int(found[2])) if found else (0, 0)
    lines = [line for line in TABLE if line <= own]
    return TABLE[max(lines, default=min(TABLE))]
