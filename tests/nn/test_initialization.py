"""``LoraConfig(init_lora_weights="loftq")``: PEFT's own call takes the start of the model's directory."""

import shutil
import warnings

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.lora import LoraModel
from transformers import AutoModel, AutoModelForCausalLM

import loftq
from loftq.errors import UsageError
from models import close, outputs

ROWS = [("llama", {"bits": 2}), ("bert", {"bits": 4, "embeddings": True, "rank": "attention=6,4", "alpha": 7})]
EACH = pytest.mark.parametrize(("name", "options"), ROWS, ids=[name for name, _ in ROWS])


def config(**options):
    return LoraConfig(**{"r": 4, "init_lora_weights": "loftq", **options})


@torch.no_grad()
def result(model):
    return outputs(model.eval())


@pytest.mark.sampled(4)
@EACH
@pytest.mark.parametrize("scaling", [{}, {"lora_alpha": 32}, {"lora_alpha": 3, "use_rslora": True}])
def test_it_is_the_start_whatever_the_scaling(made, name, options, scaling, tmp_path):
    checkpoint = made(name, **options)
    asked = config(**scaling)
    model = get_peft_model(checkpoint.load(), asked)
    assert close(result(model), result(checkpoint.start()))
    assert close(result(model), result(checkpoint.started()))
    assert asked.init_lora_weights == "loftq"  # the user's own is left alone, and serves again
    model.save_pretrained(tmp_path)
    assert '"init_lora_weights": true' in (tmp_path / "adapter_config.json").read_text()
    assert torch.equal(result(PeftModel.from_pretrained(checkpoint.load(), tmp_path)), result(model))
    outputs(model.train()).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n and "pooler" not in n)


def test_all_linear_is_enough_and_more_modules_may_be_named(made):
    checkpoint = made("llama")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    for targets in ("all-linear", r".*_proj", names):
        model = get_peft_model(checkpoint.load(), config(target_modules=targets))
        assert close(result(model), result(checkpoint.started()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 8}, r"other ranks than LoraConfig: model\.layers\.0\.\S+ \(8, the initialization has 4\).*; give r=4"),
        ({"rank_pattern": {"q_proj": 2}}, r"model\.layers\.0\.self_attn\.q_proj \(2, the initialization has 4\), "),
        ({"target_modules": ["q_proj", "v_proj"]}, r"target_modules leaves out model\.layers\.0\..* and 7 more"),
        ({"use_dora": True}, "DoRA needs the norms of a dense weight"),
        ({"lora_alpha": 0}, "set lora_alpha above 0"),
    ],
    ids=["rank", "rank_pattern", "modules", "dora", "alpha"],
)
def test_what_disagrees_is_one_error(made, options, message):
    with pytest.raises(UsageError, match=message) as refused:
        get_peft_model(made("llama").load(), config(**options))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"modules_to_save": ["word_embeddings"]}, "modules_to_save"),
        ({"trainable_token_indices": [4]}, "trainable_token_indices"),
        ({"trainable_token_indices": {"word_embeddings": [4]}}, "trainable_token_indices"),
    ],
    ids=["whole", "tokens", "tokens of a table"],
)
def test_a_table_with_factors_is_not_trained_itself_too(made, options, field):
    checkpoint = made("bert", bits=4, embeddings=True)
    with pytest.raises(UsageError, match=rf"^{field} trains \S+word_embeddings, and so does the adapter .* dense$"):
        get_peft_model(checkpoint.load(), config(**options))
    if field == "modules_to_save":
        with pytest.raises(UsageError, match=r"^modules_to_save trains"):
            loftq.load_start(checkpoint.load(), checkpoint.output, modules_to_save=["word_embeddings"])


