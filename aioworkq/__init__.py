"""An asyncio work queue over RabbitMQ.

`Producer` publishes, `Worker` runs handlers, `Queue` is the contract that both share. What each
promises is in their docstrings, and in ``docs/explanation/guarantees.md`` with the tests that show
it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from aioworkq.batch import PublishReport
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
    from aioworkq.dead_letters import DeadLetterGroup, DeadLetters, DeadMessage
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


_SELDOM_USED: Final = {
    "DeadLetterGroup": "aioworkq.dead_letters",
    "DeadLetters": "aioworkq.dead_letters",
    "DeadMessage": "aioworkq.dead_letters",
    "MemoryBroker": "aioworkq.memory",
}


def __getattr__(name: str) -> Any:
    """Import what is for operators and tests when it is asked for."""
    if name in _SELDOM_USED:
        return getattr(import_module(_SELDOM_USED[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Name these, too."""
    return sorted({*globals(), *__all__})
