"""Progress bars, by what the workflows call."""

from typing import Any


class Bar:
    """A progress bar with matrices, time left, and the relative error so far. A budget has one before, of measuring."""

    def __init__(self) -> None:
        self.began = False
        self._bar: Any = None
        self._error = self._norm = 0.0

    def begin(self, total: int, done: int) -> Any:
        from tqdm.auto import tqdm

        self.began = True
        self._bar = tqdm(total=total, initial=done, unit="matrix", desc="LoftQ", dynamic_ncols=True)
        return self._advance

    def _advance(self, report: dict[str, Any]) -> None:
        from loftq.report.inspect import judged

        if "errors" in report:
            error, _, norm = judged(report)
            self._error += (error * norm) ** 2
            self._norm += norm**2
        else:
            self._bar.set_postfix_str("measuring for the budget", refresh=False)
        if self._norm:
            self._bar.set_postfix_str(f"error {(self._error / self._norm) ** 0.5:.4f}", refresh=False)
        self._bar.update()
        if self._bar.n >= self._bar.total:  # what follows may have a bar of its own
            self._bar.close()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


class RunBar:
    """A progress bar over the runs of a comparison, with the last one's result."""

    def __init__(self) -> None:
        self._bar: Any = None

    def begin(self, total: int) -> Any:
        from tqdm.auto import tqdm

        self._bar = tqdm(total=total, unit="run", desc="compare", dynamic_ncols=True)
        return self._advance

    def _advance(self, row: dict[str, Any]) -> None:
        metric = row["metric"]
        result = "N.A." if row["failed"] else f"{metric} {row['metrics'][metric]:.4g}"
        self._bar.set_postfix_str(
            f"{row['settings']['method']} {row['settings']['bits']} bits: {result}", refresh=False
        )
        self._bar.update()

    def __enter__(self) -> "RunBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


class StepBar:
    """A progress bar over the steps of a calibration: blocks times batches."""

    def __init__(self) -> None:
        self.began = False
        self._bar: Any = None

    def begin(self, total: int) -> Any:
        from tqdm.auto import tqdm

        self.began = True
        self._bar = tqdm(total=total, unit="step", desc="calibrate", dynamic_ncols=True)
        return self._advance

    def _advance(self) -> None:
        self._bar.update()
        if self._bar.n >= self._bar.total:  # what follows may have a bar of its own
            self._bar.close()

    def __enter__(self) -> "StepBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
