"""What differs between the versions of RabbitMQ that the memory broker can be, as a table.

Sources: ``rabbit_fifo.erl`` and ``rabbit_fifo_client.erl`` at the tags 3.10.8, 4.0.9 and 4.3.5, and
the release notes of 4.0 and 4.3. What the conformance suite has seen on a node goes before both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Version: TypeAlias = Literal["3.10", "4.0", "4.3"]


@dataclass(frozen=True, slots=True)
class Semantics:
    """One version's rules.

    Attributes:
        version: Its number.
        delivery_limit: Of a quorum queue that names none; None for no limit.
        counts_nacks: Whether a nack with requeue counts as a failed delivery.
        tells_zero: Whether ``x-delivery-count`` is on a first delivery too.
        tells_acquired: Whether a quorum queue adds ``x-acquired-count``.
        trusts_deaths: Whether the ``x-death`` of a published message is believed.
        tells_last_death: Whether ``x-last-death-*`` are added beside ``x-first-death-*``.
        quorum_priorities: How a quorum queue treats priorities: not at all, as two classes of
            which the higher one gets two turns of three, or as 32 strict levels.
    """

    version: Version
    delivery_limit: int | None
    counts_nacks: bool
    tells_zero: bool
    tells_acquired: bool
    trusts_deaths: bool
    tells_last_death: bool
    quorum_priorities: Literal["none", "two", "strict"]


SEMANTICS: Final[dict[str, Semantics]] = {
    "3.10": Semantics(
        "3.10",
        delivery_limit=None,
        counts_nacks=True,
        tells_zero=True,
        tells_acquired=False,
        trusts_deaths=True,
        tells_last_death=False,
        quorum_priorities="none",
    ),
    "4.0": Semantics(
        "4.0",
        delivery_limit=20,
        counts_nacks=True,
        tells_zero=False,
        tells_acquired=False,
        trusts_deaths=False,
        tells_last_death=True,
        quorum_priorities="two",
    ),
    "4.3": Semantics(
        "4.3",
        delivery_limit=20,
        counts_nacks=False,
        tells_zero=False,
        tells_acquired=True,
        trusts_deaths=False,
        tells_last_death=True,
        quorum_priorities="strict",
    ),
}


def semantics_of(version: str) -> Semantics:
    """Return a version's rules.

    Raises:
        ValueError: There are none for it.
    """
    found = SEMANTICS.get(version)
    if found is None:
        known = ", ".join(repr(one) for one in SEMANTICS)
        raise ValueError(f"version is {version!r}: the memory broker can be {known}.")
    return found
