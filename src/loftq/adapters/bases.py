"""Adapters that name their base by a relative path, so that both can be moved and uploaded together.

The initialization in ``loftq_init`` says ``base_model_name_or_path: ".."``. PEFT and transformers would take that for a
place seen from the current directory; here they are given the directory that holds the adapter's, or the hub's
repository.
"""

import functools
import hashlib
import inspect
import json
import os
import posixpath
import tempfile
from pathlib import Path
from typing import Any

from loftq.errors import InputError, StorageError, quoted, warn
from loftq.formats import fsio, strict_json
from loftq.patching import patches

PARENT = ".."
KEY = "base_model_name_or_path"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def resolved(base: Any, place: str | os.PathLike, subfolder: str | None = None) -> Any:
    """The path of an adapter's base; ``base`` itself unless it is a path relative to the adapter.

    Any ``..`` at the beginning counts, unless it leads to a directory from the current one, as PEFT writes such names.

    Args:
        base: ``base_model_name_or_path`` of the adapter.
        place: the adapter's directory or id on the hub, as a user gives it.
        subfolder: of ``place``, where the adapter is.

    A whole path that is no longer there is looked for again: base and adapter may have been moved together.

    Returns: a whole path; for an adapter of the hub the id of its repository.
    """
    local = os.path.isdir(place)
    adapter = os.path.join(place, subfolder or "")
    if is_relative(base):
        if local:
            places = (os.path.abspath(os.path.join(adapter, base)), os.path.realpath(os.path.join(adapter, base)))
            return next((found for found in places if os.path.isfile(os.path.join(found, "config.json"))), base)
        in_repository = posixpath.normpath(posixpath.join(subfolder or "", base))
        return str(place) if in_repository == "." else base
    if local and isinstance(base, str) and os.path.isabs(base) and not os.path.exists(base):
        return _moved_with(adapter, base) or base
    return base


def _moved_with(adapter: str, base: str) -> str | None:
    """The packed model that moved with an adapter from ``base``, with a warning; None without one.

    It lies around the adapter, or nearest above it where the end of ``base`` says; one that is known to be another than
    the adapter's is passed over.
    """
    from loftq.adapters.origins import beside, identity  # which asks here where bases are

    names, wanted = Path(base).parts[1:], beside(adapter)
    for above in Path(os.path.abspath(adapter)).parents:
        for end in (names[i:] for i in range(len(names) + 1)):
            found = str(above.joinpath(*end))
            if _is_packed(found) and wanted in (None, identity(found)):
                warn(f"the adapter's base {base} is not there; {found} is taken, as moved with it")
                return found
    return None


def _is_packed(directory: str) -> bool:
    try:
        config = strict_json.load_object(Path(directory) / "config.json", special=True)
    except (InputError, StorageError):
        return False
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "loftq"


def is_relative(base: Any) -> bool:
    """Whether ``base`` is a path relative to the adapter."""
    return isinstance(base, str) and (base == PARENT or (base.startswith("../") and not os.path.isdir(base)))


def refuse_lost(base: Any, place: str | os.PathLike) -> None:
    """InputError if the base of an adapter, as :func:`resolved` gives it, is a local path that does not exist."""
    gone = is_relative(base) or (isinstance(base, str) and os.path.isabs(base) and not os.path.isdir(base))
    if not gone or not os.path.isdir(place):
        return
    lost = "lay around it, and is not there" if is_relative(base) else f"{quoted(base, 400)} is not there any more"
    raise InputError(
        f"{quoted(place, 400)}: its base {lost}; write where it is now into {KEY} of its adapter_config.json, or "
        "load the base, and PeftModel.from_pretrained(base, ...)"
    )


def fetched(place: str | os.PathLike, subfolder: str, revision: str | None = None) -> str:
    """The local directory of an adapter, downloaded if ``place`` is a repository of the hub and it is not there.

    Without the network PEFT's ``load_peft_weights`` looks in the cache for ``subfolder`` inside of ``subfolder``.

    Raises: OSError if a repository has no such adapter.
    """
    from transformers.utils.hub import cached_file

    if os.path.isdir(place):
        return os.path.join(place, subfolder)
    for name in ("adapter_config.json", WEIGHTS[0]):
        file = cached_file(place, name, subfolder=subfolder, revision=revision)
    return os.path.dirname(str(file))


