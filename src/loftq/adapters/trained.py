"""A trained adapter, put by PEFT on the model that it was trained on."""

from pathlib import Path
from typing import Any

from loftq.adapters.bases import refuse_no_weights
from loftq.adapters.origins import refuse_other
from loftq.architecture.loading import guarded
from loftq.errors import InputError, LoftqError, one_line, quoted
from loftq.formats import strict_json


def adapted(model: Any, place: Path) -> Any:
    """PEFT's model over ``model``, which was loaded from a local directory, with the adapter in ``place``.

    Raises: InputError for an adapter of another base, without its weights, or that PEFT cannot load.
    """
    from peft import PeftModel

    refuse_other(place, Path(model.name_or_path))
    refuse_no_weights(place)
    if strict_json.load_object(place / "adapter_config.json").get("megatron_config"):
        raise InputError(f"{quoted(place)}: its megatron_config has PEFT import modules; take it out")
    try:
        with guarded():
            return PeftModel.from_pretrained(model, str(place))
    except LoftqError:
        raise
    except Exception as e:  # whatever PEFT raises for files that it cannot take
        raise InputError(f"{quoted(place)}: no adapter for this model: {one_line(e)}") from e
