"""Parts of a packed model that are loaded or saved on their own, and models that are put together of packed ones."""

from typing import Any

from loftq.patching import patches


def tell_parts(configurations: Any) -> None:
    """Let the configuration of a part say that the model is packed. transformers reads nothing else of the file.

    Args:
        configurations: the module ``transformers.configuration_utils``.
    """

    @patches(configurations.PreTrainedConfig, "get_config_dict")
    def get_config_dict(read: Any, cls: Any, *args: Any, **kwargs: Any) -> Any:
        values, rest = read(cls, *args, **kwargs)
        packed, own = values.get("quantization_config"), values.get("model_type")
        if _is_of_loftq(packed) and own != cls.model_type:
            inner = {"quantization_config": packed}
            values = {key: {**inner, **part} if _is(key, part, cls) else part for key, part in values.items()}
        return values, rest


def _is_of_loftq(given: Any) -> bool:
    values = given if isinstance(given, dict) else getattr(given, "__dict__", {})
    return values.get("quant_method") == "loftq"


def _is(key: str, part: Any, cls: Any) -> bool:
    """Whether transformers takes ``part`` for the configuration ``cls``: by its place in the file, or by its type."""
    typed = isinstance(part, dict) and bool(cls.model_type) and part.get("model_type") == cls.model_type
    return isinstance(part, dict) and (typed or key == cls.base_config_key)


def tell_saved(modeling: Any) -> None:
    """Let ``save_pretrained`` say which layers are packed where the model's configuration is silent, or wrong.

    A part has a configuration of its own, and so has a model of packed parts, such as ``EncoderDecoderModel``. A class
    that is called with the configuration of a packed model gives a dense one.

    Args:
        modeling: the module ``transformers.modeling_utils``.
    """
    from loftq.nn.hf import mark_quantized  # which needs transformers whole, and not only its configurations
    from loftq.nn.layers import Packed

    @patches(modeling.PreTrainedModel, "save_pretrained")
    def save_pretrained(save: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        packed = [module for module in self.modules() if isinstance(module, Packed)]
        told = getattr(self.config, "quantization_config", None)
        if not packed and _is_of_loftq(told):
            del self.config.quantization_config
            try:
                return save(self, *args, **kwargs)
            finally:
                self.config.quantization_config = told
        if not packed or getattr(self, "hf_quantizer", None) or told:
            return save(self, *args, **kwargs)
        used = getattr(self, "_weight_conversions", None)
        mark_quantized(self, next(packed[-1].matrices())[1].bits)
        try:
            return save(self, *args, **kwargs)
        finally:
            self.hf_quantizer.remove_quantization_config(self)
            self._weight_conversions = used
