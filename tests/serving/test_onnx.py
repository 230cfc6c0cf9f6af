"""``loftq export --to onnx``: ONNX Runtime computes what the packed model does, its weights to the last bit."""

import logging

import numpy as np
import pytest
import torch
import transformers
from test_gguf import made_of

import loftq
from harness import EXACT
from loftq.errors import InputError
from loftq.nn.layers import LoftQLinear
from loftq.numerics import encode
from loftq.serving import packed
from loftq.spec import QuantSpec
from models import BERT, quantize
from quantizers import quantize as coded


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_node_decodes_what_we_do(bits):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    spec = QuantSpec(bits=bits, code="int", block_size=32, scale_dtype="float32")
    layer = LoftQLinear(64, 6, False, spec)
    layer.load_stored(encode(coded(torch.randn(6, 64, generator=torch.Generator().manual_seed(0)), spec), spec))
    stream, d = packed.numbers(spec, dict(zip(layer.layout(), layer.stored, strict=True)), 64)
    arrays = {"B": stream.unflatten(1, (2, -1)).numpy(), "s": d.flatten().numpy()}
    attributes = {"K": 64, "N": 6, "bits": bits, "block_size": 32}
    node = onnx.helper.make_node("MatMulNBits", ["x", "B", "s"], ["y"], domain="com.microsoft", **attributes)
    ends = [onnx.helper.make_tensor_value_info(n, 1, [64, k]) for n, k in (("x", 64), ("y", 6))]
    held = [onnx.numpy_helper.from_array(value, name) for name, value in arrays.items()]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], held)
    domains = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=domains, ir_version=10)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.eye(64, dtype=np.float32)})
    assert np.array_equal(found.T, layer.dequantize().numpy())


@pytest.fixture
def exported():
    for name in ("onnx", "onnxscript", "onnxruntime", "transformers.exporters"):
        pytest.importorskip(name)
    from transformers.exporters import ExportedModel

    return ExportedModel.from_pretrained


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_an_encoder_with_its_head(exported, tmp_path, capsys, caplog):
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**BERT, "hidden_size": 64, "intermediate_size": 96})
    transformers.BertModel(config).save_pretrained(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "base", serve="onnx", bits=4, block_size=32)
    auto = transformers.AutoModelForSequenceClassification
    model = loftq.load_start(auto.from_pretrained(tmp_path / "base", num_labels=3), tmp_path / "base").eval()
    model.save_pretrained(tmp_path / "adapter")
    capsys.readouterr()
    caplog.clear()
    loftq.export(tmp_path / "base", tmp_path / "out", to="onnx", adapter=tmp_path / "adapter")
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert (capsys.readouterr().out, told) == ("", [])  # torch's exporter prints its steps
    ids = torch.arange(3, 18).reshape(3, 5)
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).logits
    found = exported(tmp_path / "out")(input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids)).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_decoder_goes_on_from_its_cache(exported, tmp_path):
    directory = made_of("llama", tmp_path, serve="onnx", code="auto", bits="mlp=2,4", **EXACT)
    loftq.export(directory, tmp_path / "out", to="onnx")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = loftq.load_start(model, directory).eval()
    ids = torch.arange(3, 14)[None]
    with torch.no_grad():
        wanted = model(ids).logits
    run = exported(tmp_path / "out")
    empty = transformers.DynamicCache(config=model.config)
    for i in range(2):
        empty.update(torch.zeros(1, 2, 0, 16), torch.zeros(1, 2, 0, 16), i)
    first = run(input_ids=ids[:, :7], position_ids=torch.arange(7)[None], past_key_values=empty)
    then = run(input_ids=ids[:, 7:], position_ids=torch.arange(7, 11)[None], past_key_values=first.past_key_values)
    found = torch.cat([first.logits, then.logits], 1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_what_has_no_graph_is_refused(made, tmp_path):
    with pytest.raises(InputError, match="onnx holds code int on linear layers, and not lloyd"):
        loftq.export(made("llama").output, tmp_path / "out", to="onnx")
    with pytest.raises(InputError, match="the export to ONNX supports only text encoders and decoders"):
        loftq.export(made("t5").output, tmp_path / "out", to="onnx")
