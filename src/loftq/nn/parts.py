"""Parts of a packed model that are loaded on their own, such as the text encoder of CLIP."""

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
        if isinstance(packed, dict) and packed.get("quant_method") == "loftq" and own != cls.model_type:
            inner = {"quantization_config": packed}
            values = {key: {**inner, **part} if _is(part, cls) else part for key, part in values.items()}
        return values, rest


def _is(part: Any, cls: Any) -> bool:
    return isinstance(part, dict) and bool(cls.model_type) and part.get("model_type") == cls.model_type
