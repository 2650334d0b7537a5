"""The line between one client and the broker: what is under way, and what is lost with it."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from aioworkq.errors import ConnectionLostError
from aioworkq.memory.node import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioworkq.memory.hub import Hub

T = TypeVar("T")


class Line:
    """The calls between one client and the broker, in order.

    Args:
        broker: The broker.
    """

    def __init__(self, broker: Hub) -> None:
        self.broker = broker
        self.epoch = 0
        """Changes when the connection drops: what was under way belongs to an earlier one."""
        self.has_published = False
        self.held: list[Callable[[], None]] = []
        """What the broker does not read while an alarm blocks this connection."""
        self._calls: set[asyncio.Future[Any]] = set()
        self._is_connected = False
        self._last_error = ""

    @property
    def is_blocked(self) -> bool:
        """Whether an alarm keeps the broker from reading what this connection publishes."""
        return self._is_connected and self.has_published and self.broker.has_alarm

    def cut(self, reason: str) -> None:
        """Lose everything that is under way."""
        self.epoch += 1
        self._is_connected = False
        self._last_error = reason
        self.has_published = False
        self.held.clear()
        for call in self._calls:
            if not call.done():
                call.set_exception(ConnectionLostError("", reason=reason))

    def post(self, serve: Callable[[], None]) -> None:
        """Have the broker do something, after all that was asked before.

        It never happens if the connection drops meanwhile.
        """
        self.broker.post(partial(self._serve, self.epoch, serve))

    def _serve(self, epoch: int, serve: Callable[[], None]) -> None:
        if epoch != self.epoch:
            return
        if self.is_blocked or self.held:
            self.held.append(serve)
        else:
            serve()

    def unblock(self) -> None:
        """Have the broker read what it did not: the alarm is over."""
        held, self.held = self.held, []
        for serve in held:
            self.post(serve)

    def answer(self, tell: Callable[[], None]) -> None:
        """Tell the client something, unless the connection drops meanwhile."""
        epoch = self.epoch

        def deliver() -> None:
            if epoch == self.epoch:
                tell()

        self.broker.post(deliver)

    async def call(self, what: str, serve: Callable[[], T], *, timeout: float) -> T:
        """Have the broker do something, and wait for the answer.

        Raises:
            Refusal: The broker refuses.
            ConnectionLostError: The connection drops, or no answer comes within ``timeout``.
        """
        if not self._is_connected:
            raise ConnectionLostError(what, reason=self._last_error)
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def do() -> None:
            if answer.done():
                return
            try:
                result = serve()
            except Refusal as refusal:
                answer.set_exception(refusal)
            else:
                answer.set_result(result)

        self._calls.add(answer)
        self.post(do)
        try:
            await asyncio.wait({answer}, timeout=timeout)
            if not answer.done():
                reason = f"RabbitMQ did not answer within {timeout:g} s"
                raise ConnectionLostError(what, reason=reason)
            try:
                return answer.result()
            except ConnectionLostError as exc:
                raise ConnectionLostError(what, reason=exc.reason) from None
        finally:
            self._calls.discard(answer)
            if not answer.cancel() and not answer.cancelled():
                answer.exception()
