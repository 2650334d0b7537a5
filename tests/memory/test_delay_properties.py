"""The delay queues on the model: the times of the queues passed add up to the delay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import example, given, settings
from hypothesis import strategies as st

from aioworkq import Message
from aioworkq.broker import Confirm
from aioworkq.delay import MAX_DELAY, destination_binding, level_declarations, route, units
from aioworkq.memory.clock import Clock
from aioworkq.memory.node import Node
from aioworkq.memory.version import SEMANTICS
from aioworkq.topology import QueueDeclaration

if TYPE_CHECKING:
    from aioworkq.memory.version import Version

NAMES = st.sampled_from(["q", "eu.orders", "orders", "with #.*", "x" * 250])


@given(
    delay=st.floats(min_value=0.001, max_value=MAX_DELAY),
    name=NAMES,
    version=st.sampled_from(sorted(SEMANTICS)),
)
@example(delay=MAX_DELAY, name="q", version="3.10")
@example(delay=0.125, name="eu.orders", version="4.3")
@settings(max_examples=50, deadline=None)
def test_the_queues_passed_add_up_to_the_delay(delay: float, name: str, version: Version) -> None:
    """A message waits in the queues of its bits, each once, as long as they say, and arrives."""
    clock = Clock(is_virtual=True)
    node = Node(SEMANTICS[version], clock)
    way = route(name, delay)
    for declaration in level_declarations(way.level):
        node.declare(declaration)
    for queue in (name, "orders", "other"):
        node.declare(QueueDeclaration(queue, {}))
        node.declare(destination_binding(queue))
    message = Message(b"x", name, exchange=way.exchange, routing_key=way.routing_key)
    began = clock.time()
    assert node.publish(message).confirm is Confirm.ACK
    while clock.step(began + 2 * MAX_DELAY) and not len(node.queues[name]):
        pass
    waited = clock.time() - began
    assert abs(waited - units(delay) / 8) < 0.001
    assert delay - 0.001 <= waited <= delay * 17 / 16 + 0.125
    stored = node.queues[name].take_one()
    assert stored is not None
    levels = [int(death["queue"].rpartition(".")[2]) for death in reversed(stored.deaths)]
    assert levels == sorted(set(levels), reverse=True)
    assert sum(2**level for level in levels) == units(delay)
    assert len(levels) == way.hops
    assert [queue.name for queue in node.queues.values() if len(queue)] == []
