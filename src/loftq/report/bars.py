"""Progress bars, by what they show: matrices, runs of a comparison, steps of a calibration."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

from loftq.spelled import spell_error

_shown: ContextVar[bool] = ContextVar("shown", default=True)


@contextmanager
def showing(progress: bool) -> Iterator[None]:
    """Whether the bars of all that is done inside are shown: those of a run are opened far below its call."""
    token = _shown.set(progress)
    try:
        yield
    finally:
        _shown.reset(token)


def are_shown() -> bool:
    return _shown.get()


class Bar(AbstractContextManager["Bar"]):
    """One line on the screen, from :meth:`begin` to the end of the ``with``, or of its total if others may follow.

    Args:
        delay: seconds after which it is shown at all.

    Attributes:
        began: whether there was anything to do.
    """

    def __init__(self, what: str = "LoftQ", unit: str = "matrix", *, shown: bool = True, delay: float = 0.0) -> None:
        self._what, self._unit, self._shown, self._delay = what, unit, shown, delay
        self._bar: Any = None

    @property
    def began(self) -> bool:
        return self._bar is not None

    def begin(self, total: int | None, done: int = 0) -> Any:
        """Open the line; what is called after every step, with a report on it or without."""
        from tqdm.auto import tqdm

        self._bar = tqdm(
            total=total,
            initial=done,
            unit=self._unit,
            desc=self._what,
            dynamic_ncols=True,
            disable=not self._shown,
            delay=self._delay,
        )
        return self.advance

    def advance(self, told: str = "", *_: Any) -> None:
        """One step more, with ``told`` shown beside it."""
        if told:
            self._bar.set_postfix_str(told, refresh=False)
        self._bar.update()
        if self._bar.total and self._bar.n >= self._bar.total:  # what follows may have a bar of its own
            self._bar.close()

    def __exit__(self, kind: object, *_: object) -> None:
        if self._bar is not None:
            if kind is None and self._bar.total:  # what is left was not needed, as a calibration behind the last matrix
                self._bar.update(self._bar.total - self._bar.n)
            self._bar.close()


class MatrixBar(Bar):
    """Matrices, time left, and the relative error so far. A budget has one before, of measuring."""

    _error = _norm = 0.0

    def begin(self, total: int | None, done: int = 0) -> Any:
        if done and self._shown:
            print(f"LoftQ: {done} of {total} matrices are kept from an earlier run", file=sys.stderr)
        return super().begin(total, done)

    def advance(self, report: Any, *_: Any) -> None:  # type: ignore[override]
        from loftq.report.inspect import judged

        if "errors" not in report:  # or another process has made it
            return super().advance("measuring for the budget" if "measured" in report else "")
        error, _alone, norm = judged(report)
        self._error += (error * norm) ** 2
        self._norm += norm**2
        return super().advance(f"error {spell_error((self._error / self._norm) ** 0.5)}" if self._norm else "")


class RunBar(Bar):
    """The runs of a comparison, which may become more, with the last one's result."""

    def __init__(self, *, shown: bool = True) -> None:
        super().__init__("compare", "run", shown=shown)

    def advance(self, row: dict[str, Any] | None, total: int) -> None:  # type: ignore[override]
        self._bar.total = total
        if row is None:
            return self._bar.set_postfix_str("waiting for runs of other processes")
        metric, settings = row["metric"], row["settings"]
        result = "N.A." if row["failed"] else f"{metric} {row['metrics'][metric]:.4g}"
        return super().advance(f"{settings['method']} {settings['bits']} bits: {result}")
