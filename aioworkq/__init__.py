"""An asyncio work queue over RabbitMQ.

`Producer` publishes, `Worker` runs handlers, `Queue` is the contract that both share. What each
promises is in their docstrings, and in ``docs/explanation/guarantees.md`` with the tests that show
it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from aioworkq.batch import PublishReport
from aioworkq.dead_letters import DeadLetterGroup, DeadLetters, DeadMessage
from aioworkq.errors import (
    AccessRefusedError,
    BatchError,
    ConnectionLostError,
    DecodeError,
    MessageError,
    NotConfirmedError,
    OutcomeUnknownError,
    PublishError,
    Reject,
    RetryLater,
    StateError,
    TopologyError,
    UnroutableError,
    WorkQueueError,
)
from aioworkq.lifecycle import ConsumerState
from aioworkq.message import Delivery, Message
from aioworkq.outcome import Ack, DeadLetter, Outcome, Requeue, Retry
from aioworkq.producer import Producer
from aioworkq.retry import RetryPolicy
from aioworkq.script import run
from aioworkq.statistics import ConsumerStatistics, ProducerStatistics, WorkerStatistics
from aioworkq.topology import Queue
from aioworkq.worker import Worker

if TYPE_CHECKING:
    from aioworkq.memory import MemoryBroker

__version__ = "0.1.0"

__all__ = [
    "AccessRefusedError",
    "Ack",
    "BatchError",
    "ConnectionLostError",
    "ConsumerState",
    "ConsumerStatistics",
    "DeadLetter",
    "DeadLetterGroup",
    "DeadLetters",
    "DeadMessage",
    "DecodeError",
    "Delivery",
    "MemoryBroker",
    "Message",
    "MessageError",
    "NotConfirmedError",
    "Outcome",
    "OutcomeUnknownError",
    "Producer",
    "ProducerStatistics",
    "PublishError",
    "PublishReport",
    "Queue",
    "Reject",
    "Requeue",
    "Retry",
    "RetryLater",
    "RetryPolicy",
    "StateError",
    "TopologyError",
    "UnroutableError",
    "WorkQueueError",
    "Worker",
    "WorkerStatistics",
    "run",
]


def __getattr__(name: str) -> Any:
    """Import what is for tests when it is asked for."""
    if name == "MemoryBroker":
        return import_module("aioworkq.memory").MemoryBroker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
