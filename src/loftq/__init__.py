"""LoftQ: LoRA-fine-tuning-aware quantization (arXiv 2310.08659).

``import loftq`` makes ``from_pretrained`` understand LoftQ checkpoints. It is quick: transformers and PEFT are not
imported here, our parts are registered with them when they are.
"""

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
    from loftq.verbs import compare, evaluate, inspect, merge, plan, start, train, verify

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
    "loftq.verbs": ["compare", "evaluate", "inspect", "merge", "plan", "start", "train", "verify"],
}
_HOMES = {name: module for module, names in _PUBLIC.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loftq' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_quantizer(_: Any) -> None:
    import loftq.nn.hf  # noqa: F401


def _extend_models(modeling: Any) -> None:
    from loftq.nn.counts import count_weights
    from loftq.nn.dense import resize_dense_tables
    from loftq.nn.hf import pack_from_config

    count_weights(modeling)
    resize_dense_tables(modeling)
    pack_from_config(modeling)


def _install_lora_layers(_: Any) -> None:
    from loftq.adapters.peft import install

    install()


def _extend_trained_modules(other: Any) -> None:
    from loftq.nn.dense import train_dense_copies

    train_dense_copies(other)


def _extend_trained_tokens(layer: Any) -> None:
    from loftq.nn.dense import train_tokens_of_dense_tables

    train_tokens_of_dense_tables(layer)


def _extend_peft_models(peft_model: Any) -> None:
    from loftq.adapters.initialization import warn_of_unused_starts
    from loftq.adapters.origins import warn_on_loading
    from loftq.adapters.placement import check_loading
    from loftq.nn.counts import count_weights_under

    count_weights_under(peft_model.PeftModel)
    warn_of_unused_starts(peft_model.PeftModel)
    check_loading(peft_model.PeftModel)
    warn_on_loading(peft_model.PeftModel)


def _extend_mixed_models(mixed_model: Any) -> None:
    from loftq.nn.counts import count_weights_under

    count_weights_under(mixed_model.PeftMixedModel)


def _keep_real_targets(conversion: Any) -> None:
    from loftq.adapters.placement import keep_real_targets

    keep_real_targets(conversion)


def _read_relative_bases(module: Any) -> None:
    from loftq.adapters import bases, origins

    if module.__name__ == "peft.config":
        bases.read_config(module.PeftConfigMixin)
        bases.write_config(module.PeftConfigMixin)
        origins.write_with_config(module.PeftConfigMixin)
    elif module.__name__ == "peft.auto":
        bases.load_from_subfolder(module._BaseAutoPeftModel)
    else:
        module.find_adapter_config_file = bases.find_config(module.find_adapter_config_file)
        if module.__name__ == "transformers.integrations.peft":
            origins.warn_on_loading(module.PeftAdapterMixin)


wrapt.register_post_import_hook(_register_quantizer, "transformers.quantizers.auto")
wrapt.register_post_import_hook(_install_lora_layers, "peft.tuners.lora.model")
wrapt.register_post_import_hook(_keep_real_targets, "peft.utils.transformers_weight_conversion")
wrapt.register_post_import_hook(_extend_models, "transformers.modeling_utils")
wrapt.register_post_import_hook(_extend_peft_models, "peft.peft_model")
wrapt.register_post_import_hook(_extend_mixed_models, "peft.mixed_model")
wrapt.register_post_import_hook(_extend_trained_modules, "peft.utils.other")
wrapt.register_post_import_hook(_extend_trained_tokens, "peft.tuners.trainable_tokens.layer")
for _module in (
    *("peft.config", "peft.auto", "transformers.utils.peft_utils", "transformers.integrations.peft"),
    *("transformers.models.auto.auto_factory", "transformers.pipelines"),
):
    wrapt.register_post_import_hook(_read_relative_bases, _module)
