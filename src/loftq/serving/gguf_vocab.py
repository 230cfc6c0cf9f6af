"""The tokenizer of a GGUF file, from ``tokenizer.json``.

Two kinds have a form there: byte-level BPE (``gpt2``), whose rule for cutting words llama.cpp knows by a name, and BPE
over characters with bytes for the rest (``llama``), as SentencePiece makes it. There, pieces are merged by their
scores; the place of a merge among all merges is one.
"""

import re
from pathlib import Path
from typing import Any

from loftq.architecture import tokenizer
from loftq.errors import InputError, option, quoted
from loftq.formats.regular import shown

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# The expressions that words are cut by in tokenizer.json -> what llama.cpp calls the rule.
RULES = {
    "": "gpt-2",  # the byte-level step's own
    rf"{_WORDS}\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    rf"{_WORDS}\p{{N}}{_REST}": "qwen2",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def add_vocabulary(writer: Any, directory: Path, rows: int, rule: str | None) -> None:
    """Put the tokenizer of ``directory`` into the header of a GGUF file.

    Args:
        writer: a ``GGUFWriter`` of the package gguf.
        rows: of the embedding table; those beyond the tokenizer's tokens are unused.
        rule: llama.cpp's name for how words are cut, where it cannot be told.

    Raises: InputError for a tokenizer of another kind, or whose rule is not known.
    """
    import gguf  # type: ignore[import-not-found]

    path = directory / tokenizer.FILE
    if not path.is_file():
        raise InputError(f"{shown(path)}: missing; GGUF is made from a fast tokenizer, save it with transformers")
    content = tokenizer.read_for_gguf(directory)
    model: dict[str, Any] = content["model"]
    tokens, types = _tokens(path, content, model, rows)
    by_bytes = tokenizer.is_byte_level(content)
    writer.add_tokenizer_model("gpt2" if by_bytes else "llama")
    writer.add_tokenizer_pre(_rule(path, content, rule) if by_bytes else rule or "default")
    if not by_bytes:
        writer.add_token_scores(_scores(tokens, model))
        writer.add_add_space_prefix(_prepends(content))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(directory, load_merges=by_bytes, n_vocab=rows)
    special.add_to_gguf(writer, quiet=True)


def _tokens(path: Path, content: dict[str, Any], model: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Every token by its number, and its kind."""
    named: dict[int, str] = {number: token for token, number in model["vocab"].items()}
    added = {token["id"]: token for token in content.get("added_tokens") or []}
    named |= {number: token["content"] for number, token in added.items()}
    if max(named) >= rows:
        raise InputError(f"{shown(path)}: {max(named) + 1} tokens, and the model has {rows}; not the model's tokenizer")
    kinds = []
    for number in range(rows):
        token, more = named.get(number), added.get(number)
        if token is None:
            kinds.append(UNUSED)
        elif more is not None:
            kinds.append(CONTROL if more.get("special") else USER_DEFINED)
        elif model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            kinds.append(BYTE)
        else:
            kinds.append(NORMAL)
        if token is not None and token == model.get("unk_token"):
            kinds[-1] = UNKNOWN
    return [named.get(number, f"[PAD{number}]") for number in range(rows)], kinds


def _scores(tokens: list[str], model: dict[str, Any]) -> list[float]:
    """Minus the place of the first merge that makes a token; what no merge makes comes last."""
    first: dict[str, int] = {}
    for place, merge in enumerate(model.get("merges") or []):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        first.setdefault(left + right, place)
    last = len(model.get("merges") or [])
    return [-float(first.get(token, last)) for token in tokens]


def _rule(path: Path, content: dict[str, Any], given: str | None) -> str:
    """The given one, else the recognized one. InputError if the given one is known to be another, or there is none."""
    steps = tokenizer.steps(content.get("pre_tokenizer"))
    cut = [str((step.get("pattern") or {}).get("Regex")) for step in steps if step.get("type") == "Split"]
    rule = None if {step.get("type") for step in steps} - {"Split", "ByteLevel"} else RULES.get("".join(cut))
    if rule is not None and given in RULES.values() and given != rule:  # llama.cpp has further names for some rules
        raise InputError(
            f"{shown(path)}: its pre-tokenization is llama.cpp's {quoted(rule)}, and "
            f"{option('tokenizer_rule', given)} would give other tokens; leave it out"
        )
    if (rule := given or rule) is None:
        raise InputError(
            f"{shown(path)}: its pre-tokenization is not recognized; give llama.cpp's name of it: "
            f"{option('tokenizer_rule', 'NAME')}"
        )
    return rule


def _prepends(content: dict[str, Any]) -> bool:
    """Whether a text gets a space before its first word."""
    normalizer, cut = content.get("normalizer"), content.get("pre_tokenizer")
    never = any(step.get("prepend_scheme") == "never" for step in tokenizer.steps(cut))
    return not never and bool({"Prepend", "Metaspace"} & (tokenizer.kinds(normalizer) | tokenizer.kinds(cut)))
