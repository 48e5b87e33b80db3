"""What all asv suites share: how long a row is timed, and a setup that runs once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any


class Suite:
    """The base of all suites.

    asv starts a process for each row and each of its rounds, and there calls `setup` again before every
    sample; what it makes lasts for all of them. A row whose names the installed version of nbattn lacks is
    left out, so that old commits run too.
    """

    timeout = 300
    rounds = 2
    warmup_time = 0.05
    repeat = (3, 50, 0.25)
    """Samples of each round: the fewest, the most, and the seconds after which no further one is taken."""

    def __init_subclass__(cls) -> None:
        if setup := cls.__dict__.get("setup"):
            cls.setup = _once(setup)  # type: ignore[attr-defined]


def _once(setup: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(setup)
    def ready(self: Any, *params: Any) -> None:
        if self.__dict__.get("_ready") == params:
            return
        try:
            setup(self, *params)
        except (AttributeError, ImportError, NameError, TypeError) as error:
            if not _is_lacking(error):
                raise
            raise NotImplementedError(str(error)) from error
        self._ready = params

    return ready


def _is_lacking(error: Exception) -> bool:
    """Whether the error tells that a name, a module or an option is not there."""
    if isinstance(error, AttributeError):
        owner = error.obj if isinstance(error.obj, type | ModuleType) else type(error.obj)
        return getattr(owner, "__module__", owner.__name__).partition(".")[0] == "nbattn"
    return not isinstance(error, TypeError) or "unexpected keyword argument" in str(error)
