"""What is started on entry and closed on exit: a private node, a cluster of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType


class Lifetime(ABC):
    """``async with`` for what has a start and an end. What fails to start is closed as well."""

    @abstractmethod
    async def start(self) -> None:
        """Start it."""

    @abstractmethod
    async def aclose(self) -> None:
        """End it, in whatever state it is."""

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()