def test_the_second_scaling_is_exact(made):
    """Factors are stored in 16 bits; what they are multiplied by is not."""
    checkpoint = made("llama", bits=2)
    torch.testing.assert_close(
        result(get_peft_model(checkpoint.load(), config(lora_alpha=9, use_rslora=True))),
        result(get_peft_model(checkpoint.load(), config())),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("layers", [[[0, 1], [0, 2]], [[1, 2], [0, 1]], [[0, 2], [0, 2]]])
def test_repeated_layers_have_the_factors_of_their_own(made, layers):
    checkpoint = made("llama", bits=2)
    repeat = LoraConfig(r=4, target_modules=["q_proj"], layer_replication=layers)
    wanted = get_peft_model(checkpoint.started(), repeat)
    model = get_peft_model(checkpoint.load(), config(layer_replication=layers))
    assert len(model.base_model.model.model.layers) == sum(end - start for start, end in layers)
    assert close(result(model), result(wanted))
    varied = made("llama", bits=2, rank="layers.0=6,4")
    with pytest.raises(UsageError, match=r"^layer_replication: the LoftQ initialization has ranks by the numbers"):
        get_peft_model(varied.load(), config(layer_replication=layers))


def test_a_tuner_that_has_its_own_is_told_so(made):
    adapter = AdaLoraConfig(init_r=4, target_r=4, total_step=20, init_lora_weights="loftq")
    with pytest.raises(UsageError, match=r"^AdaLoraConfig does not take init_lora_weights='loftq'; give LoraConfig"):
        get_peft_model(made("llama").load(), adapter)


def test_without_a_start_it_is_an_error(made, tmp_path):
    checkpoint = made("llama")
    shutil.copytree(checkpoint.output, tmp_path, ignore=lambda *_: ["loftq_init"], dirs_exist_ok=True)
    packed = type(checkpoint.dense).from_pretrained(tmp_path)
    with pytest.raises(
        UsageError, match=r"no LoftQ initialization in .*load the model from a directory that `loftq quantize`"
    ):
        get_peft_model(packed, config())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the LoftQ initialization")
        get_peft_model(packed, LoraConfig(r=2, target_modules=["q_proj"]))
    dense = type(checkpoint.dense).from_pretrained(checkpoint.source)
    with pytest.raises(
        UsageError, match=r"this one has no packed layers; load a directory that .* or give a loftq_con"
    ):
        get_peft_model(dense, config(target_modules=["q_proj"]))


def test_it_is_found_where_the_weights_were(made, tmp_path, monkeypatch):
    """In a subfolder of a directory or of a repository of the hub, and after the working directory has changed."""
    checkpoint = made("llama")
    repository = tmp_path / "models--org--name"
    shutil.copytree(checkpoint.output, repository / "snapshots" / ("0" * 40) / "two" / "bits")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(repository / "snapshots")
    places = [("0" * 40, "two/bits"), (f"{'0' * 40}/two/bits", ""), ("org/name", "two/bits")]
    models = [AutoModelForCausalLM.from_pretrained(place, subfolder=folder) for place, folder in places]
    monkeypatch.chdir(tmp_path)
    for model in models:
        assert close(result(get_peft_model(model, config())), result(checkpoint.started()))
    again = AutoModelForCausalLM.from_pretrained("org/name", subfolder="two/bits")
    again = loftq.load_start(again, "org/name", subfolder="two/bits/loftq_init")
    assert close(result(again), result(checkpoint.started()))


def test_a_mixed_model(made):
    checkpoint = made("llama")
    assert close(result(get_peft_model(checkpoint.load(), config(), mixed=True)), result(checkpoint.started()))
    with pytest.warns(UserWarning, match=r"the LoftQ initialization of .* is not used"):
        get_peft_model(checkpoint.load(), LoraConfig(r=2, target_modules=["q_proj"]), mixed=True)


def test_another_class_over_the_same_base(made):
    checkpoint = made("llama")
    model = get_peft_model(checkpoint.load(AutoModel), config())
    assert close(result(model), result(loftq.load_start(checkpoint.load(AutoModel), checkpoint.output)))


def test_as_a_second_adapter(made):
    checkpoint = made("llama")
    model = get_peft_model(checkpoint.load(), config())
    model.add_adapter("second", config(lora_alpha=64))
    first = result(model)
    model.set_adapter("second")
    assert close(result(model), first)


@pytest.mark.parametrize(("init", "task"), [(True, None), (False, "CAUSAL_LM"), ("gaussian", "CAUSAL_LM")])
def test_a_start_that_is_not_used_is_told(made, init, task):
    adapter = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init, task_type=task)
    with pytest.warns(UserWarning, match=r"the LoftQ initialization of .* is not used: .*lora_weights='loftq'") as told:
        get_peft_model(made("llama").load(), adapter)
    assert [w.filename for w in told if "LoftQ initialization" in str(w.message)] == [__file__]
    with pytest.warns(UserWarning, match=r"the LoftQ initialization of .* is not used"):
        made("llama").load().add_adapter(adapter)


PLAIN = LoraConfig(r=2, target_modules=["q_proj"])


@pytest.mark.parametrize(
    "begin",
    [
        lambda checkpoint: inject_adapter_in_model(PLAIN, checkpoint.load()),
        lambda checkpoint: LoraModel(checkpoint.load(), {"default": PLAIN}, "default"),
        lambda checkpoint: checkpoint.start().add_adapter("second", PLAIN),
        lambda checkpoint: get_peft_model(checkpoint.load(), IA3Config(target_modules=["k_proj"])),
        lambda checkpoint: get_peft_model(
            checkpoint.load(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        ),
    ],
    ids=["injected", "tuner", "second", "ia3", "prompts"],
)
def test_whichever_call_and_tuner(made, begin):
    with pytest.warns(UserWarning, match=r"the LoftQ initialization of .* is not used") as told:
        begin(made("llama"))
    assert len([w for w in told if "LoftQ initialization" in str(w.message)]) == 1


def test_a_start_that_is_used_is_not(made, tmp_path):
    checkpoint = made("llama")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the LoftQ initialization")
        model = checkpoint.start()
        model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(checkpoint.load(), tmp_path)
        model.load_adapter(tmp_path, "second")
        loftq.load_start(checkpoint.load(), checkpoint.output)
        get_peft_model(checkpoint.load(), config())
        checkpoint.load().add_adapter(config())
        checkpoint.load().load_adapter(str(checkpoint.output / "loftq_init"))
        PeftMixedModel.from_pretrained(checkpoint.load(), str(checkpoint.output / "loftq_init"))
        model.add_adapter("reference", model.peft_config["default"])  # as TRL does, which then copies the weights
