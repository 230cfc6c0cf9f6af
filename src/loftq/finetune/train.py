"""``loftq train``: quantize if the method wants it, fine-tune, evaluate; one directory per run."""

import hashlib
import json
import logging
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import Seq2SeqTrainingArguments, set_seed

from loftq.adapters.convert import FIELDS
from loftq.architecture.loading import load_config, load_tokenizer
from loftq.checkpoint.assemble import adapter_of
from loftq.checkpoint.manifest import MANIFEST, read_manifest
from loftq.checkpoint.quantize import Begin, QuantizeOptions, quantize
from loftq.errors import InputError, LoftqError, UsageError, option, quoted
from loftq.finetune.arguments import training_arguments
from loftq.finetune.card import trained_card
from loftq.finetune.inputs import contents, held, located, read_data, splits_of, task_of
from loftq.finetune.model import add_lora, add_start, load_model, precision, save
from loftq.finetune.recipe import Quantization, Recipe
from loftq.finetune.run import RunDirectory, RunResult
from loftq.finetune.tasks import Task, score
from loftq.finetune.tasks.batches import padding
from loftq.finetune.tasks.next_token import NextToken
from loftq.finetune.trainer import LoftQTrainer, callbacks
from loftq.formats import fsio, layouts, strict_json
from loftq.formats.regular import local_path
from loftq.numerics.machine import SLOW_DTYPES
from loftq.options import fields_of
from loftq.planning import Policy
from loftq.sources.checkpoint import open_source, resolve
from loftq.spec import statistics_kind
from loftq.version import __version__

logger = logging.getLogger(__name__)


def finetune(
    recipe: Recipe, *, backbone_cache: Path | None = None, resume: bool = True, begin: Begin | None = None
) -> RunResult:
    """Run ``recipe`` into its ``output``. Continues where it was stopped; a finished run is only read back.

    Under ``torchrun`` or ``accelerate launch`` every process calls it: one quantizes and writes, all train, and all
    evaluate the whole of the data.

    Args:
        backbone_cache: directory for quantized backbones, shared by runs; by default each lies in its run.
        resume: False begins again, and removes what an earlier run of the same directory left.
        begin: for a progress bar of quantizing, as :func:`loftq.checkpoint.quantize.quantize` takes it.

    Raises: UsageError and InputError for whatever does not fit, before the hours of quantizing and training;
        ConflictError if the output belongs to another recipe; NumericalError when the loss is not finite.
    """
    if recipe.output is None:
        raise UsageError(f"no output: say where the run goes, with `output:` in the recipe or {option('output')}")
    run, recipe = RunDirectory(local_path("output", recipe.output).absolute()), located(recipe)
    task = task_of(recipe)
    arguments = training_arguments(recipe, task, run.checkpoints)
    processes = PartialState()
    inputs = None
    try:
        check_recipe(recipe)
        inputs = held(recipe)  # in every process: the others would wait too long for one that reads a large model
    except LoftqError:
        if not (resume and run.is_finished(recipe)):  # then they may be gone
            raise
    with run.claimed(recipe, inputs, resume) if processes.is_main_process else nullcontext():
        processes.wait_for_everyone()
        result = run.result() or _work(recipe, task, arguments, run, backbone_cache, begin)
        processes.wait_for_everyone()
    return result


def check_recipe(recipe: Recipe) -> None:
    """Refuse what model, method and task make impossible, without reading rows or weights.

    Raises: UsageError and InputError, as :func:`finetune`.
    """
    task, source = task_of(recipe), resolve(recipe.model)
    task.generation_options(recipe.generation.choice)
    task.check(load_config(source))
    quantized = (source / MANIFEST).is_file()
    if recipe.method not in ("qlora", "loftq"):
        if quantized:
            raise UsageError(f"model: {quoted(source)} is quantized; method {recipe.method} needs a dense model")
    elif quantized:
        _check_quantized(recipe, source)
    if recipe.method != "full" and not quantized:
        open_source(str(source), policy_of(recipe))


