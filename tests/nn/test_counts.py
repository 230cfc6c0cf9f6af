"""Parameter counts are of weights at every width, not of the bytes that hold them."""

import pytest
from peft import LoraConfig, PeftMixedModel, get_model_status, get_peft_model

from models import tiny

ROWS = [("llama", {"bits": 2, "embeddings": True}), ("llama", {"bits": 3, "double_quant": True}), ("gpt2", {"bits": 8})]
EACH = pytest.mark.parametrize(("name", "options"), ROWS, ids=[f"{n}-{o['bits']}" for n, o in ROWS])


def adapter_size(model):
    return sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.sampled(4)
@EACH
@pytest.mark.parametrize("exclude", [False, True])
def test_a_model_has_as_many_as_the_dense_one(made, name, options, exclude):
    model, dense = made(name, **options).load(), tiny(name)
    assert model.num_parameters(exclude_embeddings=exclude) == dense.num_parameters(exclude_embeddings=exclude)
    trainable = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    tables = {f"{n}.weight" for n, m in model.named_modules() if "Embedding" in type(m).__name__} if exclude else set()
    wanted = sum(size for n, size in trainable.items() if n not in tables)
    assert model.num_parameters(only_trainable=True, exclude_embeddings=exclude) == wanted


@EACH
def test_under_an_adapter(made, name, options, capsys):
    checkpoint = made(name, **options)
    model = checkpoint.start()
    size, dense = adapter_size(model), tiny(name).num_parameters()
    assert model.get_nb_trainable_parameters() == (size, dense + size)
    assert get_model_status(model).total_params == dense + size
    model.print_trainable_parameters()
    assert f"trainable params: {size:,} || all params: {dense + size:,}" in capsys.readouterr().out
    assert model.get_base_model().num_parameters() == dense + size
    assert model.merge_and_unload().num_parameters() == dense


def test_a_mixed_model(made):
    checkpoint = made("llama")
    config = LoraConfig(r=3, target_modules=["q_proj"])
    model = get_peft_model(checkpoint.load(), config, mixed=True)
    assert isinstance(model, PeftMixedModel)
    size = adapter_size(model)
    assert model.get_nb_trainable_parameters() == (size, tiny("llama").num_parameters() + size)
