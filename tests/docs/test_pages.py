"""Every Python example of the documentation runs, page by page, on tiny models of the names that the pages use.

A block with a title, as in ``python title="needs the hub"``, needs what tests do not have: it is only compiled.
"""

import doctest
import json
import re
from pathlib import Path

import peft
import pytest
import tokenizers
import torch
import transformers

import loftq
import models
from loftq import codes, spec
from loftq.formats import layouts

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python(?P<about>[^\n]*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = [
    page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if BLOCK.search(page.read_text())
]
CODES, PRESETS, FORMATS = set(codes.names()), set(spec.PRESETS), set(layouts.names())
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
WORDS = ["a", "fine", "poor", "film", "how", "are", "you", "?", *(f"w{i}" for i in range(70))]
CHAT = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),  # Trainer's default
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),  # TRL's default, and its older name
]


def tokenizer():
    """Whole words; every text ends."""
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    made.chat_template = CHAT
    return made


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A decoder, an encoder and texts, of the names that the pages use."""
    place = tmp_path_factory.mktemp("pages")
    sizes = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(**{**models.LLAMA, **sizes, "eos_token_id": 3, "bos_token_id": 2})
    bert = transformers.BertConfig(**{**models.BERT, **sizes})
    mixture = transformers.Qwen3MoeConfig(
        **{**models.LLAMA, **sizes, **models.MOE}, num_experts=4, moe_intermediate_size=64
    )
    for name, model in (
        ("model", transformers.LlamaForCausalLM(llama)),
        ("encoder", transformers.BertModel(bert)),
        ("mixture", transformers.Qwen3MoeForCausalLM(mixture)),
    ):
        model.save_pretrained(place / "org" / name)
        tokenizer().save_pretrained(place / "org" / name)
    chat = [{"role": "user", "content": "how are you ?"}, {"role": "assistant", "content": "fine"}]
    rows = {
        "reviews.jsonl": [{"text": f"a {'fine' if i % 2 else 'poor'} film", "label": i % 2} for i in range(16)],
        "chats.jsonl": [{"messages": chat}] * 8,
    }
    for name, mine in rows.items():
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in mine))
    (place / "notes.txt").write_text(" ".join(WORDS * 20))
    return place


@pytest.fixture(autouse=True)
def registries():
    """What examples register is forgotten."""
    yield
    for registry, kept in ((codes._CODES, CODES), (spec.PRESETS, PRESETS), (layouts._LAYOUTS, FORMATS)):
        for name in registry.keys() - kept:
            del registry[name]


@pytest.fixture
def place(sources, tmp_path, monkeypatch):
    """A directory of its own with the sources in it, to work in."""
    for source in sources.iterdir():
        (tmp_path / source.name).symlink_to(source)
    monkeypatch.chdir(tmp_path)


@pytest.mark.sampled(3)
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_run(page):
    text = page.read_text()
    names = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        line = text[: block.start()].count("\n") + 1
        code = compile("\n" * line + block["code"], str(page), "exec")
        if "title=" not in block["about"]:
            exec(code, names)


EXAMPLES = {
    name: "".join(example.source for example in doctest.DocTestParser().get_examples(getattr(loftq, name).__doc__))
    for name in loftq.__all__
}


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("name", [name for name, code in EXAMPLES.items() if code])
def test_examples_of_docstrings_run(name):
    """They stand in the reference; what they have not made themselves is given."""
    names = {name: getattr(loftq, name), "loftq": loftq, "torch": torch, "peft": peft, "LoraConfig": peft.LoraConfig}
    names["AutoModelForCausalLM"] = transformers.AutoModelForCausalLM
    names["BitsAndBytesConfig"] = lambda *_: transformers.BitsAndBytesConfig(
        load_in_4bit=True
    )  # examples leave it open
    names["model"] = transformers.AutoModelForCausalLM.from_pretrained("org/model")
    names["tokenizer"] = transformers.AutoTokenizer.from_pretrained("org/model")
    exec(EXAMPLES[name], names)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 90
