"""Faults that were asked for and have not happened yet. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Fault: TypeAlias = Literal["lose confirm", "lose ack", "refuse publish", "refuse declaration"]

_FAULTS: Final[tuple[Fault, ...]] = (
    "lose confirm",
    "lose ack",
    "refuse publish",
    "refuse declaration",
)

_CODES: Final = frozenset({403, 404, 405, 406})


@dataclass(slots=True)
class _Planned:
    fault: Fault
    queue: str | None
    left: int
    code: int


class Faults:
    """What shall fail next, and how often."""

    def __init__(self) -> None:
        self._planned: list[_Planned] = []

    def plan(self, fault: Fault, *, queue: str | None, times: int, code: int) -> None:
        """Note a fault.

        Raises:
            ValueError: There is no such fault, or a number makes no sense.
        """
        if fault not in _FAULTS:
            known = ", ".join(repr(one) for one in _FAULTS)
            raise ValueError(f"there is no fault {fault!r}: what can fail next is {known}.")
        if times < 1:
            raise ValueError(f"times is {times}: it must be at least 1.")
        if code not in _CODES:
            raise ValueError(f"code is {code}: a declaration is refused with 403, 404, 405 or 406.")
        self._planned.append(_Planned(fault, queue, times, code))

    def happens(self, fault: Fault, queue: str) -> int:
        """Return the code of a fault that happens now, to something of this queue; 0 for none."""
        for planned in self._planned:
            if planned.fault == fault and planned.queue in {None, queue}:
                planned.left -= 1
                if not planned.left:
                    self._planned.remove(planned)
                return planned.code
        return 0
