"""Tiny random models of every family, and the dense model that a LoftQ checkpoint stands for.

Sizes are odd on purpose: rows of 72 weights end in a short block of 8, rows of 40 are shorter than a block.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

import loftq
from loftq.formats.config import read_groups
from loftq.nn.layers import PackedWeight
from loftq.numerics import decode

HIDDEN, INNER, VOCAB, LENGTH = 72, 40, 101, 7
BERT = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DEBERTA = {
    **BERT,
    "relative_attention": True,
    "share_att_key": True,
    "position_buckets": 8,
    "max_relative_positions": -1,
    "pos_att_type": "p2c|c2p",
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
BART = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "max_position_embeddings": 40,
    "dropout": 0.0,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "d_kv": 16,
    "d_ff": INNER,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
OPT = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "ffn_dim": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "dropout": 0.0,
    "word_embed_proj_dim": HIDDEN,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 40,
    "n_inner": INNER,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts_per_tok": 2, "head_dim": 16}
ROUTED = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "moe_intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 64,
}
DEEPSEEK = {
    **ROUTED,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
NEMOTRON = {
    **ROUTED,
    "layers_block_type": ["attention", "moe"],
    "num_key_value_heads": 2,
    "head_dim": 16,
    "moe_shared_expert_intermediate_size": INNER,
}


@dataclass(frozen=True)
class Family:
    """How to make a tiny model, and what to expect of it.

    Attributes:
        matrices: number of matrices a plain run quantizes.
        tied: the output head is the input embedding.
        table: name of the word embedding, if it can be quantized.
    """

    architecture: str
    config: str
    options: dict[str, Any]
    matrices: int
    auto: str = "AutoModelForCausalLM"
    tied: bool = False
    table: str = ""

    @property
    def model_class(self) -> Any:
        return getattr(transformers, self.architecture)

    @property
    def auto_class(self) -> Any:
        return getattr(transformers, self.auto)


_CLASSIFY = "AutoModelForSequenceClassification"
_SEQ2SEQ = "AutoModelForSeq2SeqLM"
FAMILIES = {
    "bert": Family("BertModel", "BertConfig", BERT, 12, "AutoModel", table="embeddings.word_embeddings"),
    "bert-mlm": Family("BertForMaskedLM", "BertConfig", BERT, 12, "AutoModelForMaskedLM", tied=True),
    "roberta": Family(
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**BERT, "num_labels": 3},
        12,
        _CLASSIFY,
        table="roberta.embeddings.word_embeddings",
    ),
    "deberta-v3": Family(
        "DebertaV2Model", "DebertaV2Config", DEBERTA, 12, "AutoModel", table="embeddings.word_embeddings"
    ),
    "bart": Family("BartForConditionalGeneration", "BartConfig", BART, 32, _SEQ2SEQ, tied=True),
    "t5": Family("T5ForConditionalGeneration", "T5Config", T5, 32, _SEQ2SEQ, tied=True),
    "flan-t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        36,
        _SEQ2SEQ,
    ),
    "opt": Family("OPTForCausalLM", "OPTConfig", OPT, 12, tied=True),
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", GPT2, 8, tied=True),
    "llama": Family("LlamaForCausalLM", "LlamaConfig", LLAMA, 14, table="model.embed_tokens"),
    "llama-deep": Family("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "num_hidden_layers": 4}, 28),
    "llama-flat": Family("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "num_hidden_layers": 1}, 7),
    "mistral": Family("MistralForCausalLM", "MistralConfig", {**LLAMA, "sliding_window": 4}, 14),
    "qwen3": Family(
        "Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "head_dim": 16, "tie_word_embeddings": True}, 14, tied=True
    ),
    "phi": Family("PhiForCausalLM", "PhiConfig", {**LLAMA, "num_attention_heads": 6, "num_key_value_heads": 6}, 12),
    "phi3": Family("Phi3ForCausalLM", "Phi3Config", {**LLAMA, "eos_token_id": 1, "bos_token_id": 2}, 8),
    "gemma": Family("GemmaForCausalLM", "GemmaConfig", {**LLAMA, "head_dim": 16}, 14, tied=True),
    "gemma-untied": Family(
        "GemmaForCausalLM", "GemmaConfig", {**LLAMA, "head_dim": 16, "tie_word_embeddings": False}, 14
    ),
    "mixtral": Family("MixtralForCausalLM", "MixtralConfig", {**LLAMA, **MOE, "num_local_experts": 4}, 12),
    "qwen3-moe": Family(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**LLAMA, **MOE, "num_experts": 4, "moe_intermediate_size": INNER},
        12,
    ),
    "gpt-oss": Family(
        "GptOssForCausalLM",
        "GptOssConfig",
        {**LLAMA, **MOE, "num_local_experts": 4, "layer_types": ["full_attention"] * 2, "rope_parameters": None},
        12,
    ),
    "granite-moe": Family(
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        {**LLAMA, "num_experts_per_tok": 2, "num_local_experts": 4},
        12,
    ),
    "deepseek-v3": Family("DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK, 18),
    "nemotron-h": Family("NemotronHForCausalLM", "NemotronHConfig", NEMOTRON, 8),
    "llama4": Family(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**LLAMA, **MOE, "num_local_experts": 4, "intermediate_size_mlp": INNER, "interleave_moe_layer_step": 1},
        18,
    ),
    "jetmoe": Family(
        "JetMoeForCausalLM",
        "JetMoeConfig",
        {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16, "aux_loss_coef": 0.0},
        10,
    ),
}
# One tensor for each expert in the files; likewise; fused and renamed; transposed, interleaved, with biases; without
# gates; of a class without a mark; beside shared experts and dense layers; of a class without a mark.
MIXTURES = ["mixtral", "qwen3-moe", "granite-moe", "gpt-oss", "nemotron-h", "llama4", "deepseek-v3", "jetmoe"]
SPECIAL = ["llama-deep", "llama-flat", "gemma-untied"]
DENSE = [name for name in FAMILIES if name not in (*MIXTURES, *SPECIAL)]


def tiny(name: str, seed: int = 0) -> Any:
    """A random model in eval mode; biases and norms are not left at zero and one."""
    family = FAMILIES[name]
    torch.manual_seed(seed)
    model = family.model_class(getattr(transformers, family.config)(**family.options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def quantize(source: Path, output: Path, **options: Any) -> dict[str, Any]:
    """``loftq.quantize`` at 2 bits and rank 4, in one thread, unless told otherwise; nothing else is rounded."""
    exact = {"dtype": "source", "adapter_dtype": "float32"}
    return loftq.quantize(source, output, **{"bits": 2, "rank": 4, "workers": 1, **exact, **options})


@dataclass(frozen=True)
class Made:
    """A tiny model, saved and quantized. ``dense`` and the directories are shared between tests: leave them alone."""

    family: Family
    dense: Any
    source: Path
    output: Path
    manifest: dict[str, Any]

    def load(self, cls: Any = None, **options: Any) -> Any:
        """The packed model."""
        return (cls or self.family.auto_class).from_pretrained(self.output, **options)

    def start(self, model: Any = None, **options: Any) -> PeftModel:
        """The packed model with its LoftQ initialization, trainable."""
        model = self.load() if model is None else model
        return PeftModel.from_pretrained(model, self.output, subfolder="loftq_init", is_trainable=True, **options)

    def backbone(self) -> Any:
        """The dense model with the dequantized weights."""
        return substituted(self.dense, {module: q for module, (q, _) in written(self.output).items()})

    def started(self) -> Any:
        """The dense model with ``Q + s * B @ A``."""
        return substituted(self.dense, {module: q + ba for module, (q, ba) in written(self.output).items()})


_made: dict[tuple, Made] = {}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """``made("llama", bits=3)``: a checkpoint, made once per session for the same options."""

    def make(name: str, **options: Any) -> Made:
        key = (name, *sorted(options.items()))
        if key not in _made:
            directory = tmp_path_factory.mktemp(name)
            dense = tiny(name)
            dense.save_pretrained(directory / "dense")
            manifest = quantize(directory / "dense", directory / "quantized", **options)
            _made[key] = Made(FAMILIES[name], dense, directory / "dense", directory / "quantized", manifest)
        return _made[key]

    return make


def inputs(model: Any, batch: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """Token ids that every family takes; none is padding, the last one ends the sentence."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch, LENGTH), generator=generator)
    ids[:, -1] = 2
    both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**both, "decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else both


