"""A recipe: one fine-tuning run as data. Strict YAML, ``key=value`` overrides, and every mistake told at once.

``docs/training.md`` documents the keys. A recipe is only read here: whether the model, the data and the task fit
together is found out by the workflow that uses it.
"""

import functools
import itertools
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError

from loftq import codes
from loftq.errors import InputError, UsageError, listed, nearest, quoted
from loftq.formats import strict_yaml
from loftq.options import Calibration, Option, Place, Solver, Storage, is_text, rows
from loftq.spec import PRESETS, SolveSpec, solve_spec
from loftq.values import plain_inside

METHODS = ("full", "lora", "qlora", "loftq")
KEYS = "model, task and method"  # that every recipe has
MOST_TOLD = 20  # mistakes of one recipe
DEEPEST_KEY = 8  # parts of a dotted key
SPLIT = re.compile(r"(train|validation|test)(_\w+)?")

# Fields of TrainingArguments that a recipe says elsewhere.
ELSEWHERE = {
    "output_dir": "output",
    "do_train": "nothing: the verb says it",
    "do_eval": "eval_strategy",
    "seed": "seed",
    "resume_from_checkpoint": "nothing: the same command continues by itself",
    "ignore_data_skip": "nothing: a run that continues goes on with the rows that it has not seen",
    "predict_with_generate": "nothing: the task knows",
    "generation_max_length": "generation.max_new_tokens",
    "generation_num_beams": "generation.num_beams",
    "generation_config": "generation",
    "remove_unused_columns": "nothing: the task knows",
    "label_names": "nothing: the task knows",
    "disable_tqdm": "nothing: there is one bar",
    "logging_nan_inf_filter": "nothing: a loss that is not finite ends the run",
}

# Fields of TrainingArguments that are counts, and the least that one may be; transformers takes any number.
LEAST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("eval_accumulation_steps", "dataloader_prefetch_factor"), 1),
    **dict.fromkeys(("dataloader_num_workers", "num_train_epochs", "neftune_noise_alpha"), 0),
}


def _as_text(value: Any) -> Any:
    """Numbers where patterns may stand as well: ``bits: 2.5`` and ``bits: layers.0-3=4,2``."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Rules = Annotated[str, BeforeValidator(_as_text)]
Count = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    """A section: unknown keys and values of another type are refused, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


_Section = TypeVar("_Section", bound=Strict)


