"""`Run`: one delivery on its way through the handler, and all that is noted of it meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import field

from aioworkq.settle import Unsettled

if TYPE_CHECKING:
    from datetime import datetime

    import anyio


class Run(Unsettled, eq=False, kw_only=True):
    """One delivery on its way through the handler.

    Attributes:
        generation: The number of its subscription.
        life: Cancelled when the worker has no more time for it.
        body: What the handler gets, once it is decoded.
        came: Since when it waits for others of its batch; None if it waits no longer.
        needs_recount: Whether the queue could not count one more start of it.
        is_trial: Whether it is run alone.
        is_marked: Whether it is written down that its trial began.
        needs_trial: Whether it must be marked for a trial before its last start.
        scope: Around the handler: its time limit, or the loss of the connection.
        held: Redeliveries of the same message, which wait for the end of this run.
        has_failed: Whether the handler raised an error, or exceeded its time limit.
        succeeded: Whether the handler returned.
        is_done: Whether the message needs no further run.
    """

    generation: int
    life: anyio.CancelScope
    body: Any = None
    came: datetime | None = None
    needs_recount: bool = False
    is_trial: bool = False
    is_marked: bool = False
    needs_trial: bool = False
    scope: anyio.CancelScope | None = None
    held: list[Run] = field(default_factory=list)
    has_failed: bool = False
    succeeded: bool = False
    is_done: bool = False
