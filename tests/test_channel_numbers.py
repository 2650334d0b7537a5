"""Which number the next channel gets."""

from __future__ import annotations

from aioworkq.amqp.channel_numbers import ChannelNumbers


def test_a_number_is_used_again_as_late_as_possible() -> None:
    """A channel's number may be free here before RabbitMQ knows."""
    numbers = ChannelNumbers()
    assert [numbers.take((), 5) for _ in range(7)] == [1, 2, 3, 4, 5, 1, 2]


def test_numbers_in_use_are_left_out() -> None:
    """Also those of channels that live on while the numbers go round."""
    numbers = ChannelNumbers()
    used = {2, 3, 5}
    assert [numbers.take(used, 5) for _ in range(4)] == [1, 4, 1, 4]


def test_when_all_are_in_use_there_is_none() -> None:
    """Then the caller says so; later there may be one."""
    numbers = ChannelNumbers()
    assert numbers.take(range(1, 6), 5) is None
    assert numbers.take({1}, 5) == 2


def test_without_a_limit_there_are_as_many_as_amqp_knows() -> None:
    """A channel's number is one of 16 bits, and 0 is the connection's."""
    assert ChannelNumbers().take(range(1, 65_535), 0) == 65_535
