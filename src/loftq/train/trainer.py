"""The trainer of transformers with what every run of ours wants: a bar of one line, and an end to a lost run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback

from loftq.errors import NumericalError, UsageError, listed, quoted


class LoftQTrainer(Seq2SeqTrainer):
    """``Seq2SeqTrainer``, for tasks that generate nothing the same as ``Trainer``; a lost run stops at once."""

    def __init__(self, *args: Any, counts_tokens: bool, **kwargs: Any) -> None:
        """``counts_tokens``: the model's loss is a mean over the tokens of all micro-batches and processes.

        Otherwise it is a mean over a micro-batch. transformers 5 takes every model for one of the first kind whose
        forward has ``**kwargs``, BERT's and BART's too, and then multiplies their loss by the number of processes and
        of accumulated micro-batches.
        """
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs and counts_tokens
        self.remove_callback(PrinterCallback)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train. Whatever stops it, no bar and no open log stays behind."""
        try:
            return super().train(*args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, (Bar, TensorBoardCallback)):
                    callback.on_train_end(self.args, self.state, self.control)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer. UsageError if a package is missing for it, or one of its options."""
        with _refusing():
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer. UsageError if one of its options is missing."""
        with _refusing():
            return super().create_scheduler(*args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> Any:
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as e:
            known = listed(name.removeprefix("eval_") for name in metrics)
            raise UsageError(
                f"training.metric_for_best_model: {quoted(repr(self.args.metric_for_best_model))} is none of {known}"
            ) from e

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One batch. Raises: NumericalError, with what to try, if its loss is NaN or infinite."""
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise NumericalError(_what_to_try(loss.item(), self.state.global_step + 1, self.args))
        return loss


@contextmanager
def _refusing() -> Iterator[None]:
    """Errors of transformers over what the recipe's section ``training`` asks for, in one line."""
    try:
        yield
    except (ImportError, ValueError, TypeError) as e:
        raise UsageError(f"training: {' '.join(str(e).split())}") from e


def _what_to_try(loss: float, step: int, arguments: Any) -> str:
    cures = [f"a lower training.learning_rate (it is {arguments.learning_rate:g})"]
    if arguments.fp16:
        cures.append("training.bf16 instead of fp16")
    if not arguments.max_grad_norm or arguments.max_grad_norm > 1:
        cures.append("training.max_grad_norm=1")
    if not arguments.warmup_steps:
        cures.append("training.warmup_steps=0.03")
    return f"the training loss is {loss} at step {step}; try {', or '.join(cures)}"


def callbacks(logs: Path, writing: bool) -> list[TrainerCallback]:
    """The bar, and TensorBoard's events in ``logs``, in the process that writes."""
    return [Bar(), TensorBoardCallback(SummaryWriter(str(logs)))] if writing else []


class Bar(TrainerCallback):
    """Steps, time left, and the last loss, learning rate and evaluation; one line, gone when the work is done."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args: Seq2SeqTrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="train",
            unit="step",
            leave=False,
            dynamic_ncols=True,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        wanted = ("loss", "learning_rate", "eval_loss", f"eval_{args.metric_for_best_model}")
        self._shown.update({k: f"{v:.4g}" for k, v in (logs or {}).items() if k in wanted})
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(f"{k} {v}" for k, v in self._shown.items()))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None
