"""Which models the software of ``--serve`` computes as transformers does, by their classes and configurations.

Said here once: a plan refuses by it before any weight is read, and an export before it writes.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from loftq.architecture.conversion import as_published
from loftq.architecture.experts import layers_of
from loftq.architecture.skeleton import parameter_of
from loftq.errors import InputError, listed, option, quoted
from loftq.planning import Made, Matrix
from loftq.spec import QuantSpec

# Classes of transformers that are written here -> architecture of llama.cpp. mlx-lm has the same modules.
FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GemmaForCausalLM": "gemma",
    "Phi3ForCausalLM": "phi3",
    "MixtralForCausalLM": "llama",
    "Qwen2MoeForCausalLM": "qwen2moe",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "OlmoeForCausalLM": "olmoe",
}
# What llama.cpp computes whatever the file says: another value is another model, or does not load.
LLAMA_CPP_FIXED: dict[str, dict[str, Any]] = {
    "gemma": {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    "qwen2moe": {"norm_topk_prob": False, "tie_word_embeddings": False},
    "qwen3moe": {"norm_topk_prob": True},
    "olmoe": {"norm_topk_prob": False, "tie_word_embeddings": False, "clip_qkv": None},
}
ROPE = ("default", "linear", "yarn", "llama3")  # whose constants are written here
MLX_MLP = {"MixtralForCausalLM": "block_sparse_moe"}  # what mlx-lm calls ``mlp``, where it has another name
# What mlx-lm takes for granted, whatever the configuration says.
MLX_FIXED: dict[str, dict[str, Any]] = {
    "Qwen2MoeForCausalLM": {
        "hidden_act": "silu",
        "use_sliding_window": False,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": True,
        "tie_word_embeddings": False,
    },
    "Qwen3MoeForCausalLM": {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
    "OlmoeForCausalLM": {"hidden_act": "silu", "clip_qkv": None},
    "MixtralForCausalLM": {"hidden_act": "silu", "sliding_window": None},
}
READ = "transformers reads its weight while it loads, before compressed-tensors has unpacked it"
LAYER = re.compile(r"(?:.*\.layers|blk)\.(\d+)\.(.+)")


def check_model(software: str, model: Any) -> None:
    """InputError for a model that no file for ``software``, a value of ``--serve``, can be right for.

    Args:
        model: of transformers; may be on the meta device.
    """
    if software in _CHECKS:
        _CHECKS[software](model)


def needs_converter(model: Any) -> str:
    """Why llama.cpp's own script has to write the GGUF file of a model, and how; empty if it need not."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    if (architecture := type(model).__name__) not in FAMILIES:
        why = f"GGUF is written here only for {listed(FAMILIES)}"
    elif (kind := rope.get("rope_type", "default")) not in ROPE:
        why = f"rope_type {quoted(kind)} is not written here"
    else:
        return ""
    script = f"llama.cpp's convert_hf_to_gguf.py with {option('converter', 'PATH')}"
    return f"{architecture}: {why}; give `loftq export` {script}"


def _llama_cpp(model: Any) -> None:
    """Nothing is known here of other classes, which llama.cpp's script may convert."""
    config, architecture = model.config, type(model).__name__
    name = FAMILIES.get(architecture)
    if name is None:
        return
    fixed = {"hidden_act": "silu", **LLAMA_CPP_FIXED.get(name, {})}
    heads = config.num_attention_heads
    if name != "llama":
        fixed["attention_bias"] = False
    if name in ("qwen2", "qwen2moe", "phi3", "olmoe"):
        fixed["head_dim"] = config.hidden_size // heads
    if name == "olmoe":  # whose norm of keys is as wide as that of queries
        fixed["num_key_value_heads"] = heads
    for key, wanted in fixed.items():
        if (given := getattr(config, key, wanted)) not in (wanted, None):
            raise InputError(
                f"{architecture}: config.json has {key} {quoted(given)}; llama.cpp's {name} computes with "
                f"{quoted(wanted)} always, so that it would be another model; "
                f"{_instead('gguf', 'and use another runtime')}"
            )
    refuse_uneven(name, (parameter for parameter, _ in model.named_parameters()))


def refuse_uneven(name: str, tensors: Iterable[str]) -> None:
    """InputError if some layer has other tensors than the first, as where experts are in a part of the layers.

    Args:
        name: of the architecture in llama.cpp.
        tensors: their names, by transformers or by GGUF.
    """
    layers: dict[str, set[str]] = {}
    for tensor in tensors:
        if found := LAYER.fullmatch(tensor):
            layers.setdefault(found[1], set()).add(found[2])
    for number, held in layers.items():
        if odd := held ^ layers["0"]:
            raise InputError(
                f"layers 0 and {number}: one of them lacks {listed(sorted(odd), 3)}; llama.cpp's {name} has "
                f"layers of one kind only; {_instead('gguf', 'and use another runtime')}"
            )


