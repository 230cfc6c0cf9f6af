"""Directories without a checkpoint of transformers: what they hold, and what to do."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loftq.errors import InputError, StorageError, listed, quoted
from loftq.formats import strict_json, text
from loftq.formats.regular import open_regular, shown

ADAPTER_CONFIG = "adapter_config.json"
_MOST_FOLDERS = 100
_MERGE = "merge it into the model with PEFT's merge_and_unload(), and save what that returns"
_WEIGHTS = r"(?:model|pytorch_model)"
_SHARD = r"(?:-\d+-of-\d+)?"
_VARIANT = re.compile(
    rf"{_WEIGHTS}{_SHARD}\.(?P<late>[\w-]+?){_SHARD}\.(?:safetensors|bin)"
    rf"|{_WEIGHTS}\.(?:safetensors|bin)\.index\.(?P<index>[\w-]+)\.json"
)

# What huggingface_hub, browsers and downloaders call a file that is not yet whole.
_UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2")

# Endings or names of files, what they are, what to do.
_FORMATS = (
    (("consolidated.safetensors", "consolidated.00.pth", "params.json"), "the original format of its authors",
     "get the converted one, or convert it with convert_*_weights_to_hf.py of the transformers repository"),
    ((".gguf",), "GGUF only", "start from the original checkpoint in safetensors"),
    ((".h5", ".msgpack", ".ckpt.index"), "weights of TensorFlow or Flax only",
     "get the safetensors, or convert them with from_tf=True or from_flax=True of transformers 4"),
    ((".onnx", ".onnx_data", ".tflite", ".xml", ".engine", ".mlmodel", ".mlpackage"), "an exported graph only",
     "get the checkpoint that it was exported from"),
    (("statistics.json",), "no config.json, but statistics of `loftq calibrate`", "name the model that they are of"),
    ((".ckpt", ".pt", ".pth"), "a file of torch that is no checkpoint of transformers",
     "load it into its model, and call the model's save_pretrained"),
)  # fmt: skip


def refuse_adapter(directory: Path) -> None:
    """InputError for weights, full or packed, with a PEFT adapter beside them: ``from_pretrained`` would put it on."""
    if os.path.lexists(directory / ADAPTER_CONFIG):
        what = "a PEFT adapter beside the weights, which transformers would load with them"
        cure = "or move the adapter_* files into a directory of their own"
        raise InputError(f"{shown(directory / ADAPTER_CONFIG)}: {what}; {_MERGE}, {cure}")


def refuse_pointer(path: Path) -> None:
    """InputError for what git leaves in the place of a large file that was not fetched."""
    with open_regular(path) as file:
        text.check_pointer(file.read_at(0, min(file.stamp.size, text.LARGEST_POINTER + 1)), path)


def described(directory: Path) -> str:
    """What a directory without a checkpoint holds, and what to do, as the end of a message."""
    try:
        names = sorted(os.listdir(directory))
    except OSError as e:
        raise StorageError(f"{shown(directory)}: cannot be listed ({e.strerror}); check permissions") from e
    return next(_descriptions(directory, names), "found none of them; fetch the weights or check the path")


def _descriptions(directory: Path, names: list[str]) -> Iterator[str]:
    """All that fits, most telling first."""
    if ADAPTER_CONFIG in names:
        base = _field(directory / ADAPTER_CONFIG, "base_model_name_or_path")
        of = ""
        if isinstance(base, str):
            beside = base == ".." or base.startswith("../")  # as ours name their base
            of = f" of {quoted((directory / base).resolve() if beside else base)}"
        yield f"found a PEFT adapter{of}; {_MERGE}, or name the base to quantize that"
    unfinished = _unfinished(directory, names)
    if unfinished:
        yield f"found a download that has not ended, {listed(unfinished, 3)}; start it again, and it continues"
    if "model_index.json" in names:
        yield f"found a pipeline of diffusers; {_inside(directory, names, 'it is made of models of its own')}"
    if any(name.startswith("diffusion_pytorch_model") for name in names):
        yield "found a model of diffusers, and only those of transformers are quantized; its pipeline may hold others"
    if "modules.json" in names:
        yield f"found a SentenceTransformers folder without weights; {_inside(directory, names, 'fetch the weights')}"
    variants = sorted({m["late"] or m["index"] for m in map(_VARIANT.fullmatch, names) if m})
    if variants:
        yield (
            f"found the variant {listed(variants)} only; load it with from_pretrained(..., "
            f'variant="{quoted(variants[0])}"), and save that with save_pretrained to quantize it'
        )
    if "snapshots" in names and "blobs" in names:
        yield "found the hub's cache of a model; name a directory in its snapshots, or the model by its id"
    if "zero_to_fp32.py" in names or any(n.startswith("global_step") for n in names):
        yield "found a checkpoint of DeepSpeed; join its shards with the zero_to_fp32.py that lies in it"
    if _is_sharded_by_torch(directory, names):
        yield "found shards of torch.distributed (FSDP); join them with `accelerate merge-weights`"
    if any(n.endswith((".safetensors", ".bin")) and re.search(r"-of-\d+", n) for n in names):
        yield "found shards without an index; fetch the index as well"
    for endings, what, cure in _FORMATS:
        if any(n.endswith(endings) for n in names):
            yield f"found {what}; {cure}"
    odd = [n for n in names if n.endswith((".safetensors", ".bin"))]
    if odd:
        yield f"found weights of other names, {listed(odd, 3)}; save the model with save_pretrained"
    inner = _checkpoints(directory, names)
    if inner:
        yield f"found checkpoints below it; name one of them: {listed(inner, 3)}"


def _unfinished(directory: Path, names: list[str]) -> list[str]:
    """Files that are not yet whole: in the directory, or where huggingface_hub keeps them for it."""
    directory = directory.absolute()
    cached = directory.parent.name == "snapshots"
    kept = directory.parents[1] / "blobs" if cached else directory / ".cache" / "huggingface" / "download"
    return [name for name in (*names, *_listing(kept)) if name.endswith(_UNFINISHED)]


def _inside(directory: Path, names: list[str], otherwise: str) -> str:
    inner = _checkpoints(directory, names)
    return f"name one of the models in it: {listed(inner, 3)}" if inner else otherwise


def _checkpoints(directory: Path, names: list[str]) -> list[str]:
    """Folders below ``directory``, down to the second level, that hold a checkpoint of transformers."""
    weights = ("model.safetensors", "pytorch_model.bin")
    found = (*weights, *(f"{name}.index.json" for name in weights))
    places = [*names, *(f"{name}/{inner}" for name in names for inner in _folders(directory / name))]
    return [
        place
        for place in places
        if (directory / place / "config.json").is_file() and any((directory / place / n).exists() for n in found)
    ]


def _listing(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def _folders(directory: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())[:_MOST_FOLDERS]
    except OSError:
        return []


def _is_sharded_by_torch(directory: Path, names: list[str]) -> bool:
    below = (name for name in names if name.startswith(("pytorch_model_fsdp", "distcp", "model_state")))
    return any(n.endswith(".distcp") for n in names) or any(any((directory / n).glob("*.distcp")) for n in below)


def _field(path: Path, key: str) -> Any:
    try:
        return strict_json.load_object(path, special=True).get(key)
    except (InputError, StorageError):
        return None