class Data(Strict):
    """Where the rows come from: a directory with files named by split, or files by split; else the hub."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, str | list[str]] = Field(init=False)  # type: ignore[assignment]

    directory: str | None = None
    max_train_samples: Count | None = None
    max_eval_samples: Count | None = None

    @model_validator(mode="after")
    def _splits(self) -> "Data":
        odd = [name for name in self.__pydantic_extra__ if not SPLIT.fullmatch(name)]
        if odd:
            wanted = "no split; wanted train, validation, test, or directory"
            raise PydanticCustomError("split", "{names}: {wanted}", {"names": listed(odd), "wanted": wanted})
        if self.directory and self.__pydantic_extra__:
            raise PydanticCustomError("split", "a directory and files are given; wanted one of them")
        return self


def _of(*asked: Any) -> Any:
    """A section with options of the tables. What a preset or a budget decides about is None if it is not given."""
    fields: dict[str, Any] = {name: _field(name, *row) for name, row in rows(*asked).items()}
    return create_model("Options", __base__=Strict, **fields)


# What these may be, is asked when a recipe is read: others may have been registered since the import.
REGISTERED = {"code": lambda: ("auto", *codes.names()), "preset": lambda: tuple(PRESETS)}


def _registered(known: Callable[[], tuple[str, ...]], value: str) -> str:
    if value not in known():
        *others, last = map(repr, known())
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})
    return value


def _field(name: str, kind: Any, option: Option) -> tuple[Any, Any]:
    typed: Any = Rules if is_text(kind) else str if kind == Place else kind
    if option.choices:
        typed = Literal[option.choices]
    if name in REGISTERED:
        typed = Annotated[str, AfterValidator(functools.partial(_registered, REGISTERED[name]))]
    if option.bounds:
        typed = Annotated[typed, Field(**option.bounds)]
    default = None if option.open in ("preset", "budget") else option.default
    return (typed if default is not None else typed | None, default)


class Quantization(_of(Storage, Solver, Calibration, "device")):
    """Fields of :class:`loftq.planning.Policy` and :class:`loftq.spec.SolveSpec`, by their names.

    Its seed is not the run's: runs that differ in the seed of training share a backbone. ``device`` is where it is
    solved and calibrated, not where it is trained.
    """

    def solver(self, method: str) -> SolveSpec:
        """The solver's spec: the preset's, but for what is given beside it. QLoRA has no use for preset and steps."""
        own = {name: getattr(self, name) for name in rows(Solver)}
        if method == "qlora":
            return solve_spec(**{**own, "preset": "qlora", "steps": None, "order": None})
        return solve_spec(**own, calibrated=self.calibrate is not None, code=self.code)


class Lora(_of("rank", "alpha", "dropout", "rslora", "rank_policy")):
    """The adapter. ``alpha`` is the rank if not given."""


class Generation(Strict):
    """How answers are written; what is not given is the task's choice. ``preset``: ``greedy``, or the ``paper``'s."""

    preset: Literal["greedy", "paper"] | None = None
    max_new_tokens: Count | None = None
    num_beams: Count | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Field(gt=0)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _one_choice(self) -> "Generation":
        others = [name for name in self.model_fields_set if name != "preset" and getattr(self, name) is not None]
        if self.preset and others:
            told = "{names}: given beside preset; wanted a preset, or settings of your own"
            raise PydanticCustomError("preset", told, {"names": listed(sorted(others))})
        return self

    @property
    def choice(self) -> str | dict[str, Any] | None:
        """As the tasks take it."""
        return self.preset or self.model_dump(exclude_none=True) or None


class Recipe(Strict):
    """One run. Sections that the method has no use for may stay: ``method=lora`` is all that a baseline changes."""

    model: Annotated[str, Field(min_length=1)]
    task: str | dict[str, Any]
    method: Literal[METHODS]  # type: ignore[valid-type]
    data: Data = Field(default_factory=Data)
    quantization: Quantization | None = None
    lora: Lora = Lora()
    training: dict[str, Any] = {}
    generation: Generation = Generation()
    max_length: Count | None = None
    max_target_length: Count | None = None
    doc_stride: Count | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    output: Annotated[str, Field(min_length=1)] | None = None
    note: str | None = None
    compare: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, values: Any) -> Any:
        return _spelled_out(values) if isinstance(values, dict) else values

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without those that were not given and have no default."""
        return self.model_dump(mode="json", exclude_none=True)

    def changed(self, **sections: Any) -> "Recipe":
        """A recipe with other values, by dotted key: ``changed(**{"lora.rank": 8, "method": "qlora"})``."""
        values = {name: getattr(self, name) for name in self.model_fields_set}
        for section in {key.partition(".")[0] for key in sections}:
            if isinstance(values.get(section), BaseModel):
                values[section] = values[section].model_dump(mode="json", exclude_none=True)
        return parse(values, changes=sections)


