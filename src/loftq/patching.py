"""Patches of transformers and PEFT: our function is called instead of theirs, and gets theirs as first argument."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def patches(owner: Any, name: str) -> Callable[[F], F]:
    """Decorate what replaces ``owner.name``: a function of a module, or a method of a class.

    It is called with the function that it replaces, then with the arguments of the call: self or cls included.
    """
    held: Any = inspect.getattr_static(owner, name)
    kind = type(held) if isinstance(held, (classmethod, staticmethod)) else None
    theirs: Any = held if kind is None else held.__func__

    def decorate(ours: F) -> F:
        @functools.wraps(theirs)
        def call(*args: Any, **kwargs: Any) -> Any:
            return ours(theirs, *args, **kwargs)

        setattr(owner, name, call if kind is None else kind(call))
        return ours

    return decorate


@contextlib.contextmanager
def inside(flag: ContextVar[bool]) -> Iterator[None]:
    """Context in which ``flag`` is set, for patches that are called within one of another."""
    token = flag.set(True)
    try:
        yield
    finally:
        flag.reset(token)
