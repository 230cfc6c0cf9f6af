"""``loftq generate``: a directory and its adapter go on from a text, or answer in a chat."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from loftq.adapters.bases import KEY, refuse_lost, resolved
from loftq.adapters.trained import adapted
from loftq.architecture.loading import load_config, load_tokenizer, load_weights
from loftq.checkpoint.assemble import ADAPTER
from loftq.errors import InputError, UsageError, extra, listed, one_line, option, quoted
from loftq.formats import strict_json
from loftq.formats.config import MANIFEST
from loftq.numerics.device import check_device
from loftq.options import check_fields, default
from loftq.serving.adapter import CONFIG, place_of
from loftq.serving.merge import NO_ADAPTER
from loftq.serving.options import Generating
from loftq.sources.checkpoint import resolve

Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How a text is written: options of :class:`Generating`."""

    max_new_tokens: int = default("max_new_tokens", Generating)
    temperature: float | None = default("temperature", Generating)
    top_p: float | None = default("top_p", Generating)
    seed: int = default("seed", Generating)

    def __post_init__(self) -> None:
        check_fields(self, option, Generating)

    def sampling(self) -> dict[str, Any]:
        """Arguments of transformers' ``generate``."""
        given = {"temperature": self.temperature, "top_p": self.top_p}
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        named = {name: value for name, value in given.items() if value is not None}
        return {"do_sample": True, **named} if named else {}


class Writer:
    """A model in memory with its tokenizer.

    Attributes:
        chats: whether the tokenizer has a chat template.
    """

    def __init__(self, target: str, adapter: str | None = None, device: str | None = None) -> None:
        """Load a quantized or dense directory or hub id, or a run or an adapter, which name their base.

        Args:
            adapter: on ``target``; None: a quantized directory's own initialization; ``none``: no adapter.
            device: by default the accelerator, if there is one.

        Raises: InputError for a model without the head that writes text, which transformers would make up.
        """
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
        check_device(device)
        base, place = _both(target, adapter)
        self.tokenizer = load_tokenizer(base)
        config = load_config(base)
        auto = _auto_class(config, base)
        packed = (getattr(config, "quantization_config", None) or {}).get("quant_method") == "loftq"
        # on a CPU 16 bits are no faster, and less exact
        dtype: Any = torch.float32 if packed and torch.device(device).type == "cpu" else "auto"
        model, found = load_weights(auto, base, config, dtype=dtype, output_loading_info=True)
        _refuse_random(model, found["missing_keys"], base, place)
        self.model = (model if place is None else adapted(model, place)).to(device).eval()
        self.chats = bool(getattr(self.tokenizer, "chat_template", None))

    def write(
        self, prompt: str | list[Message], options: GenerateOptions, told: Callable[[str], object] | None = None
    ) -> str:
        """What comes after a text, or the answer to the last message of a chat.

        Args:
            told: called with every piece of it as soon as it is there.

        Raises: UsageError for a chat without a template, or a prompt as long as the model's positions.
        """
        inputs = self._inputs(prompt)
        length = inputs["input_ids"].shape[1]
        config = self.model.config.get_text_config()
        most = getattr(config, "max_position_embeddings", None) or length + options.max_new_tokens
        room = options.max_new_tokens if config.is_encoder_decoder else min(options.max_new_tokens, most - length)
        if not length or room < 1:
            raise UsageError(
                f"the prompt has {length} tokens; wanted 1 to {most - 1}, the positions that the model has"
            )
        pad = self.tokenizer.pad_token_id
        settings: dict[str, Any] = {**options.sampling(), "max_new_tokens": room}
        if pad is None:
            settings["pad_token_id"] = self.tokenizer.eos_token_id
        transformers.set_seed(options.seed)
        streamer = _Streamer(self.tokenizer, told)
        with torch.inference_mode():
            self.model.generate(**inputs.to(self.model.device), **settings, streamer=streamer)
        return "".join(streamer.pieces)

    def _inputs(self, prompt: str | list[Message]) -> Any:
        if isinstance(prompt, str):
            return self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        if not self.chats:
            raise UsageError("the tokenizer has no chat template; give a text to continue")
        with extra("train"):
            import jinja2  # what templates are written in
        try:
            return self.tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except jinja2.TemplateError as e:
            raise UsageError(f"the tokenizer's chat template refuses these messages: {one_line(e)}") from e


class _Streamer(transformers.TextStreamer):
    def __init__(self, tokenizer: Any, told: Callable[[str], object] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces: list[str] = []
        self._told = told or (lambda text: None)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.pieces.append(text)
            self._told(text)


def _both(target: str, adapter: str | None) -> tuple[Path, Path | None]:
    """The directory of the base, and that of the adapter, if there is one."""
    place = Path(target).expanduser()
    if (place / "adapter" / CONFIG).is_file() or ((place / CONFIG).is_file() and not (place / "config.json").is_file()):
        if adapter is not None:
            raise UsageError(
                f"{option('adapter')} is for a model, and {quoted(target, 400)} is an adapter; leave it out"
            )
        found = place_of(place)
        base = resolved(strict_json.load_object(found / CONFIG).get(KEY), found)
        if not base:
            raise InputError(f"{quoted(found, 400)}: names no base; give the base, and {option('adapter', 'DIR')}")
        refuse_lost(base, found)
        return resolve(str(base)), found
    base = resolve(target)
    if adapter == NO_ADAPTER:
        return base, None
    if adapter is not None:
        return base, place_of(Path(adapter))
    return base, base / ADAPTER if (base / MANIFEST).is_file() or (base / ADAPTER).is_dir() else None


def _auto_class(config: Any, base: Path) -> Any:
    """The class of transformers that loads such a model with its head for text. InputError if it has none."""
    first = "AutoModelForSeq2SeqLM" if getattr(config, "is_encoder_decoder", False) else "AutoModelForCausalLM"
    autos: list[Any] = [getattr(transformers, name) for name in (first, "AutoModelForImageTextToText")]
    found = next((auto for auto in autos if type(config) in auto._model_mapping), None)
    if found is None:
        raise InputError(f"{quoted(base, 400)}: a model of type {config.model_type}, which does not generate text")
    return found


def _refuse_random(model: Any, missing: Iterable[str], base: Path, adapter: Path | None) -> None:
    """InputError for weights that are neither in the base's files nor in the adapter's."""
    brought = strict_json.load_object(adapter / CONFIG).get("modules_to_save") if adapter else None
    lost = sorted(name for name in missing if not {*(brought or ())} & {*name.split(".")})
    if lost:
        what = f"{type(model).__name__} writes text with {listed(lost, 3)}"
        raise InputError(f"{quoted(base, 400)}: {what}, which are not in its files; name a model that was trained to")
