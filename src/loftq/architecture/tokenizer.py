"""What a ``tokenizer.json`` says about its kind, and whether llama.cpp has a form of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loftq.errors import InputError, quoted
from loftq.formats import strict_json
from loftq.formats.regular import shown

FILE = "tokenizer.json"
LARGEST = 1 << 28


def read_for_gguf(directory: Path) -> dict[str, Any]:
    """The ``tokenizer.json`` of a directory that has one.

    Raises: InputError for a tokenizer that llama.cpp has no form of, or that it would not load.
    """
    path = directory / FILE
    content = strict_json.load_object(path, max_bytes=LARGEST)
    model = content.get("model")
    model = model if isinstance(model, dict) else {}
    if model.get("type") != "BPE":
        raise InputError(f"{shown(path)}: a {quoted(model.get('type'))} tokenizer; wanted BPE for GGUF")
    if is_byte_level(content):
        if not model.get("merges"):
            raise InputError(
                f"{shown(path)}: no merges, and llama.cpp loads no byte-level BPE without; train it with some"
            )
    elif not model.get("byte_fallback"):
        raise InputError(f"{shown(path)}: neither byte-level nor with byte_fallback; llama.cpp has no such tokenizer")
    return content


def is_byte_level(content: Mapping[str, Any]) -> bool:
    """Whether a text becomes bytes, each written as a character, before BPE merges them."""
    return "ByteLevel" in kinds(content.get("pre_tokenizer"))


def steps(value: Any) -> list[dict[str, Any]]:
    """A step of a tokenizer, or those of a sequence of them."""
    if not isinstance(value, dict):
        return []
    inner = value.get("pretokenizers") or value.get("normalizers")
    return [step for one in inner for step in steps(one)] if isinstance(inner, list) else [value]


def kinds(value: Any) -> set[str]:
    """Types of the steps of a normalizer or of a pre-tokenizer."""
    return {str(step.get("type")) for step in steps(value)}
