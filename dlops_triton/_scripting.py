"""torch.jit.script of what the library has: a clear message, not a compile error deep in here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


def refused(name: str) -> Callable[..., NoReturn]:
    """A ``__prepare_scriptable__``, which torch.jit.script calls first of what it meets."""

    def prepare(*_: Any) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.script does not take {name}: use torch.compile, or torch.export to save a "
            f"model. A scripted model can call {name} in Python, from a function of yours that is "
            "marked @torch.jit.ignore"
        )

    return prepare
