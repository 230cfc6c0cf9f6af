"""``loftq calibrate``: run texts through a model once, and keep statistics of the inputs of its matrices.

``OUTPUT`` gets a file for each block, and at last ``statistics.json``: without it, a directory is no statistics. A run
that was stopped leaves files that the next one removes.
"""

import collections
import contextlib
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from loftq.adapters.start import refuse_not_dense
from loftq.architecture.loading import load_tokenizer
from loftq.calibration import texts
from loftq.calibration.blocks import load, load_offloaded
from loftq.calibration.collect import HELD_EVERY, Begin, Row, Step, collect, steps
from loftq.calibration.fisher import collect_fisher, labeler
from loftq.calibration.processes import Alone, Processes
from loftq.errors import ConflictError, InputError, UsageError, listed, option, quoted
from loftq.formats import fsio, hashed_json
from loftq.formats.hashed_json import differences
from loftq.formats.regular import local_path, output_path
from loftq.formats.source import open_checkpoint
from loftq.formats.statistics import FORMAT_VERSION, WITH_STACKS, Statistics, write_groups
from loftq.numerics.device import check_device
from loftq.options import check_fields, default
from loftq.sources.checkpoint import located, open_dense, resolve
from loftq.sources.identity import sample
from loftq.version import __version__

logger = logging.getLogger("loftq")

STATISTICS = "statistics.json"
DEFAULT_LENGTH = 512
MOST_UNKNOWN = 0.5  # of a text's tokens


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """What to collect, and from what.

    Attributes:
        data: a file of texts, or a data set of the hub.
        samples: rows at most.
        max_length: tokens of a row; 0: 512, or as many as the model takes.
        column: of the texts in a table; None: ``text``.
        device: on which the model runs; one that is in memory runs where it is.
    """

    data: str
    kind: str = default("kind")
    samples: int = default("samples")
    max_length: int = default("max_length")
    column: str | None = default("column")
    revision: str | None = default("revision")
    device: str = default("device")

    def __post_init__(self) -> None:
        check_fields(self, option)
        if self.max_length == 1:
            raise UsageError(f"{option('max_length')}: {self.max_length} is not a number of tokens, 2 or more")
        check_device(self.device)


