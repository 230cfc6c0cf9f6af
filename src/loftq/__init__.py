"""LoftQ: LoRA-fine-tuning-aware quantization (arXiv 2310.08659).

``import loftq`` makes ``from_pretrained`` understand LoftQ checkpoints. It is quick: transformers and PEFT are not
imported here, our parts are registered with them when they are.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

import wrapt

from loftq.version import __version__ as __version__

__all__ = [
    "Code",
    "Entry",
    "Layout",
    "Moments",
    "Plan",
    "Policy",
    "QuantSpec",
    "Report",
    "Solution",
    "SolveSpec",
    "Statistics",
    "calibrate",
    "compare",
    "dequantize",
    "evaluate",
    "export",
    "generate",
    "get_peft_model",
    "inspect",
    "load_start",
    "merge",
    "plan",
    "quantize",
    "quantize_weight",
    "register_code",
    "register_format",
    "register_preset",
    "replace_lora_weights",
    "solve",
    "start",
    "status",
    "train",
    "verify",
]

if TYPE_CHECKING:
    from loftq.adapters.start import load_start
    from loftq.api import calibrate, get_peft_model, quantize, quantize_weight, replace_lora_weights
    from loftq.codes import Code, register_code
    from loftq.formats.layouts import Layout, register_format
    from loftq.formats.statistics import Statistics
    from loftq.formats.tensorfile import Entry
    from loftq.numerics import Moments, dequantize
    from loftq.planning import Plan, Policy
    from loftq.report.report import Report
    from loftq.solver import Solution, solve
    from loftq.spec import QuantSpec, SolveSpec, register_preset
    from loftq.verbs import compare, evaluate, export, generate, inspect, merge, plan, start, status, train, verify

# module -> the public names that lie in it
_PUBLIC = {
    "loftq.adapters.start": ["load_start"],
    "loftq.api": ["calibrate", "get_peft_model", "quantize", "quantize_weight", "replace_lora_weights"],
    "loftq.codes": ["Code", "register_code"],
    "loftq.formats.layouts": ["Layout", "register_format"],
    "loftq.formats.statistics": ["Statistics"],
    "loftq.formats.tensorfile": ["Entry"],
    "loftq.numerics": ["Moments", "dequantize"],
    "loftq.planning": ["Plan", "Policy"],
    "loftq.report.report": ["Report"],
    "loftq.solver": ["Solution", "solve"],
    "loftq.spec": ["QuantSpec", "SolveSpec", "register_preset"],
    "loftq.verbs": [
        "compare",
        "evaluate",
        "export",
        "generate",
        "inspect",
        "merge",
        "plan",
        "start",
        "status",
        "train",
        "verify",
    ],
}
_HOMES = {name: module for module, names in _PUBLIC.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loftq' has no attribute {name!r}")
    # PEFT imports bitsandbytes, which warns of a kernel for CPUs that packed layers do not use.
    advice = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = advice.level
    advice.setLevel(max(level, logging.ERROR))
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    finally:
        advice.setLevel(level)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Module of others -> functions of ours that extend it for packed layers, given the module.
_EXTENSIONS = {
    "torch.optim.swa_utils": ["loftq.nn.averages:keep_codes"],
    "accelerate.utils.modeling": ["loftq.nn.accelerated:keep_dtypes"],
    "accelerate.big_modeling": ["loftq.nn.accelerated:keep_dtypes"],
    "transformers.configuration_utils": ["loftq.nn.parts:tell_parts"],
    "transformers.modeling_utils": [
        "loftq.nn.counts:count_weights",
        "loftq.nn.dense:resize_dense_tables",
        "loftq.nn.hf:pack_from_config",
        "loftq.nn.hf:save_by_names_that_are_read",
        "loftq.nn.hf:unpack_what_is_tied",
        "loftq.nn.parts:tell_saved",
    ],
    "peft.tuners.lora.model": ["loftq.adapters.peft:install"],
    "peft.tuners.trainable_tokens.layer": ["loftq.nn.dense:train_tokens_of_dense_tables"],
    "peft.utils.other": ["loftq.nn.dense:train_dense_copies"],
    "peft.utils.transformers_weight_conversion": ["loftq.adapters.placement:keep_real_targets"],
    "peft.peft_model": [
        "loftq.nn.counts:count_weights_under",
        "loftq.adapters.initialization:warn_of_unused_starts",
        "loftq.adapters.placement:check_loading",
        "loftq.adapters.origins:warn_on_loading",
    ],
    "sentence_transformers.base.model": ["loftq.nn.sentences:tell_dtype"],
    "sentence_transformers.base.modules.transformer": ["loftq.nn.sentences:give_dense_first"],
    "peft.mixed_model": [
        "loftq.nn.counts:count_weights_under",
        "loftq.adapters.initialization:take_in_mixed_models",
        "loftq.adapters.placement:load_in_mixed_models",
    ],
    "peft.config": [
        "loftq.adapters.bases:read_config",
        "loftq.adapters.bases:write_config",
        "loftq.adapters.origins:write_with_config",
    ],
    "peft.auto": ["loftq.adapters.origins:refuse_lost_base", "loftq.adapters.bases:load_from_subfolder"],
    "transformers.utils.peft_utils": ["loftq.adapters.bases:find_config"],
    "transformers.integrations.peft": [
        "loftq.adapters.bases:find_config",
        "loftq.adapters.placement:check_loading_into",
        "loftq.adapters.origins:warn_on_loading",
    ],
    "transformers.models.auto.auto_factory": ["loftq.adapters.bases:find_config"],
    "transformers.pipelines": ["loftq.adapters.bases:find_config"],
}
# its decorators register the quantizer
wrapt.register_post_import_hook(lambda _: importlib.import_module("loftq.nn.hf"), "transformers.quantizers.auto")
for _module, _functions in _EXTENSIONS.items():
    for _function in _functions:
        wrapt.register_post_import_hook(_function, _module)
