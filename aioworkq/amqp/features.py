"""What the fast paths use of aiormq beyond its documentation, and whether it is there.

Where a name is missing, ``documented.py`` takes the place of the fast paths. Nothing else in this
package may use such a name.
"""

from __future__ import annotations

import functools
import logging
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from aiormq.abc import AbstractChannel

_log = logging.getLogger("aioworkq")

CHANNEL_NAMES: Final = ("consumers", "rpc")
"""Attributes of a channel: its consumers by tag, and what sends a frame and takes the answer."""


def missing_names(channel: AbstractChannel) -> list[str]:
    """Return those of the names that this version of aiormq lacks."""
    return [name for name in CHANNEL_NAMES if not hasattr(channel, name)]


@functools.cache
def explain(*missing: str) -> None:
    """Log what follows from it: a WARNING for these names, the first time in this process."""
    _log.warning(
        "aiormq %s has no Channel.%s: aioworkq uses documented calls only. It does the same, but "
        "takes several times the CPU for a message. Install a version of aiormq that aioworkq was "
        "made for, or a newer aioworkq.",
        version("aiormq"),
        ", Channel.".join(missing),
    )
