"""What a refusal of the memory broker means to a caller: the same errors as RabbitMQ's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aioworkq.errors import AccessRefusedError, TopologyError
from aioworkq.topology import Binding, Declaration, QueueDeclaration

if TYPE_CHECKING:
    from aioworkq.memory.node import Refusal

NOT_FOUND: Final = 404
REFUSALS: Final = {
    403: "ACCESS_REFUSED",
    404: "NOT_FOUND",
    405: "RESOURCE_LOCKED",
    406: "PRECONDITION_FAILED",
}
_ADVICE: Final = {
    403: "Give the user the permission that is missing (rabbitmqctl set_permissions).",
    404: "Declare it, or leave declare=True on the Queue.",
    405: "Another connection holds it exclusively: end that one, or use another queue.",
}


class OtherLoopError(AccessRefusedError):
    """A memory broker serves one event loop at a time, and this is another one."""

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}. Close them first, or make a MemoryBroker for each."


def name_of(declaration: Declaration) -> str:
    """Return what a declaration is about."""
    return declaration.destination if isinstance(declaration, Binding) else declaration.name


def if_missing(declaration: Declaration) -> str:
    """Return what is to be done when a queue is missing; empty for what is no queue."""
    return declaration.if_missing if isinstance(declaration, QueueDeclaration) else ""


def topology_error(what: Declaration | str, refusal: Refusal) -> TopologyError:
    """Return the error of a refused declaration, or of a refused use of a queue."""
    if isinstance(what, str):
        name, asked = what, None
    else:
        name = name_of(what)
        asked = None if isinstance(what, Binding) else what.arguments
    field = refusal.field
    if not field:
        return TopologyError(
            name,
            reason=refusal.text,
            code=refusal.code,
            advice=_ADVICE.get(refusal.code, ""),
        )
    return TopologyError(
        name,
        reason=refusal.text,
        expected={field: asked.get(field) if asked else None},
        actual={field: refusal.theirs},
        code=refusal.code,
        advice=(
            f"Give the Queue the broker's {field}, or delete the queue and let it be declared "
            "again, or pass declare=False to use it as it is."
        ),
    )
