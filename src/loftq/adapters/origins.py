"""Which base an adapter belongs to: the hash of the base's manifest is saved with the adapter.

An adapter with a LoftQ initialization makes up for the error of one quantized model. On another one, the original
above all, it adds that error. PEFT's ``save_pretrained`` therefore leaves ``loftq_base.json`` beside
``adapter_config.json``, with the hash of the base's manifest; Trainer's checkpoints and uploads have it too. The
initialization in a quantized directory needs none: its base is the directory that it lies in.
"""

import os
from pathlib import Path
from typing import Any

from loftq.adapters.bases import KEY, is_relative, refuse_lost, resolved
from loftq.errors import InputError, LoftqError, quoted, warn
from loftq.formats import fsio, strict_json
from loftq.formats.config import EXPORTED, FOR_ORIGINAL, MANIFEST
from loftq.nn.hf import origin
from loftq.nn.layers import PackedWeight
from loftq.patching import patches

BESIDE = "loftq_base.json"
FIELD = "manifest_sha256"


def identity(directory: str | os.PathLike) -> str | None:
    """The hash of the manifest in ``directory``, or of that of the base whose weights alone were exported to it; None
    for any other model.
    """
    manifest = _read(Path(directory) / MANIFEST)
    exported = _read(Path(directory) / EXPORTED).get("identity")
    whole = isinstance(exported, dict) and (
        exported.get("adapter") is None or (exported.get("options") or {}).get("verb") == "export"  # which lies apart
    )
    found = manifest.get("sha256") or (exported.get("base") if whole else None)  # type: ignore[union-attr]
    return found if isinstance(found, str) else None


def beside(adapter: str | os.PathLike) -> str | None:
    """The hash in the file beside an adapter; None if there is none."""
    found = _read(Path(adapter) / BESIDE).get(FIELD)
    return found if isinstance(found, str) else None


def recorded(adapter: str | os.PathLike) -> str | None:
    """The hash of the base that the adapter in a local directory was made or trained on; None if it is not known."""
    found = beside(adapter)
    if found is not None:
        return found
    base = resolved(_read(Path(adapter) / "adapter_config.json").get(KEY), adapter)
    return identity(base) if isinstance(base, str) and os.path.isdir(base) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        return strict_json.load_object(path, special=True) if path.is_file() else {}
    except LoftqError:
        return {}  # whoever needs the file says what is wrong with it


def refuse_other(adapter: Path, base: Path) -> None:
    """InputError if an adapter is known to belong to another base than the one in the directory ``base``."""
    wanted, found = recorded(adapter), identity(base)
    if wanted != found and (wanted is not None or _is_for_original(adapter)):
        raise InputError(f"{quoted(adapter, 400)}: {_told(wanted, found, quoted(base, 400))}")


def warn_of_other(model: Any, adapter: Any, subfolder: str | None = None) -> None:
    """Warn if an adapter is known to belong to another base than ``model``, a model of transformers."""
    place = os.path.join(str(adapter), subfolder or "")
    wanted = recorded(place) if os.path.isdir(place) else None
    name, _ = origin(model)
    if (wanted is None and not _is_for_original(place)) or not name:
        return
    found = identity(name) if os.path.isdir(name) else None
    unknown = found is None and any(isinstance(module, PackedWeight) for module in model.modules())
    if wanted != found and not unknown:
        warn(f"{quoted(place, 400)}: {_told(wanted, found, quoted(name, 400))}")


def _is_for_original(adapter: str | os.PathLike) -> bool:
    """Whether an adapter was exported for the original, which holds what a quantized base lacks."""
    exported: Any = _read(Path(adapter) / EXPORTED).get("identity") or {}
    return isinstance(exported, dict) and (exported.get("options") or {}).get("to") == FOR_ORIGINAL


def _told(wanted: str | None, found: str | None, name: str) -> str:
    if wanted is None:
        return f"the adapter was exported for the original, and {name} is quantized; give the one that was exported"
    here = f"of manifest {found[:12]}" if found else "without a manifest"
    return (
        f"the adapter belongs to the quantized model of manifest {wanted[:12]}, and {name} is another model, {here}: "
        "it makes up for an error that is not there; load the base that it was trained on"
    )


def write_with_config(configs: Any) -> None:
    """Let ``PeftConfig.save_pretrained`` write the hash of the base beside the configuration.

    Args:
        configs: the module ``peft.config``.
    """

    @patches(configs.PeftConfigMixin, "from_pretrained")
    def from_pretrained(read, cls, pretrained_model_name_or_path, subfolder=None, **kwargs):  # type: ignore[no-untyped-def]
        config = read(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config._loftq_base = recorded(os.path.join(pretrained_model_name_or_path, subfolder or ""))
        return config

    @patches(configs.PeftConfigMixin, "save_pretrained")
    def save_pretrained(save, self, save_directory, **kwargs):  # type: ignore[no-untyped-def]
        save(self, save_directory, **kwargs)
        base = resolved(getattr(self, KEY, None), save_directory)
        local = isinstance(base, str) and os.path.isdir(base)
        found = identity(base) if local else getattr(self, "_loftq_base", None)
        beside = Path(save_directory) / BESIDE
        if found is not None:
            fsio.write_json(beside, {FIELD: found})
        elif beside.is_file():
            fsio.remove(beside)  # of an adapter that was here before


def refuse_lost_base(auto: Any) -> None:
    """Let ``AutoPeftModel`` say what to do if the recorded base of an adapter is gone; PEFT would ask the hub.

    Args:
        auto: the module ``peft.auto``.
    """

    @patches(auto._BaseAutoPeftModel, "from_pretrained")
    def from_pretrained(load, cls, pretrained_model_name_or_path, *args, **kwargs):  # type: ignore[no-untyped-def]
        place = Path(pretrained_model_name_or_path)
        base = resolved(_read(place / "adapter_config.json").get(KEY), place)
        if recorded(place) is not None or is_relative(base):
            refuse_lost(base, place)
        return load(cls, pretrained_model_name_or_path, *args, **kwargs)


def warn_on_loading(models: Any) -> None:
    """Let ``load_adapter`` of ``PeftModel``, or of transformers' own models, warn of an adapter of another base.

    Args:
        models: the module ``peft.peft_model`` or ``transformers.integrations.peft``.
    """
    model_class = getattr(models, "PeftAdapterMixin", None) or models.PeftModel

    @patches(model_class, "load_adapter")
    def load_adapter(load: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(self, *args, **kwargs)
        place = args[0] if args else kwargs.get("model_id", kwargs.get("peft_model_id"))
        subfolder = kwargs.get("subfolder") or (kwargs.get("adapter_kwargs") or {}).get("subfolder")
        if place is not None:
            base: Any = self.get_base_model() if hasattr(self, "get_base_model") else self
            warn_of_other(base, place, subfolder)
        return result
