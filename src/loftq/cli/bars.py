"""Progress bars, by what the workflows call."""

import sys
from typing import Any


class _Bar:
    """One line on the screen, from ``_open`` to the end of the ``with``, or of its total if others may follow."""

    def __init__(self) -> None:
        self._bar: Any = None

    @property
    def began(self) -> bool:
        return self._bar is not None

    def _open(self, total: int, unit: str, what: str, done: int = 0) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(total=total, initial=done, unit=unit, desc=what, dynamic_ncols=True)

    def _step(self, told: str = "") -> None:
        if told:
            self._bar.set_postfix_str(told, refresh=False)
        self._bar.update()
        if self._bar.n >= self._bar.total:  # what follows may have a bar of its own
            self._bar.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


class Bar(_Bar):
    """Matrices, time left, and the relative error so far. A budget has one before, of measuring."""

    def __init__(self) -> None:
        super().__init__()
        self._error = self._norm = 0.0

    def begin(self, total: int, done: int) -> Any:
        if done:
            print(f"LoftQ: {done} of {total} matrices are kept from an earlier run", file=sys.stderr)
        self._open(total, "matrix", "LoftQ", done)
        return self._advance

    def _advance(self, report: dict[str, Any]) -> None:
        from loftq.report.inspect import judged

        if "errors" not in report:
            return self._step("measuring for the budget")
        error, _, norm = judged(report)
        self._error += (error * norm) ** 2
        self._norm += norm**2
        self._step(f"error {(self._error / self._norm) ** 0.5:.4f}" if self._norm else "")


class RunBar(_Bar):
    """The runs of a comparison, with the last one's result."""

    def begin(self, total: int) -> Any:
        self._open(total, "run", "compare")
        return self._advance

    def _advance(self, row: dict[str, Any] | None, total: int) -> None:
        self._bar.total = total
        if row is None:
            return self._bar.set_postfix_str("waiting for runs of other processes")
        metric = row["metric"]
        result = "N.A." if row["failed"] else f"{metric} {row['metrics'][metric]:.4g}"
        self._step(f"{row['settings']['method']} {row['settings']['bits']} bits: {result}")


class StepBar(_Bar):
    """Steps of equal worth; of a calibration, blocks times batches."""

    def __init__(self, what: str = "calibrate", unit: str = "step") -> None:
        super().__init__()
        self._what, self._unit = what, unit

    def begin(self, total: int) -> Any:
        self._open(total, self._unit, self._what)
        return self._step