def _work(
    recipe: Recipe,
    task: Task,
    arguments: Seq2SeqTrainingArguments,
    run: RunDirectory,
    cache: Path | None,
    begin: Begin | None,
) -> RunResult:
    """The run itself. What can be refused is refused first."""
    writing = PartialState().is_main_process
    source = resolve(recipe.model)
    _tell_slow(arguments)
    watched, reported = _splits(recipe, task, arguments)
    data = read_data(recipe, task, tuple(dict.fromkeys(("train", *reported, *filter(None, [watched])))))
    splits = {split: data[split] for split in reported}
    tokenizer = load_tokenizer(source)
    with arguments.main_process_first():
        rows = {split: task.prepare(data[split], tokenizer, train=split == "train") for split in data}
    base = _backbone(recipe, source, run, cache, begin, writing)
    set_seed(recipe.seed)
    model = _model(recipe, task, base, arguments, tokenizer)
    metrics = task.trainer_metrics(data[watched], rows[watched], tokenizer) if watched else None
    trainer = LoftQTrainer(
        model=model,
        counts_tokens=isinstance(task, NextToken),
        args=arguments,
        train_dataset=rows["train"],
        eval_dataset=rows[watched] if watched else None,
        data_collator=task.collator(tokenizer, model),
        processing_class=padding(tokenizer),  # whose token for padding some Trainers give the model
        compute_metrics=metrics,
        callbacks=callbacks(run.logs, PartialState().is_main_process),
    )
    began = time.monotonic()
    trainer.train(run.last_checkpoint(resumable=not arguments.save_only_model))
    seconds = time.monotonic() - began
    hub_id = None if Path(recipe.model).expanduser().exists() else recipe.model
    place, device = run.model if recipe.method == "full" else run.adapter, arguments.device
    save(trainer.model, place, tokenizer, writing, hub_id if base == source else None)
    result = RunResult(
        task=task.identity,
        method=recipe.method,
        seed=recipe.seed,
        metrics=evaluate_splits(recipe, task, trainer.model, tokenizer, splits),
        splits=list(splits),
        history=strict_json.finite(trainer.state.log_history),
        steps=trainer.state.global_step,
        epochs=float(trainer.state.epoch or 0),
        seconds=round(seconds, 3),
        learning_rate=arguments.learning_rate,
        bytes=_sizes(recipe, run, base),
        base=str(base),
        processes=arguments.world_size,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        versions={"loftq": __version__, **{p.__name__: p.__version__ for p in (torch, transformers, peft)}},
    )
    if writing:
        card = _card(recipe, task, result, trainer.model, hub_id)
        fsio.write_atomic(place / "README.md", [card.encode()])
        run.finish(result)
    return result


def evaluate_splits(
    recipe: Recipe, task: Task, model: Any, tokenizer: Any, splits: dict[str, Dataset], batch_size: int | None = None
) -> dict[str, float]:
    """The task's metrics on ``splits``: of the first by their names, of others with the split's name before them."""
    size = batch_size or recipe.training.get("per_device_eval_batch_size", 32)
    metrics: dict[str, float] = {}
    for split, rows in splits.items():
        with precision(model, recipe.training):
            found = score(
                task,
                model,
                tokenizer,
                rows,
                batch_size=size,
                generation=recipe.generation.choice,
                progress=PartialState().is_main_process,
            )
        metrics.update({f"{split}_{k}" if metrics else k: v for k, v in found.items()})
    return metrics


def policy_of(recipe: Recipe) -> Policy:
    """What ``loftq quantize`` would be asked for. QLoRA is LoftQ of no steps.

    Nothing is rounded but the quantized weights: runs of a comparison differ in their method alone.
    """
    given, lora = recipe.quantization or Quantization(), recipe.lora
    return Policy(
        **fields_of(Policy, {**given.model_dump(exclude_none=True), **lora.model_dump()}),
        solve=given.solver(recipe.method),
        dtype="source",
        adapter_dtype="float32",
    )


def _splits(recipe: Recipe, task: Task, arguments: Seq2SeqTrainingArguments) -> tuple[str | None, tuple[str, ...]]:
    """The split to watch while training, if one is asked for, and those to report on."""
    available = splits_of(recipe, task)
    if "train" not in available:
        raise InputError(f"task {task.name}: the data has no train split, only {', '.join(available)}")
    watches = arguments.eval_strategy != "no" or arguments.eval_on_start
    watched = task.dev_split(available) if watches else None
    if watches and watched is None:
        raise UsageError(
            f"task {task.name}: nothing to watch while training: the data has no validation split, only "
            f"{', '.join(available)}; add one, or leave out training.eval_strategy, eval_on_start and "
            "load_best_model_at_end"
        )
    return watched, task.eval_splits(available)


