"""The table of a consumer's states."""

from __future__ import annotations

import pytest

from aioworkq.lifecycle import TRANSITIONS, ConsumerState, change


def test_every_state_has_its_row() -> None:
    """A new state must be given its transitions."""
    assert set(TRANSITIONS) == set(ConsumerState)


def test_no_state_is_a_trap() -> None:
    """From every state but the end, being subscribed again or the end can be reached."""
    for state in ConsumerState:
        reachable, frontier = {state}, [state]
        while frontier:
            for following in TRANSITIONS[frontier.pop()]:
                if following not in reachable:
                    reachable.add(following)
                    frontier.append(following)
        assert ConsumerState.STOPPED in reachable


def test_a_change_that_the_table_lacks_is_a_bug() -> None:
    """It is never made in silence."""
    assert change(ConsumerState.LOST, ConsumerState.CONNECTING) is ConsumerState.CONNECTING
    with pytest.raises(RuntimeError, match="from stopped to subscribed"):
        change(ConsumerState.STOPPED, ConsumerState.SUBSCRIBED)