def read(path: str | Path, overrides: Sequence[str] = (), output: Path | None = None) -> Recipe:
    """The recipe in a YAML file, with ``key=value`` overrides, and another output; dotted keys reach into sections.

    Raises: InputError for a file that cannot be read as YAML; UsageError naming everything that is wrong in it.
    """
    values, changes = read_mapping(path, KEYS), {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UsageError(f"{quoted(override)}: wanted key=value, such as training.learning_rate=1e-4")
        changes[key] = strict_yaml.loads(value, quoted(key))
    return parse(values, str(path), changes if output is None else {**changes, "output": str(output)})


def read_mapping(path: str | Path, keys: str) -> dict[str, Any]:
    """What stands in a YAML file. InputError if it cannot be read, or is no mapping, which should have ``keys``."""
    values = strict_yaml.load_file(Path(path))
    if not isinstance(values, dict):
        raise InputError(f"{quoted(path)}: wanted a mapping with {keys}, found {quoted(repr(values))}")
    return values


def parse(values: Mapping[str, Any], name: str = "recipe", changes: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe out of plain values. UsageError, of one line, with all that is wrong, each with its key.

    Args:
        changes: other values, by dotted key.
    """
    values = dict(plain_inside(values))
    for key, value in plain_inside(changes or {}).items():
        _put(values, key, value)
    problems = _training_problems(values.get("training"))
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as e:
        problems = itertools.chain(_told(e, Recipe), problems)
    told = _together(problems)
    if told:
        raise UsageError(f"{quoted(name, 400)}: {told}")
    return recipe  # type: ignore[possibly-undefined]


def section(model: type[_Section], values: dict[str, Any], name: str) -> _Section:
    """Plain values as a section of any kind; UsageError as for :func:`parse`."""
    try:
        return model.model_validate(values)
    except ValidationError as e:
        raise UsageError(f"{quoted(name, 400)}: {_together(_told(e, model))}") from e


def _together(problems: Iterable[str]) -> str:
    """Mistakes in one line, each once; of a file that is made of them, the first ones."""
    found = list(dict.fromkeys(itertools.islice(problems, MOST_TOLD + 1)))
    return "; ".join([*found[:MOST_TOLD], "and more"] if len(found) > MOST_TOLD else found)


def dump(recipe: Recipe) -> str:
    """The recipe as YAML that :func:`read` reads back."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True, width=120)


# A word in the place of a section stands for this key of it: ``data: DIR`` is ``data: {directory: DIR}``.
SHORT_FORMS = {"data": "directory", "generation": "preset"}


def _spelled_out(values: dict[str, Any]) -> dict[str, Any]:
    short = {section: key for section, key in SHORT_FORMS.items() if isinstance(values.get(section), str)}
    return {**values, **{section: {key: values[section]} for section, key in short.items()}}


def _put(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    if len(sections) >= DEEPEST_KEY:
        raise UsageError(f"{quoted(dotted)}: {len(sections)} sections; a recipe has no key as deep as that")
    for i, section in enumerate(sections):
        inner = _spelled_out(values).get(section) or {}
        if not isinstance(inner, dict):
            raise UsageError(f"{quoted(dotted)}: {'.'.join(sections[: i + 1])} is {quoted(inner)}, not a section")
        values[section] = values = dict(inner)
    values[key] = value


# What pydantic puts into a place beside the keys, where a value may have several types.
UNION_BRANCHES = ("str", "list[str]", "dict[str,any]")


def _told(error: ValidationError, model: type[BaseModel]) -> Iterator[str]:
    """``key: what is wrong, what came``, for every mistake."""
    for problem in error.errors():
        place = [str(part) for part in problem["loc"] if part not in UNION_BRANCHES]
        if problem["type"] == "extra_forbidden":
            yield f"{quoted('.'.join(place))}: unknown key{nearest(place[-1], _keys(model, place[:-1]), str)}"
        elif problem["type"] == "missing":
            yield f"{'.'.join(place)}: missing"
        else:
            message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "wanted")
            yield f"{quoted('.'.join(place))}: {message}, got {quoted(repr(problem['input']))}" if place else message


def _keys(model: Any, place: list[str]) -> list[str]:
    for part in place:
        annotation = model.model_fields[part].annotation
        kinds = [annotation, *typing.get_args(annotation)]
        model = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(model.model_fields)


def _training_problems(training: Any) -> Iterator[str]:
    """What is wrong with the section that goes to ``Seq2SeqTrainingArguments`` as it is."""
    if not isinstance(training, dict) or not training:
        return
    from transformers import Seq2SeqTrainingArguments

    hints = {**typing.get_type_hints(Seq2SeqTrainingArguments), "fsdp": bool | str | None}
    known = Seq2SeqTrainingArguments.__dataclass_fields__
    fields = [name for name in hints if name in known]
    for key, value in training.items():
        place = f"training.{quoted(key)}"
        if key in ELSEWHERE:
            yield f"{place}: not to be given here; say {ELSEWHERE[key]}"
        elif key not in fields:
            yield f"{place}: no field of transformers.TrainingArguments{nearest(str(key), fields, str)}"
        else:
            yield from _value_problems(place, value, hints[key], known[key].metadata.get("choices"), LEAST.get(key))


def _value_problems(
    place: str, value: Any, hint: Any, choices: Iterable[str] | None, least: int | None
) -> Iterator[str]:
    kinds = typing.get_args(hint) or (hint,)
    named = next((k for k in kinds if isinstance(k, type) and issubclass(k, Enum)), None)
    choices = choices if named is None else [choice.value for choice in named]
    if choices is not None and isinstance(value, str):
        if value not in choices:
            yield f"{place}: wanted one of {', '.join(choices)}, got {quoted(repr(value))}"
        return
    config = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
    bounded: Any = hint if least is None else Annotated[hint, Field(ge=least)]
    try:
        TypeAdapter(bounded, config=config).validate_python(value)
    except ValidationError as e:
        wanted = e.errors()[0]["msg"].replace("Input should be", "wanted")
        yield f"{place}: {wanted}, got {quoted(repr(value))}"