def outputs(model: Any, **more: Tensor) -> Tensor:
    """Logits, or the last hidden state of a model without a head."""
    result = model(**inputs(model), **more)
    return result.logits if "logits" in result else result.last_hidden_state


def tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint directory."""
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def written(directory: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """module -> (dequantized Q, s * B @ A), both ``(out, in)``, from the files of a LoftQ checkpoint alone."""
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    adapter_config = json.loads((directory / "loftq_init" / "adapter_config.json").read_text())
    stored, factors = tensors(directory), tensors(directory / "loftq_init")
    plan = json.loads((directory / "loftq_manifest.json").read_text())["plan"]
    names = {m["module"]: m["name"] for m in plan["matrices"]}  # in the files, where transformers renames them
    hidden = {m["module"] for m in plan["matrices"] if m["kind"] == "experts-reversed"}
    result = {}
    for group in read_groups(config):
        for module in group.modules:
            stem = names.get(module, f"{module}.weight").removesuffix("weight")
            mine = {n.removeprefix(stem): t for n, t in stored.items() if n.startswith(f"{stem}weight")}
            root = f"base_model.model.{module}"
            if f"{root}.lora_embedding_A" in factors:
                product = (factors[f"{root}.lora_embedding_B"] @ factors[f"{root}.lora_embedding_A"]).T
                rank = factors[f"{root}.lora_embedding_A"].shape[0]
            else:
                product = factors[f"{root}.lora_B.weight"] @ factors[f"{root}.lora_A.weight"]
                rank = factors[f"{root}.lora_A.weight"].shape[0]
            alpha, rslora = adapter_config["lora_alpha"], adapter_config["use_rslora"]
            product = product * (alpha / (rank**0.5 if rslora else rank))
            result[module] = decode(mine, group.quant, product.shape[1]), product
        for stack in group.parameters:
            last = f"{stack.rpartition('.')[0]}.down_proj"
            inside = stack != last and any(last in g.parameters for g in read_groups(config))
            parts = {n.removeprefix(names[stack]): t for n, t in stored.items() if n.startswith(names[stack])}
            result[stack] = _stack(stack, inside, group.quant, parts, factors, adapter_config, stack in hidden)
    return result


def _stack(name: str, inside: bool, quant: Any, parts: dict, factors: dict, config: Any, is_reversed: bool) -> tuple:
    """Q and s·BA of all experts, ``(experts, out, in)``, of what is stored by suffix.

    PEFT's layer on the last stack lies outside the other's. Of a reversed stack it has ``(s·BA).T``.
    """
    root = f"base_model.model.{name.rpartition('.')[0]}{'.base_layer' if inside else ''}"
    a, b, count = factors[f"{root}.lora_A.weight"], factors[f"{root}.lora_B.weight"], len(parts[""])
    rank, alpha = len(a) // count, config["lora_alpha"]
    s = alpha / (rank**0.5 if config["use_rslora"] else rank)
    a, b = a.view(count, rank, -1), b.view(len(b), rank, count)
    product = torch.stack([s * b[:, :, e] @ a[e] for e in range(count)])
    one = [{f"weight{part}": t[e] for part, t in parts.items() if not part.endswith("_bias")} for e in range(count)]
    product = product.transpose(1, 2) if is_reversed else product
    return torch.stack([decode(tensors, quant, product.shape[2]) for tensors in one]), product


def substituted(dense: Any, values: dict[str, Tensor]) -> Any:
    """A copy of ``dense`` with other weights, each ``(out, in)``, in the named modules."""
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for module, value in values.items():
            owner, _, leaf = module.rpartition(".")
            parent: Any = model.get_submodule(owner)
            if leaf in parent._parameters:
                turned = getattr(parent, "is_transposed", isinstance(parent, Llama4TextExperts))
                parent._parameters[leaf].copy_(value.transpose(1, 2) if turned else value)
                continue
            target = model.get_submodule(module)
            transposed = not isinstance(target, (nn.Linear, nn.Embedding))
            target.weight.copy_(value.T if transposed else value)
    return model


def packed(model: nn.Module) -> dict[str, PackedWeight]:
    """The packed layers by name; an adapter around them does not change the names."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, PackedWeight)
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal in names, dtypes, shapes and bits."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a
    )


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether ``a`` differs from ``b`` by at most ``tolerance`` of the largest value of ``b``."""
    return a.shape == b.shape and bool(((a - b).abs().max() <= tolerance * b.abs().max()).item())
