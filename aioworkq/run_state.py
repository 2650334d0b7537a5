"""`Run`: one delivery on its way through the handler, and all that is noted of it meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio

from aioworkq.settle import Unsettled

if TYPE_CHECKING:
    from datetime import datetime

    from aioworkq.broker import Subscription
    from aioworkq.message import Delivery


class Run(Unsettled):
    """One delivery on its way through the handler."""

    __slots__ = (
        "body",
        "came",
        "generation",
        "has_failed",
        "held",
        "is_done",
        "is_marked",
        "is_trial",
        "life",
        "needs_recount",
        "needs_trial",
        "scope",
        "succeeded",
    )

    def __init__(
        self,
        delivery: Delivery,
        subscription: Subscription,
        tag: int,
        used: int,
        *,
        generation: int,
    ) -> None:
        super().__init__(delivery, subscription, tag, used)
        self.generation = generation
        """The number of its subscription."""
        self.body: Any = None
        """What the handler gets, once it is decoded."""
        self.came: datetime | None = None
        """Since when it waits for others of its batch; None if it waits no longer."""
        self.needs_recount = False
        """Whether the queue could not count one more start of it."""
        self.is_trial = False
        """Whether it is run alone."""
        self.is_marked = False
        """Whether it is written down that its trial began."""
        self.needs_trial = False
        """Whether it must be marked for a trial before its last start."""
        self.life = anyio.CancelScope()
        """Cancelled when the worker has no more time for it."""
        self.scope: anyio.CancelScope | None = None
        """Around the handler: its time limit, or the loss of the connection."""
        self.held: list[Run] = []
        """Redeliveries of the same message, which wait for the end of this run."""
        self.has_failed = False
        """Whether the handler raised an error, or exceeded its time limit."""
        self.succeeded = False
        """Whether the handler returned."""
        self.is_done = False
        """Whether the message needs no further run."""
