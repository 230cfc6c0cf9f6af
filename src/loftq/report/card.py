"""The model card of a LoftQ checkpoint."""

import json
from collections.abc import Iterable
from typing import Any

from loftq.formats.layouts import Layout
from loftq.planning import Plan
from loftq.spec import preset_of
from loftq.spelled import spell_error

LOADERS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForMaskedLM": "AutoModelForMaskedLM",
}


def model_card(
    hub_id: str | None,
    architecture: str,
    layout: Layout,
    plan: Plan,
    summary: dict[str, Any],
    texts: str | None = None,
    licence: dict[str, str] | None = None,
) -> str:
    """README.md of the output directory: what it is, how it was made, how to load it, what it cost.

    Args:
        texts: the name of what it was calibrated on.
        licence: tags of the source's card: ``license``, ``license_name``, ``license_link``.
    """
    loader = next((auto for ending, auto in LOADERS.items() if architecture.endswith(ending)), "AutoModel")
    front = [f"base_model: {hub_id}", "base_model_relation: quantized"] if hub_id else []
    stored = ((m.quant.bits, m.quant.code, m.rank) for m in plan.matrices)
    widths, codes, ranks = (_each(values) for values in zip(*stored, strict=True))
    details = sorted({m.quant.detail for m in plan.matrices})
    detail = ", ".join(
        f"{name.removesuffix('_size')} {_each(n for what, n in details if what == name)}" for name in dict(details)
    )
    better = 1 - summary["error"] / summary["qlora_error"] if summary["qlora_error"] else 0.0
    start, alone = spell_error(summary["error"]), spell_error(summary["qlora_error"])
    outputs = []
    if "output_error" in summary:
        judged = spell_error(summary["output_error"]), spell_error(summary["qlora_output_error"])
        outputs = ["| relative output error on held-out tokens | {}, quantized alone {} |".format(*judged)]
    return "\n".join(
        [
            "---",
            "library_name: peft",
            *front,
            *_tags(licence or {}),
            "tags: [loftq, lora, quantization]",
            "---",
            f"# {hub_id or architecture} in {widths} bits, with a LoftQ initialization",
            "",
            f"A frozen {widths}-bit backbone ({codes}, {detail}) and a LoftQ "
            f"initialization for LoRA (rank {ranks}, alpha {plan.lora_alpha:g}), made by [LoftQ](https://arxiv.org/abs/2310.08659).",
            "",
            "```python",
            f"{layout.imports}from peft import PeftModel",
            f"from transformers import {loader}",
            "",
            'directory = "."  # this one, from inside it; elsewhere its path, or its id on the hub',
            f"model = {loader}.from_pretrained(directory)",
            'model = PeftModel.from_pretrained(model, directory, subfolder="loftq_init", is_trainable=True)',
            "```",
            "",
            "| | |",
            "|---|---|",
            f"| read with | {', '.join(('transformers', 'peft', *layout.packages))} |",
            f"| initialization | {preset_of(plan.solve)}{f', calibrated on {texts}' if texts else ''} |",
            f"| quantized matrices | {summary['matrices']} |",
            f"| stored bits per quantized weight | {summary['bits_per_weight']:.3f} |",
            f"| compression of everything on disk against 16 bits | {summary['compression']:.2f}x |",
            f"| trainable share | {summary['trainable_share']:.2%} |",
            f"| relative weight error, with the initialization | {start} |",
            f"| relative weight error, quantized alone | {alone} ({better:.0%} removed) |",
            *outputs,
            "",
        ]
    )


def _each(values: Iterable[Any]) -> str:
    """The values that there are: ``2/4``."""
    return "/".join(map(str, sorted(set(values))))


def merged_card(manifest: dict[str, Any], identity: dict[str, Any], licence: dict[str, str]) -> str:
    """README.md of a merged checkpoint: what it was made of, by their hashes.

    Args:
        manifest: of the quantized base.
        identity: of the merge.
        licence: as :func:`model_card` takes it.
    """
    return _of_both(
        ["library_name: transformers", *_tags(licence), "tags: [loftq, lora, merged]"],
        [
            "# A quantized model with its adapter merged",
            "",
            "The weights are the dequantized ones of a LoftQ checkpoint plus the product of a LoRA adapter. They are",
            "dense, and need no package but transformers.",
        ],
        {"dtype": identity["options"]["dtype"], **_origin(manifest, identity)},
    )


_EXACT = "The weights are exactly those of a LoftQ checkpoint. The adapter, in a file of its own, was trained on them."
_ADDED = "It is the difference between a trained adapter and its LoftQ initialization, for the original model."
_APART = "It is exactly the adapter that was trained on stacks of experts. Its base are the dequantized weights."
ADAPTERS = {  # exports that are no models
    "lora-for-original": ("# An adapter of the original model", "", _ADDED),
    "per-expert": ("# An adapter with separate LoRA factors for every expert", "", _APART),
}


def exported_card(
    manifest: dict[str, Any], identity: dict[str, Any], commands: list[str], licence: dict[str, str]
) -> str:
    """README.md of what was exported: how to run it, and what it was made of.

    Args:
        commands: that run it from inside the directory.
        manifest, identity, licence: as :func:`merged_card` takes them.
    """
    to = identity["options"]["to"]
    return _of_both(
        [*_tags(licence), f"tags: [loftq, lora, {to}]"],
        [
            *ADAPTERS.get(to, (f"# A quantized model in {to}", "", _EXACT)),
            "",
            "```",
            *commands,
            "```",
        ],
        _origin(manifest, identity),
    )


def _tags(licence: dict[str, str]) -> list[str]:
    return [f"{key}: {json.dumps(value)}" for key, value in licence.items()]


def _origin(manifest: dict[str, Any], identity: dict[str, Any]) -> dict[str, str]:
    options, adapter = manifest["identity"]["options"], identity["adapter"] or {}
    return {
        "base": f"{options['bits']} bits, format {options['format']}; manifest sha256 {identity['base']}",
        **{f"adapter, {name}": f"sha256 {digest}" for name, digest in adapter.items()},
        **({} if adapter else {"adapter": "none: the quantized weights alone"}),
        "relative weight error of the base with its initialization": spell_error(manifest["totals"]["error"]),
        "made with": f"loftq {identity['loftq']}",
    }


def _of_both(front: list[str], body: list[str], rows: dict[str, str]) -> str:
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(["---", *front, "---", *body, "", *table, ""])
