"""Parametrisations and combinators, one file for each idea. Calling the package lists them: `rankloom.methods()`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankloom.systems import MethodFacts


class _Package(ModuleType):
    """The public function `rankloom.methods` and this package share a name: the package answers the call."""

    def __call__(self) -> list[MethodFacts]:
        from rankloom.systems import methods

        return methods()


sys.modules[__name__].__class__ = _Package