def refuse_no_weights(adapter: str | os.PathLike) -> None:
    """InputError for an adapter's directory without its weights: PEFT would ask the hub for a model of that name."""
    if os.path.isdir(adapter) and not any(os.path.isfile(os.path.join(adapter, name)) for name in WEIGHTS):
        raise InputError(f"{quoted(adapter, 400)}: {WEIGHTS[0]} is not there; fetch it again, or make it again")


def read_config(config: Any) -> None:
    """Let ``PeftConfig.from_pretrained`` give absolute paths of bases, so that trained adapters keep one that exists.

    Args:
        config: the module ``peft.config``, as :func:`write_config` takes it.
    """

    @patches(config.PeftConfigMixin, "from_pretrained")
    def from_pretrained(read, cls, pretrained_model_name_or_path, subfolder=None, **kwargs):  # type: ignore[no-untyped-def]
        config = read(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        base = getattr(config, KEY, None)
        setattr(config, KEY, resolved(base, pretrained_model_name_or_path, subfolder))
        return config


def write_config(config: Any) -> None:
    """Let ``PeftConfig.save_pretrained`` write the absolute path of a packed base that was given by a relative one."""

    @patches(config.PeftConfigMixin, "save_pretrained")
    def save_pretrained(save, self, save_directory, **kwargs):  # type: ignore[no-untyped-def]
        base: Any = getattr(self, KEY, None)
        if isinstance(base, str) and _is_packed(base) and not _is_packed(os.path.join(save_directory, base)):
            setattr(self, KEY, os.path.abspath(base))
        try:
            save(self, save_directory, **kwargs)
        finally:
            setattr(self, KEY, base)


def load_from_subfolder(auto: Any) -> None:
    """Let ``AutoPeftModel…from_pretrained(DIR, subfolder="loftq_init")`` look for the base beside the subfolder.

    PEFT looks for both in it. An adapter on the hub is fetched together with its base, which is the same repository.

    Args:
        auto: the module ``peft.auto``.
    """

    @patches(auto._BaseAutoPeftModel, "from_pretrained")
    def from_pretrained(load, cls, pretrained_model_name_or_path, *args, subfolder=None, **kwargs):  # type: ignore[no-untyped-def]
        place = pretrained_model_name_or_path
        if subfolder:
            place = _below(place, subfolder, kwargs)
            subfolder = None if place != pretrained_model_name_or_path else subfolder
        options = {"subfolder": subfolder} if subfolder else {}
        return load(cls, place, *args, **options, **kwargs)


def _below(place: str | os.PathLike, subfolder: str, kwargs: dict[str, Any]) -> str | os.PathLike:
    """The adapter's directory, with its base beside it; ``place`` for one of the hub that has its base elsewhere."""
    from huggingface_hub import snapshot_download
    from peft import PeftConfig

    if not os.path.isdir(place):
        config = PeftConfig.from_pretrained(str(place), subfolder=subfolder, **kwargs)
        if config.base_model_name_or_path != str(place):
            return place
        known = inspect.signature(snapshot_download).parameters
        place = snapshot_download(str(place), **{k: v for k, v in kwargs.items() if k in known})
    return os.path.join(place, subfolder)


def find_config(finder: Any) -> None:
    """Let ``find_adapter_config_file`` return a file with the absolute path of the base.

    ``AutoModel`` and ``pipeline`` read the base's name from that file, and nothing else.

    Args:
        finder: a module of transformers that has this function, or imported it.
    """
    if getattr(finder.find_adapter_config_file, "_names_bases", False):
        return

    @patches(finder, "find_adapter_config_file")
    def found(find: Any, model_id: Any, *args: Any, **kwargs: Any) -> str | None:
        path = find(model_id, *args, **kwargs)
        if path is None:
            return None
        try:
            config = strict_json.load_object(Path(path))
            base = resolved(config.get(KEY), model_id, kwargs.get("subfolder"))
            return path if base == config.get(KEY) else _copy({**config, KEY: base})
        except (InputError, StorageError):
            return path  # whoever reads it says what is wrong

    finder.find_adapter_config_file._names_bases = True


def _copy(config: dict[str, Any]) -> str:
    """A file with ``config`` that is gone when the process ends."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    path = Path(_copies().name) / f"{digest}.json"
    fsio.write_json(path, config)
    return str(path)


@functools.cache
def _copies() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="loftq-")
