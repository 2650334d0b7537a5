"""Numbers for channels, each used again as late as possible.

aiormq frees a channel's number when RabbitMQ has closed the channel, and answers RabbitMQ a moment
later. When another channel is opened with the same number in that moment, RabbitMQ sees a second
Channel.Open, and closes the connection (504 CHANNEL_ERROR). Left to choose, aiormq takes the lowest
number above all others, which is often the one that has just become free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Container

_HIGHEST: Final = 65_535


class ChannelNumbers:
    """Goes round all the numbers that a connection may use."""

    def __init__(self) -> None:
        self._last = 0

    def take(self, used: Container[int], channel_max: int) -> int | None:
        """Return the next number that is free; None if there is none.

        Args:
            used: The numbers in use.
            channel_max: The highest number that was agreed upon with RabbitMQ; 0 for no limit.
        """
        highest = channel_max or _HIGHEST
        for step in range(highest):
            number = (self._last + step) % highest + 1
            if number not in used:
                self._last = number
                return number
        return None