def _backbone(
    recipe: Recipe, source: Path, run: RunDirectory, cache: Path | None, begin: Begin | None, writing: bool
) -> Path:
    """The checkpoint that is trained: ``source``, or for ``qlora`` and ``loftq`` its quantized form."""
    if recipe.method not in ("qlora", "loftq") or (source / MANIFEST).is_file():
        return source
    policy = policy_of(recipe)
    given = recipe.quantization or Quantization()
    calibrate = given.calibrate if recipe.method == "loftq" else None
    options = QuantizeOptions(
        policy=policy,
        overwrite=True,
        calibrate=calibrate,
        calibration_samples=given.calibration_samples,
        device=given.device,
    )
    place = run.backbone if cache is None else cache / _cache_name(source, options)
    if cache is not None and calibrate is not None:  # backbones that are calibrated alike share the statistics
        named = [str(source.resolve()), contents(calibrate), given.calibration_samples, statistics_kind(policy.solve)]
        options = replace(options, statistics=cache / f"statistics-{_digest(named)}")
    if writing:
        if cache is not None:
            fsio.make_dirs(cache)
        with nullcontext() if cache is None else fsio.DirectoryLock(cache / "lock", wait=True):
            quantize(str(source), place, options, begin)
    while not (place / MANIFEST).is_file():  # a barrier would time out long before a large model is done
        time.sleep(0.5)
    PartialState().wait_for_everyone()
    return place


def _check_quantized(recipe: Recipe, source: Path) -> None:
    """UsageError if the recipe asks for something else than the quantized directory holds."""
    options = read_manifest(source)["identity"]["options"]
    if recipe.quantization is not None:
        raise UsageError(f"model: {quoted(source)} is quantized already; leave out the section quantization")
    if not layouts.get(options["format"]).packed:
        packed = " or ".join(name for name in layouts.names() if layouts.get(name).packed)
        raise UsageError(
            f"model: {quoted(source)} has {option('format', options['format'])}; wanted a dense checkpoint or "
            f"{option('format', packed)}"
        )
    method = "qlora" if options["solve"]["steps"] == 0 else "loftq"
    if method != recipe.method:
        raise UsageError(f"method: {recipe.method}, but the initialization in {quoted(source)} was made by {method}")
    for name in ("rank", "alpha", "rslora"):
        asked = getattr(recipe.lora, name)
        if asked not in (options[name], type(recipe.lora).model_fields[name].default):
            raise UsageError(
                f"lora.{name}: {asked}, but the initialization in {quoted(source)} was made with {options[name]}; "
                "leave it out"
            )


def _cache_name(source: Path, options: QuantizeOptions) -> str:
    policy = options.policy
    texts = options.calibrate and contents(options.calibrate)
    named = [str(source.resolve()), policy.to_dict(), texts, options.calibration_samples, options.device]
    return f"{source.name}-{policy.budget or policy.bits}bit-{_digest(named)}"


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _model(recipe: Recipe, task: Task, base: Path, arguments: Seq2SeqTrainingArguments, tokenizer: Any) -> Any:
    """What is trained. A frozen backbone may be held in bfloat16; what is trained is float32."""
    dtype = torch.bfloat16 if arguments.bf16 and recipe.method != "full" else torch.float32
    model, new_modules = load_model(task, base, dtype, tokenizer)
    if recipe.method == "full":
        return model
    if recipe.method == "lora":
        source = open_source(str(base), policy_of(recipe))
        fields = adapter_of(source, True, task.peft_task_type, str(base))
        config = LoraConfig(**{k: fields[k] for k in (*FIELDS, "fan_in_fan_out")}, lora_dropout=recipe.lora.dropout)
        return add_lora(model, config, new_modules)
    return add_start(model, base, recipe.lora.dropout)


def _tell_slow(arguments: Seq2SeqTrainingArguments) -> None:
    """Warn of training in 16 bits on a CPU that is faster in 32."""
    if arguments.bf16 and arguments.device.type == "cpu" and torch.bfloat16 in SLOW_DTYPES:
        logger.warning(
            "training.bf16: this processor has no products in bfloat16, and those that PyTorch makes take many times "
            "as long as in float32; leave bf16 out"
        )


def _card(recipe: Recipe, task: Task, result: RunResult, model: Any, hub_id: str | None) -> str:
    """README.md of what was trained."""
    config = model.peft_config["default"] if recipe.method != "full" else None
    labels = task.model_options().get("num_labels", 2)
    return trained_card(
        result,
        auto_class=task.auto_class,
        base=config and config.base_model_name_or_path,
        hub_id=hub_id,
        adapter=config and {"rank": config.r, "alpha": f"{config.lora_alpha:g}"},
        labels=None if labels == 2 else labels,
        training=recipe.training,
    )


def _sizes(recipe: Recipe, run: RunDirectory, base: Path) -> dict[str, int]:
    """Bytes of weights on disk, dense ones in the type they are stored in."""
    place = run.model if recipe.method == "full" else base
    adapter = run.adapter / "adapter_model.safetensors"
    return {
        "backbone": sum(f.stat().st_size for f in place.glob("*") if f.suffix in (".safetensors", ".bin")),
        "adapter": adapter.stat().st_size if adapter.is_file() else 0,
    }
