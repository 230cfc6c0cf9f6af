"""Loading a checkpoint's files with transformers and PEFT: none of their code runs, and nothing is downloaded.

Models get the configuration of :func:`loftq.architecture.configuration.read_config`, never the file itself.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loftq.architecture.configuration import classes, read_config
from loftq.errors import InputError, LoftqError, UsageError, listed, one_line, quoted
from loftq.formats import strict_json
from loftq.formats.lookalikes import refuse_adapter
from loftq.formats.regular import open_regular

# How files with a tokenizer's tokens are called, beside the names that its class has for them: beginnings, endings.
READ_JSON = re.compile(r"(tokenizer|vocab|added_tokens|special_tokens|chat_template|.*config).*\.json")
VOCABULARIES = ("tokenizer.", "vocab", "merges", "tekken", "bpe"), (".model", ".tiktoken", ".spm")


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """transformers and PEFT while they read a local directory: whatever stands in its files, they stay off the network.

    Code that comes with the files is refused without a question, also where one class loads another and forgets to
    pass ``trust_remote_code=False`` on.
    """
    from huggingface_hub import constants
    from transformers import dynamic_module_utils as dynamic

    with contextlib.ExitStack() as stack:
        for module, name, value in (
            (constants, "HF_HUB_OFFLINE", True),
            (dynamic, "TIME_OUT_REMOTE_CODE", 0),  # seconds to wait for an answer from standard input
            (dynamic, "get_class_in_module", _refuse_code),
        ):
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield


def _refuse_code(*_: Any, **__: Any) -> Any:
    raise InputError("needs code that comes with it, which loftq does not run")


def load_config(directory: Path, **options: Any) -> Any:
    """The configuration of a checkpoint, quantized or not, in the class of its ``model_type``.

    Args:
        options: attributes that replace those of the file.

    Raises: InputError for one that transformers does not know.
    """
    path = directory / "config.json"
    values = read_config(directory, quantized=True)
    _, config_class = classes(path, values)
    try:
        with guarded():
            config = config_class.from_dict(values, **options)
            text = config.get_text_config()
    except Exception as e:  # whatever transformers raises for values that it cannot take
        raise InputError(f"{quoted(path)}: no configuration that can be read: {one_line(e)}") from e
    if isinstance(text, dict):
        raise InputError(f"{quoted(path)}: its text_config is none that model_type {config.model_type} has")
    return config


def check_texts(directory: Path) -> None:
    """InputError for a file that transformers would read on its own, without bounds or out of a pipe."""
    for path in sorted(directory.iterdir()):
        if READ_JSON.fullmatch(path.name):
            strict_json.check_bounds(path)
        elif _is_vocabulary(path):
            with open_regular(path):
                pass


def _is_vocabulary(path: Path) -> bool:
    return path.name.startswith(VOCABULARIES[0]) or path.suffix in VOCABULARIES[1]


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer beside a checkpoint. InputError if there is none, or only one with code of its own."""
    import transformers

    config = load_config(directory)
    check_texts(directory)
    try:
        with guarded():
            found: Any = transformers.AutoTokenizer.from_pretrained(
                directory, config=config, trust_remote_code=False, local_files_only=True
            )
    except Exception as e:  # whatever transformers and tokenizers raise for files that they cannot take
        there = any(_is_vocabulary(f) or f.name == "tokenizer_config.json" for f in directory.iterdir())
        absent = "no file of one is there; fetch its files, or save one into the directory"
        why = one_line(e) if there else absent
        raise InputError(f"{quoted(directory)}: no tokenizer that can be read: {why}") from e
    if not isinstance(found, transformers.PreTrainedTokenizerBase):
        raise InputError(f"{quoted(directory)}: its tokenizer_class {type(found).__name__} is no tokenizer")
    named = {*found.vocab_files_names.values()}
    if named and not any(f.name in named or _is_vocabulary(f) for f in directory.iterdir()):
        raise InputError(
            f"{quoted(directory)}: no tokenizer that can be read: none of {listed(sorted(named))} exists; fetch "
            "the tokenizer's files, transformers would make one up"
        )
    return found


def load_weights(model_class: Any, directory: Path, config: Any, **options: Any) -> Any:
    """``model_class.from_pretrained`` of a local directory.

    Args:
        model_class: of transformers, an auto class too.
        config: of :func:`load_config`.

    Raises: InputError if transformers cannot load it, or would put an adapter on that lies beside the weights;
        UsageError if the package that quantized it is missing.
    """
    refuse_adapter(directory)
    check_texts(directory)
    try:
        with guarded():
            return model_class.from_pretrained(
                directory, config=config, trust_remote_code=False, local_files_only=True, **options
            )
    except LoftqError:
        raise
    except ImportError as e:
        raise UsageError(f"{quoted(directory)}: {one_line(e)}") from e
    except Exception as e:  # whatever transformers and the quantizers raise for files that they cannot take
        name = model_class.__name__
        line = one_line(e)
        raise InputError(f"{quoted(directory)}: transformers cannot load this model as {name}: {line}") from e
