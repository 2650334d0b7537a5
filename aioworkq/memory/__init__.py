"""RabbitMQ in memory, with its own time and with faults on request: for tests."""

from aioworkq.memory.broker import MemoryBroker
from aioworkq.memory.hub import QueueCounts

__all__ = ["MemoryBroker", "QueueCounts"]
