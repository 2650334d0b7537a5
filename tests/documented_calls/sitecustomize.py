"""Switches the fast paths off in programs that tests start, under ``pytest --documented-calls``.

Python imports this at its start, since the tests then have this folder in ``PYTHONPATH``. It
imports nothing of the library before the program does.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

FEATURES = "aioworkq.amqp.features"


class Switch(MetaPathFinder):
    """Finds the module that knows what aiormq has, and has it miss a name."""

    def find_spec(self, fullname: str, *_: Any) -> ModuleSpec | None:
        if fullname != FEATURES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = Lacking(spec.loader)
        return spec


class Lacking(Loader):
    """Loads the module as it is, and adds a name to those that are needed."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._loader.exec_module(module)
        module.CHANNEL_NAMES = (*module.CHANNEL_NAMES, "no_such_name")


sys.meta_path.insert(0, Switch())
