"""Frames of one channel, taken where aiormq's connection hands them to the channel.

aiormq puts every frame into ``channel.frames``, a queue that the channel's reader task empties, and
runs each consumer callback as a task that it cancels when the channel dies. The tap stands in that
queue's place: it keeps the frames that are ours (deliveries, returns, confirms), handles them at
once, between two steps of the event loop, and passes all others on. So handlers never run inside a
task of aiormq, and neither a task nor a future is made per message.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, TypeAlias

from pamqp.body import ContentBody
from pamqp.commands import Basic, Channel
from pamqp.header import ContentHeader

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiormq.abc import AbstractChannel

_log = logging.getLogger("aioworkq")

Content: TypeAlias = "Basic.Deliver | Basic.Return"


class FrameTap:
    """Stands in for the ``frames`` queue of one aiormq channel.

    Args:
        channel: The channel, fresh from being opened.
        on_content: Called with each complete delivery or return.
        on_confirm: Called with each ack or nack of the broker; None on a consuming channel.

    Attributes:
        has_close: Whether the broker has closed the channel. aiormq tells of it a few steps of the
            event loop later; what is written in between makes RabbitMQ close the connection.
    """

    def __init__(
        self,
        channel: AbstractChannel,
        *,
        on_content: Callable[[Content, Basic.Properties, bytes], None],
        on_confirm: Callable[[Basic.Ack | Basic.Nack], None] | None = None,
    ) -> None:
        self._frames: asyncio.Queue[Any] = getattr(channel, "frames")  # noqa: B009 - not in the ABC
        if not isinstance(self._frames, asyncio.Queue):  # pragma: no cover - another aiormq
            raise TypeError("this version of aiormq keeps its frames elsewhere: use aiormq 7.2.")
        self._on_content = on_content
        self._on_confirm = on_confirm
        self._method: Content | None = None
        self._properties: Basic.Properties | None = None
        self._parts: list[bytes] = []
        self._missing = 0
        self.has_close = False
        setattr(channel, "frames", self)  # noqa: B010 - not in the ABC

    def __getattr__(self, name: str) -> Any:
        return getattr(self._frames, name)

    async def put(self, item: tuple[int, Any]) -> None:
        """Take one frame from the connection's reader."""
        frame = item[1]
        try:
            if self._take(frame):
                return
        except Exception:  # an error of ours must not end the connection's reader in silence
            _log.exception("aioworkq failed on a frame of RabbitMQ: please report this.")
            raise
        await self._frames.put(item)

    def _take(self, frame: Any) -> bool:
        """Handle a frame that is ours, and say whether it was."""
        if isinstance(frame, ContentBody) and self._method is not None:
            self._parts.append(frame.value or b"")
            self._missing -= len(frame.value or b"")
            if self._missing <= 0:
                self._complete()
            return True
        if isinstance(frame, ContentHeader) and self._method is not None:
            self._properties = frame.properties
            self._missing = frame.body_size or 0
            if not self._missing:
                self._complete()
            return True
        if isinstance(frame, Basic.Deliver | Basic.Return):
            self._method = frame
            return True
        if self._on_confirm is not None and isinstance(frame, Basic.Ack | Basic.Nack):
            self._on_confirm(frame)
            return True
        self.has_close |= isinstance(frame, Channel.Close)
        return False

    def _complete(self) -> None:
        method, properties, parts = self._method, self._properties, self._parts
        self._method = self._properties = None
        self._parts = []
        if method is not None and properties is not None:
            self._on_content(method, properties, parts[0] if len(parts) == 1 else b"".join(parts))
