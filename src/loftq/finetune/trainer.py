"""The trainer of transformers with what every run of ours wants: a bar of one line, and an end to a lost run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import RandomSampler, Sampler, SequentialSampler
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback

from loftq.errors import LoftqError, NumericalError, UsageError, first_line, in_memory, listed, one_line, quoted
from loftq.finetune import checkpoints
from loftq.report.bars import are_shown

MORE_MEMORY = (
    "for a step of training; try a smaller training.per_device_train_batch_size with more "
    "training.gradient_accumulation_steps, training.gradient_checkpointing=true, or a smaller max_length"
)


class LoftQTrainer(Seq2SeqTrainer):
    """``Seq2SeqTrainer``, for tasks that generate nothing the same as ``Trainer``.

    A lost run stops at once. A run that was stopped continues to what it would have been: a checkpoint at the end of
    an epoch waits for what is evaluated and logged there, losses that are not logged yet are kept, what was evaluated
    at the start is not evaluated again, and nothing is trained beyond the last step.
    """

    def __init__(self, *args: Any, counts_tokens: bool, **kwargs: Any) -> None:
        """``counts_tokens``: the model's loss is a mean over the tokens of all micro-batches and processes.

        Otherwise it is a mean over a micro-batch. transformers 5 takes every model for one of the first kind whose
        forward has ``**kwargs``, BERT's and BART's too, and then multiplies their loss by the number of processes and
        of accumulated micro-batches.
        """
        with _refusing():
            try:
                super().__init__(*args, **kwargs)
            except OSError as e:
                if not kwargs["args"].push_to_hub:
                    raise
                raise UsageError(f"training.push_to_hub: {one_line(e)}; leave it out, and upload what was made") from e
        self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs and counts_tokens
        self.remove_callback(PrinterCallback)
        self.epoch_ends, self.postponed = False, False
        self.add_callback(Continuing(self))

    def train(self, resume_from_checkpoint: Path | None = None) -> Any:  # type: ignore[override]
        """Train, from a checkpoint if one is given. Whatever stops it, no bar and no open log stays behind."""
        self.args.eval_on_start = self.args.eval_on_start and resume_from_checkpoint is None
        try:
            with in_memory(MORE_MEMORY):
                return super().train(str(resume_from_checkpoint) if resume_from_checkpoint else None)
        except ImportError as e:  # of a package that only some setting needs
            raise UsageError(f"training: {one_line(e)}") from e
        except (RuntimeError, ValueError) as e:
            if not self.args.torch_compile or isinstance(e, LoftqError):
                raise
            raise UsageError(f"training.torch_compile: {first_line(e)}; leave it out") from e
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, (TrainingBar, TensorBoardCallback)):
                    callback.on_train_end(self.args, self.state, self.control)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As the Trainer's. One that would draw its order from what was drawn before gets it from the epoch."""
        sampler: Any = super()._get_train_sampler(train_dataset)
        if sampler is None or hasattr(sampler, "set_epoch") or isinstance(sampler, (RandomSampler, SequentialSampler)):
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SeededByEpoch(sampler, seed)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer. UsageError if a package is missing for it, or one of its options."""
        with _refusing():
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer. UsageError if one of its options is missing."""
        with _refusing():
            return super().create_scheduler(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer; the mean loss at the end is of all steps, not of those since the last start."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        self._list_files(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self._list_files(output_dir)

    def _list_files(self, output_dir: str | None) -> None:
        if output_dir is not None and self.args.should_save:
            states: Any = self.state.stateful_callbacks
            states.setdefault(checkpoints.KEPT, {})["files"] = checkpoints.files_in(Path(output_dir))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        state = self.state
        if not self.epoch_ends and (float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps):
            self.postponed = True
            return
        self.postponed = False
        states: Any = state.stateful_callbacks
        states[checkpoints.KEPT] = {
            "unlogged": self.accelerator.gather(self._tr_loss).mean().item(),  # type: ignore[union-attr]
            "logged_at": self._globalstep_last_logged,
            "total": self._total_loss_scalar,
        }
        super()._save_checkpoint(model, trial)

    def _init_training_state(self, max_steps: int, updates: int, epochs: int, *args: Any) -> tuple[int, int]:
        """The epoch and the batch to continue with; after the last step there is none."""
        trained, skipped = super()._init_training_state(max_steps, updates, epochs, *args)
        return (epochs, 0) if self.state.global_step >= max_steps else (trained, skipped)

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


class SeededByEpoch(Sampler[Any]):
    """The order of another sampler, the same for an epoch whether or not those before it were trained in this process.

    accelerate tells the epoch, and sees to it for samplers of PyTorch.
    """

    def __init__(self, sampler: Any, seed: int) -> None:
        self._sampler, self._seed, self._epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed + self._epoch)
            order = list(self._sampler)
        return iter(order)


class Continuing(TrainerCallback):
    """Gives a trainer that continues what its checkpoint kept, and tells it when an epoch ends."""

    def __init__(self, trainer: LoftQTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, kept = self._trainer, checkpoints.kept({"stateful_callbacks": state.stateful_callbacks})
        if "unlogged" in kept:
            trainer._tr_loss = torch.tensor(kept["unlogged"], device=args.device)
            trainer._globalstep_last_logged, trainer._total_loss_scalar = kept["logged_at"], kept["total"]
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if best.is_dir():  # the run may have been moved
            state.best_model_checkpoint = str(best)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.epoch_ends = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.epoch_ends = True
        control.should_save = control.should_save or self._trainer.postponed


@contextmanager
def _refusing() -> Iterator[None]:
    """Errors of transformers over what the recipe's section ``training`` asks for, in one line."""
    try:
        yield
    except LoftqError:
        raise
    except (ImportError, ValueError, TypeError) as e:
        raise UsageError(f"training: {one_line(e)}") from e


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
    return [TrainingBar(), TensorBoardCallback(SummaryWriter(str(logs)))] if writing else []


class TrainingBar(TrainerCallback):
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
            disable=not are_shown(),
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
