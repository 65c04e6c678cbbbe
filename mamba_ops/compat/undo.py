"""Taking a change back."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType


class Undo:
    """Takes a change back when called, the first time; also as a context manager, at its end."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action: Callable[[], None] | None = action

    def __call__(self) -> None:
        action, self._action = self._action, None
        if action is not None:
            action()

    def __enter__(self) -> Undo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self()