def _mlx_lm(model: Any) -> None:
    architecture = type(model).__name__
    if architecture not in FAMILIES:
        raise InputError(
            f"{architecture}: the export to MLX supports only {listed(FAMILIES)}; "
            f"{_instead('mlx', 'merge that, and convert the result with mlx_lm.convert')}"
        )
    for key, value in MLX_FIXED.get(architecture, {}).items():
        if (found := getattr(model.config, key, value)) != value:
            raise InputError(
                f"config.json: {key} is {quoted(repr(found))}, and mlx-lm computes {architecture} only with "
                f"{value!r}; {_instead('mlx', 'merge that, and run the result with other software')}"
            )


def _onnx(model: Any) -> None:
    if model.main_input_name != "input_ids" or model.config.is_encoder_decoder:
        raise InputError(
            f"{type(model).__name__}: the export to ONNX supports only text encoders and decoders; "
            f"{_instead('onnx', 'merge that, and export the result with transformers.exporters')}"
        )


_CHECKS: dict[str, Callable[[Any], None]] = {"gguf": _llama_cpp, "mlx": _mlx_lm, "onnx": _onnx}


def _instead(software: str, then: str) -> str:
    return f"quantize without {option('serve', software)}, {then}"


def check_stacks(software: str, stacks: Mapping[str, QuantSpec | None]) -> None:
    """InputError for stacks of experts that the software has no mixture of.

    Args:
        stacks: all of a model: name -> how it is quantized; None if it is dense.
    """
    dense = [name for name, quant in stacks.items() if quant is None]
    if software == "mlx" and dense:
        raise InputError(
            f"{listed(dense, 3)}: dense, and stacks are written that are quantized; quantize them too, with "
            f"{option('bits')} and a {option('block_size')} that divides their rows, or "
            f"{_instead('mlx', 'merge that, and convert the result with mlx_lm.convert')}"
        )
    if software == "compressed-tensors" and len(set(stacks.values())) > 1:
        raise InputError(
            f"{listed(stacks, 3)}: experts of several widths or blocks, or dense in part; transformers and vLLM have "
            f"one for all: give them the same {option('bits')} and {option('block_size')}"
        )


def loads_dense(software: str, model: Any, layers: Iterable[str]) -> set[str]:
    """Those of the Linear ``layers`` that transformers loads dense only: its ``_init_weights`` reads their weights.

    The package compressed-tensors takes ``weight`` away before that runs; so it is tried without.
    """
    known: dict[tuple[Any, ...], bool] = {}
    found = set()
    for name in layers if software == "compressed-tensors" else ():
        stems = name.split(".")
        above = [model.get_submodule(".".join(stems[:i])) for i in range(len(stems) + 1)]
        key = *map(type, above), stems[-1]  # the same in every block
        if key not in known:
            known[key] = _is_read(above)
        if known[key]:
            found.add(name)
    return found


def _is_read(above: list[Any]) -> bool:
    """Whether the initialization of a layer, the last, or of a module above it fails without the layer's weight."""
    layer, owner, held = above[-1], above[0], above[-1]._parameters
    layer._parameters = {name: parameter for name, parameter in held.items() if name != "weight"}
    try:
        for module in above:
            owner = module if hasattr(module, "_init_weights") else owner
            try:
                with torch.no_grad():
                    owner._init_weights(module)
            except Exception as e:  # others are of something else that a model without weights lacks
                if isinstance(e, AttributeError) and "'weight'" in str(e):
                    return True
        return False
    finally:
        layer._parameters = held


def check_experts(
    software: str, model: Any, matrices: Iterable[Matrix], published: Mapping[str, Made] | None = None
) -> None:
    """InputError for a stack of experts that compressed-tensors has no layers for.

    Args:
        published: the second result of :func:`loftq.architecture.conversion.as_published`; None: ask it.
    """
    for stack in (m for m in matrices if m.experts) if software == "compressed-tensors" else ():
        published = as_published(model)[1] if published is None else published
        name = parameter_of(stack)
        made = stack.made if stack.sources else published.get(name, ())
        module = model.get_submodule(name.rpartition(".")[0])
        if not made or not layers_of(name, made, stack.experts, stack.shape[0], module):
            raise InputError(
                f"{quoted(stack.name)}: the family's files have no layer for each expert, by which vLLM and "
                f"transformers read them; leave them dense with {option('bits', 'experts=16,4')}, or merge"
            )
