"""Statistics as a health check would show them."""

from __future__ import annotations

import msgspec

from aioworkq import ConsumerState, MemoryBroker, Worker


async def test_statistics_are_ready_to_be_encoded() -> None:
    """What is inside of them, too."""
    worker = Worker(MemoryBroker())

    @worker.handler("orders")
    async def handle(body: object) -> None:
        pass

    async with worker:
        answer = msgspec.json.decode(msgspec.json.encode(worker.statistics()))
    assert answer["is_ready"] is True
    assert answer["consumers"]["orders"]["state"] == ConsumerState.SUBSCRIBED.value
    assert answer["consumers"]["orders"]["handled"] == 0