@dataclass(frozen=True)
class Asked:
    """What is to be collected, after all texts are read and checked.

    Attributes:
        identity: what the statistics depend on.
    """

    directory: Path
    options: CalibrateOptions
    tokenizer: Any
    rows: list[Row]
    identity: dict[str, Any]

    @property
    def of(self) -> dict[str, Any]:
        """What statistics are of, as ``statistics.json`` says it."""
        return {"kind": self.options.kind, "samples": len(self.rows), "identity": self.identity}

    def manifest(self, files: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
        """What ``statistics.json`` says of files, given what each holds of which group."""
        version = WITH_STACKS if any("experts" in row for row in groups) else FORMAT_VERSION
        return {"format_version": version, **self.of, "files": files, "groups": groups}

    def steps(
        self, offload: Path, begin: Begin | None, processes: Processes | None = None, after: Step | None = None
    ) -> Iterator[Step]:
        """Block after block; for ``fisher``, which has the whole model in memory, all at once.

        Args:
            offload: a directory for weights that cannot be read from the files as they are; it goes away again.
        """
        if self.options.kind == "fisher":
            model: Any = load(self.directory).to(self.options.device)
            yield Step(None, collect_fisher(model, self.rows, self.tokenizer.mask_token_id, begin))
            return
        fsio.make_dirs(offload)
        model = load_offloaded(self.directory, offload, self.options.device)
        yield from steps(model, self.rows, self.options.kind, begin, after=after, processes=processes)
        fsio.remove_tree(offload)

    def check_unchanged(self) -> None:
        if sample(self.directory, open_checkpoint(self.directory)) != self.identity["model"]:
            raise InputError(f"{self.directory}: the model changed while it was read; leave it alone and run again")


def asked_for(model: str, options: CalibrateOptions) -> Asked:
    """Read the texts, and refuse what cannot be collected; raises as :func:`calibrate`."""
    directory = resolve(model, options.revision)
    checkpoint, built = open_dense(directory)
    tokenizer = load_tokenizer(directory)
    if options.kind == "fisher":
        labeler(built, tokenizer.mask_token_id)  # refuses before anything is loaded
    length = length_for(built, tokenizer, options.max_length)
    place, rows = _rows(options, tokenizer, length)
    _check_tokens(rows, tokenizer, built)
    identity = {
        "model": sample(directory, checkpoint),
        "data": {"name": place, "column": options.column, "sha256": _hash(rows)},
        "options": {"kind": options.kind, "samples": options.samples, "max_length": length},
        "versions": {"loftq": __version__, "torch": torch.__version__},
    }
    return Asked(directory, options, tokenizer, rows, identity)


def calibrate(
    model: str,
    output: Path,
    options: CalibrateOptions,
    begin: Begin | None = None,
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Collect statistics of ``model`` into the directory ``output``; what its ``statistics.json`` says.

    Statistics that the same call made earlier are left alone.

    Args:
        model: a local directory or a hub id.
        begin: told the number of steps; returns what each step is told to.
        processes: that run the texts together, each calling this; the first one writes.

    Raises: ConflictError if ``output`` holds something else; UsageError, InputError, NumericalError, StorageError as
        their names say.
    """
    output = output_path(output)
    _check_place(output, resolve(model, options.revision))
    asked = asked_for(model, options)
    together = processes or Alone()
    if processes is not None and options.kind == "fisher":
        raise UsageError("fisher is collected by one process, row by row; begin it without torchrun")
    with contextlib.ExitStack() as left:

        def begun() -> dict[str, Any] | None:
            done = _already_done(output, asked.identity)
            if not done:
                fsio.make_dirs(output)
                left.enter_context(fsio.DirectoryLock(output / ".lock"))
                done = _already_done(output, asked.identity)  # another process may have finished meanwhile
            if not done:
                _clear(output)
            return done

        done = together.first(begun)
        if done:
            return done
        found = asked.steps(output / ".offload" / str(together.rank), begin, processes)
        made = _write(output, found) if together.rank == 0 else collections.deque(found, 0)
        return together.first(lambda: _sealed(output, asked, made))


def _sealed(output: Path, asked: Asked, made: Any) -> dict[str, Any]:
    asked.check_unchanged()
    fsio.remove_tree(output / ".offload")
    return hashed_json.write(output / STATISTICS, {**asked.manifest(**made), "tokens": _tokens(asked.rows)})


def calibrate_loaded(
    model: Any, data: Any, tokenizer: Any, options: CalibrateOptions, begin: Begin | None = None
) -> Statistics:
    """Collect statistics of a model in memory; they are kept in memory.

    Args:
        data: a file or data set, texts, or batches.
        tokenizer: for all but batches; for ``fisher`` of a masked language model, for these too.
        options: ``data`` in it is not looked at.
    """
    refuse_not_dense(model)
    empty = [name for name, p in model.named_parameters() if p.is_meta]
    if empty and getattr(model, "hf_device_map", None) is None:  # else accelerate has them on disk
        raise UsageError(f"the model has no weights, only shapes ({listed(empty, 3)}); load it with from_pretrained")
    length = length_for(model, tokenizer, options.max_length)
    if isinstance(data, (str, Path)):
        _, rows = _rows(replace(options, data=str(data)), _given(tokenizer), length)
    else:
        if not isinstance(data, Iterable) or isinstance(data, (bytes, Mapping)):
            raise UsageError(f"data: wanted a file, texts or batches with input_ids, got {type(data).__name__}")
        items = list(islice(data, options.samples))
        if items and isinstance(items[0], str):
            odd = next((item for item in items if not isinstance(item, str)), None)
            if odd is not None:
                raise UsageError(f"data: texts, and among them {quoted(repr(odd), 60)}")
            rows = texts.rows_of_texts([(text,) for text in items], _given(tokenizer), options.samples, length)
        else:
            rows = texts.rows_of_batches(items, options.samples)
        rows = texts.checked(rows, "the data given")
    _check_tokens(rows, tokenizer, model)
    if options.kind == "fisher":
        groups = collect_fisher(model, rows, getattr(tokenizer, "mask_token_id", None), begin)
    else:
        groups = [group for found in collect(model, rows, options.kind, begin) for group in found]
    return Statistics.of(options.kind, groups, len(rows))


def _given(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise UsageError("texts need a tokenizer: calibrate(model, data, tokenizer)")
    return tokenizer


def open_statistics(directory: Path) -> Statistics:
    """The statistics that ``loftq calibrate`` left in a directory. InputError for anything else."""
    path = directory / STATISTICS
    if not path.is_file():
        raise InputError(f"{quoted(path)}: missing; not a directory that `loftq calibrate` finished")
    return Statistics.stored(directory, hashed_json.load(path))


def open_or_collect(
    path: str, model: str, output: Path, options: CalibrateOptions, begin: Begin | None = None
) -> Statistics:
    """The statistics of ``model``: those in the directory ``path``, or collected from the data that ``path`` names.

    Args:
        path: a directory of statistics, a file of texts, or a data set of the hub.
        output: where what is collected goes; not used for a directory of statistics.
        options: of the collection; ``data`` in it is ``path``'s place and not looked at.

    Raises: ConflictError for statistics of another model; what :func:`open_statistics` and :func:`calibrate` raise.
    """
    directory = local_path("--calibrate", path)
    if directory.is_dir():
        return statistics_of(directory, located(model, options.revision))
    calibrate(model, output, replace(options, data=path), begin)
    return open_statistics(output)


def statistics_of(directory: Path, model: Path) -> Statistics:
    """The statistics in a directory, which have to be of ``model``; raises as :func:`open_or_collect`."""
    found = open_statistics(directory)
    check_model(found, directory, model)
    return found


def check_model(statistics: Statistics, directory: Path, model: Path) -> None:
    """ConflictError if statistics are of another model than the one in the directory ``model``."""
    theirs = statistics.identity.get("identity", {}).get("model")
    changed = listed(differences(theirs, sample(model, open_checkpoint(model))), 3)
    if changed:
        raise ConflictError(
            f"{quoted(directory)}: statistics of another model than {quoted(model)} ({changed}); "
            "collect them for this one"
        )


def length_for(model: Any, tokenizer: Any, asked: int) -> int:
    """Tokens of a row: as asked, or 512, or the most that model and tokenizer take. UsageError for more than that."""
    most = [getattr(model.config.get_text_config(), "max_position_embeddings", None)]
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith(".position_embeddings") and padding is not None:  # RoBERTa counts from there
            most.append(module.num_embeddings - padding - 1)
    if tokenizer is not None:
        most.append(tokenizer.model_max_length)
    limit = min((int(m) for m in most if m and m > 0), default=DEFAULT_LENGTH)
    if asked > limit:
        raise UsageError(f"{option('max_length')}: {asked} tokens are more than the {limit} that the model takes")
    return asked or min(DEFAULT_LENGTH, limit)


def _rows(options: CalibrateOptions, tokenizer: Any, length: int) -> tuple[str, list[Row]]:
    place, dataset = texts.table(options.data)
    shown = quoted(options.data, 400)
    return place, texts.rows_of_table(shown, dataset, tokenizer, options.samples, length, options.column)


def _check_tokens(rows: Sequence[Row], tokenizer: Any, model: Any) -> None:
    """InputError for tokens that a model does not know: where there is no tokenizer, transformers may make one up."""
    ids = [i for row in rows for i in row["input_ids"]]
    known = model.get_input_embeddings().num_embeddings
    if max(ids) >= known:
        raise InputError(f"the tokenizer gives token {max(ids)}, the model has {known}; is it the model's tokenizer?")
    unknown = getattr(tokenizer, "unk_token_id", None)
    share = 0 if unknown is None else ids.count(unknown) / len(ids)
    if share > MOST_UNKNOWN:
        raise InputError(f"the tokenizer does not know {share:.0%} of the text's tokens; is it the model's tokenizer?")


def _hash(rows: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _tokens(rows: Sequence[Row]) -> dict[str, int]:
    lengths = [len(row["input_ids"]) for row in rows]
    held = sum(lengths[HELD_EVERY - 1 :: HELD_EVERY])
    return {"fit": sum(lengths) - held, "held": held}


def _write(output: Path, found: Iterator[Step]) -> dict[str, Any]:
    """A file for each block; what ``statistics.json`` says of files and groups."""
    files, rows = {}, []
    for step in found:
        if step.groups:
            name = f"block-{len(files):05d}.safetensors"
            files[name] = asdict(write_groups(output / name, step.groups))
            rows += [group.row(name) for group in step.groups]
            step.groups.clear()  # the next block takes as much memory
    return {"files": files, "groups": rows}


def _check_place(output: Path, directory: Path) -> None:
    source = directory.resolve()
    if output == source or source in output.parents:
        raise UsageError(f"{output}: is or lies in the model {source}; choose another {option('output')}")
    if output.exists() and not output.is_dir():
        raise ConflictError(f"{output}: exists and is not a directory; choose another {option('output')}")
    strange = [p.name for p in output.iterdir() if not _is_ours(p)] if output.exists() else []
    if strange:
        raise ConflictError(
            f"{output}: holds what loftq did not put there ({listed(strange, 3)}); choose another {option('output')}"
        )


def _is_ours(path: Path) -> bool:
    """Whether this is something that ``loftq calibrate`` leaves, finished or stopped."""
    name = path.name.removeprefix(".").rsplit(".", 2)[0] if path.name.endswith(".tmp") else path.name
    return name in (STATISTICS, ".lock", ".offload") or (name.startswith("block-") and name.endswith(".safetensors"))


def _already_done(output: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """What the same call made earlier; ConflictError for statistics of another one."""
    path = output / STATISTICS
    if not path.is_file():
        return None
    try:
        found = hashed_json.load(path)
        Statistics.stored(output, found)
        problem = listed(differences(found["identity"], identity), 3)
        problem = f"statistics of another call ({problem})" if problem else ""
    except InputError as e:
        found, problem = {}, f"damaged ({e})"
    if problem:
        raise ConflictError(f"{output}: {problem}; choose another {option('output')}, or delete it")
    return found


def _clear(output: Path) -> None:
    """Remove what a stopped run left."""
    for path in output.iterdir():
        if path.name != ".lock":
            fsio.remove_tree(path) if path.is_dir() else fsio.remove(path)
