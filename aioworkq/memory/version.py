"""The versions of RabbitMQ that the memory broker can be.

What differs is in `aioworkq.versions`. Its sources: ``rabbit_fifo.erl`` and
``rabbit_fifo_client.erl`` at the tags 3.10.8, 4.0.9 and 4.3.5, and the release notes of 4.0 and
4.3.
What the tests have seen on a node goes before both.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

from aioworkq.versions import TABLE, Semantics

Version: TypeAlias = Literal["3.10", "4.0", "4.3"]

SEMANTICS: Final[dict[Version, Semantics]] = {
    "3.10": TABLE[3, 10],
    "4.0": TABLE[4, 0],
    "4.3": TABLE[4, 3],
}


def semantics_of(version: Version) -> Semantics:
    """Return a version's rules.

    Raises:
        ValueError: There are none for it.
    """
    found = SEMANTICS.get(version)
    if found is None:
        known = ", ".join(repr(one) for one in SEMANTICS)
        raise ValueError(f"version is {version!r}: the memory broker can be {known}.")
    return found
