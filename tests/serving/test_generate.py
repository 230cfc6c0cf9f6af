"""``loftq generate``: the texts are those of transformers and PEFT on the same model; another base is refused."""

import shutil

import pytest
import tokenizers
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import loftq
from harness import cli, refused
from loftq.errors import InputError, UsageError
from models import quantize

AUTO = transformers.AutoModelForCausalLM
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def place(made, tmp_path_factory):
    """A quantized model with a tokenizer of whole words, and one with a chat template."""
    root = tmp_path_factory.mktemp("generate")
    for name, template in (("plain", None), ("chat", TEMPLATE)):
        shutil.copytree(made("llama").output, root / name)
        words = tokenizers.models.WordLevel({f"w{i}": i for i in range(99)} | {"user": 99, "?": 100}, unk_token="?")
        inner = tokenizers.Tokenizer(words)
        inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        made_up = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")
        made_up.chat_template = template
        made_up.save_pretrained(root / name)
    return root


def wanted(model, tokenizer, text, count=5):
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_it_goes_on_as_transformers_does(place):
    pieces = []
    found = loftq.generate(place / "plain", "w5 w6", max_new_tokens=5, temperature=0, told=pieces.append)
    assert len(pieces) > 1
    assert "".join(pieces) == found
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "plain")
    base = AUTO.from_pretrained(place / "plain", dtype=torch.float32)
    alone = wanted(base.eval(), tokenizer, "w5 w6")
    started = PeftModel.from_pretrained(base, place / "plain", subfolder="loftq_init").eval()
    assert found.strip() == wanted(started, tokenizer, "w5 w6").strip()
    assert loftq.generate(place / "plain", "w5 w6", adapter="none", max_new_tokens=5, temperature=0).strip() == alone


def test_a_chat_by_the_template(place):
    messages = [{"role": "user", "content": "w7 w8"}]
    chat = loftq.generate(place / "chat", messages, max_new_tokens=4, temperature=0)
    assert chat == loftq.generate(place / "chat", "user w7 w8 ", max_new_tokens=4, temperature=0)
    with pytest.raises(UsageError, match="no chat template"):
        loftq.generate(place / "plain", messages)


def test_a_head_that_is_not_there_is_not_made_up(place, made):
    """An encoder, say, or a base model: its text would be drawn from random numbers."""
    encoder = shutil.copytree(made("bert").source, place / "encoder")
    for file in place.glob("plain/tokenizer*"):
        shutil.copy(file, encoder)
    with pytest.raises(
        InputError, match=r"encoder: BertLMHeadModel writes text with cls\..*, which are not in its files"
    ):
        loftq.generate(encoder, "w5")


def test_models_of_images_write_text_and_some_models_do_not(place, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.LlamaConfig(vocab_size=128, **sizes)
    sizes |= {"image_size": 8, "patch_size": 4}
    seeing = transformers.LlavaConfig(vision_config=transformers.CLIPVisionConfig(**sizes), text_config=text)
    transformers.LlavaForConditionalGeneration(seeing).save_pretrained(tmp_path / "llava")
    transformers.ViTModel(transformers.ViTConfig(**sizes)).save_pretrained(tmp_path / "vit")
    for file in place.glob("plain/tokenizer*"):
        shutil.copy(file, tmp_path / "llava")
        shutil.copy(file, tmp_path / "vit")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "llava")
    found = loftq.generate(tmp_path / "llava", "w5 w6", max_new_tokens=5, temperature=0)
    assert found.strip() == wanted(model, tokenizer, "w5 w6").strip()
    with pytest.raises(InputError, match="vit: a model of type vit, which does not generate text"):
        loftq.generate(tmp_path / "vit", "w5")


def test_an_initialization_is_not_left_out_in_silence(place, tmp_path):
    directory = shutil.copytree(place / "plain", tmp_path / "plain")
    (directory / "loftq_manifest.json").unlink()
    asked = {"max_new_tokens": 5, "temperature": 0}
    assert loftq.generate(directory, "w5 w6", **asked) == loftq.generate(place / "plain", "w5 w6", **asked)
    (directory / "loftq_init" / "adapter_model.safetensors").unlink()
    for call in (
        lambda: loftq.generate(directory, "w5"),
        lambda: loftq.load_start(AUTO.from_pretrained(directory), directory),
    ):
        with pytest.raises(InputError, match=r"loftq_init: adapter_model.safetensors is not there; fetch"):
            call()


def test_what_is_drawn_depends_on_the_seed_alone(place):
    options = {"max_new_tokens": 8, "temperature": 5.0, "top_p": 0.9}
    texts = [loftq.generate(place / "plain", "w5", seed=seed, **options) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_adapters_runs_and_other_bases(place, made, tmp_path):
    model = get_peft_model(AUTO.from_pretrained(place / "plain"), LoraConfig(r=4, init_lora_weights="loftq"))
    model.save_pretrained(tmp_path / "run" / "adapter")
    asked = {"max_new_tokens": 5, "temperature": 0}
    found = loftq.generate(place / "plain", "w5 w6", adapter=tmp_path / "run" / "adapter", **asked)
    assert found == loftq.generate(tmp_path / "run", "w5 w6", **asked)  # the run names its base
    quantize(made("llama").source, tmp_path / "other", seed=7)
    for file in place.glob("plain/tokenizer*"):
        shutil.copy(file, tmp_path / "other")
    with pytest.raises(InputError, match="belongs to the quantized model"):
        loftq.generate(tmp_path / "other", "w5", adapter=tmp_path / "run", **asked)
    with pytest.raises(UsageError, match="leave it out"):
        loftq.generate(tmp_path / "run", "w5", adapter=tmp_path / "run", **asked)


def test_prompts_beyond_the_models_positions(place):
    text = " ".join(["w5"] * 62)
    found = loftq.generate(place / "plain", text, max_new_tokens=50, temperature=0)
    assert len(found.split()) <= 2  # of 64 positions
    for prompt in ("", text + " w5 w5"):
        with pytest.raises(UsageError, match="tokens; wanted 1 to 63"):
            loftq.generate(place / "plain", prompt)


def test_on_the_command_line(place):
    options = ("--max-new-tokens", 4, "--temperature", 0)
    asked = cli("generate", place / "chat", "--prompt", "w7 w8", *options)
    assert asked.code == 0, asked.err
    messages = [{"role": "user", "content": "w7 w8"}]
    assert asked.out.strip() == loftq.generate(place / "chat", messages, max_new_tokens=4, temperature=0).strip()
    raw = cli("generate", place / "chat", "--prompt", "w7 w8", "--raw", *options)
    assert raw.out.strip() == loftq.generate(place / "chat", "w7 w8", max_new_tokens=4, temperature=0).strip()
    refused(cli("generate", place / "plain", "--prompt", "w7", "--system", "w1"), 2, "--system")
    for flag, value, told in (
        ("--top-p", 2, "positive and at most 1"),
        ("--temperature", -1, "at least 0 and finite"),
    ):
        refused(
            cli("generate", place / "plain", "--prompt", "w7", flag, value), 2, f"{flag} must be {told}, got {value}.0"
        )
