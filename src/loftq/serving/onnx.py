"""``loftq export --to onnx``: one ONNX graph of the model, its packed layers as MatMulNBits with exactly our codes.

transformers' own exporter traces the model; a packed layer is traced as the node that ONNX Runtime has for it
(``com.microsoft``), whose default zero point is that of :mod:`loftq.serving.packed`. The adapter stays apart, as two
small products beside each node. A decoder's graph takes and gives the keys and values of attention.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loftq.adapters.trained import adapted
from loftq.architecture.loading import load_config, load_weights
from loftq.architecture.served import check_model
from loftq.checkpoint.produce import Files
from loftq.errors import InputError, extra, one_line, quoted
from loftq.formats import fsio
from loftq.nn.layers import LoftQLinear
from loftq.serving import heads, packed
from loftq.serving.adapter import Adapter
from loftq.serving.base import Base
from loftq.serving.merge import Begin
from loftq.serving.output import small_files

NAME = "onnx"
TOKENS = 8  # of the two texts that the model is traced with; every length runs


class MatMulNBits(nn.Module):
    """What ONNX Runtime computes of a packed layer; in torch it only says so."""

    def __init__(self, layer: LoftQLinear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        stored = dict(zip(layer.layout(), (t.detach() for t in layer.stored), strict=True))
        stream, d = packed.numbers(layer.spec, stored, layer.in_features)
        self.attributes = {"bits": int(layer.spec.bits), "block_size": layer.spec.block_size}
        self.register_buffer("weight", stream.unflatten(1, (d.shape[1], -1)))
        self.register_buffer("scales", d.flatten())

    def forward(self, x: Tensor) -> Tensor:
        y = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.weight, self.scales),  # type: ignore[arg-type]
            {**self.attributes, "K": self.in_features, "N": self.out_features},
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )
        return y if self.bias is None else y + self.bias


def check(base: Base) -> None:
    """InputError for what has no such node, or a model that is not of texts."""
    check_model(NAME, base.model)
    packed.check(base, NAME)


def write(place: Path, base: Base, adapter: Adapter | None, begin: Begin) -> Files:
    """Write ``model.onnx`` with its weights, the configuration, and the files by which transformers loads it."""
    with extra("onnx"):
        import onnx  # noqa: F401
        import onnxscript  # type: ignore[import-not-found]  # noqa: F401
        from transformers.exporters import OnnxConfig, OnnxExporter  # type: ignore[attr-defined]

    with _quiet():
        model = _traced(base, adapter)
    advance = begin(1)
    try:
        with torch.no_grad(), _quiet():
            part, inputs = _inputs(model)
            made: Any = OnnxExporter().export(part, inputs, config=OnnxConfig(dynamic=True))
    except Exception as e:  # whatever torch's and transformers' exporters raise for a model that they cannot trace
        raise InputError(f"{quoted(base.directory)}: cannot be traced: {one_line(e)}") from e
    made.save_pretrained(place)
    advance()
    written = [path for path in sorted(place.iterdir()) if path.is_file()]
    return small_files(place, base, adapter) | {path.name: fsio.sha256_file(path) for path in written}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the steps that torch's exporter prints, and advice about operators that a model need not have."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _traced(base: Base, adapter: Adapter | None) -> Any:
    """The model with its adapter, in float32, nodes in the place of packed layers."""
    head = heads.find(base, adapter)
    config = load_config(base.directory, **{k: v for k, v in head.items() if k in ("id2label", "label2id")})
    import transformers

    (name,) = head.get("architectures") or [type(base.model).__name__]
    model = load_weights(getattr(transformers, name), base.directory, config, dtype=torch.float32)
    if adapter is not None:
        model = adapted(model, adapter.directory).base_model.model
    for module, layer in list(model.named_modules()):
        if isinstance(layer, LoftQLinear):
            model.set_submodule(module, MatMulNBits(layer))
    model.hf_quantizer = None
    del model.config.quantization_config
    return model.eval().requires_grad_(False)


def _inputs(model: Any) -> tuple[Any, dict[str, Any]]:
    """What is traced, and with what: of a decoder the step that takes a cache, which may be empty, and any number of
    tokens; of an encoder the whole model, with padding.
    """
    ids = torch.arange(2 * TOKENS).view(2, TOKENS) % model.config.get_text_config().vocab_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.can_generate():
        from transformers.exporters.utils import decompose_prefill_decode

        return decompose_prefill_decode(model, inputs, multi_token_decode=True)["decode"]
    inputs["attention_mask"][1, TOKENS // 2 :] = 0
    if getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return model, inputs


def commands() -> list[str]:
    """The commands that run it, from inside the directory."""
    return ["python -c \"from transformers.exporters import ExportedModel; ExportedModel.from_pretrained('.')\""]
