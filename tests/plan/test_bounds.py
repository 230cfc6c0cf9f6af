"""Small files that ask for much: a configuration is held against its checkpoint before a model is made of it."""

import json
import os

import pytest

from harness import cli, refused, tiny_source
from loftq.architecture import configuration, skeleton
from loftq.errors import InputError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_source(tmp_path_factory.mktemp("bounds") / "source")


@pytest.fixture
def spelled(source, tmp_path):
    """The source with other values in its config.json."""

    def spell(**values):
        for path in source.iterdir():
            if path.is_file():
                (tmp_path / path.name).write_bytes(path.read_bytes())
        config = {**json.loads((source / "config.json").read_text()), **values}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return spell


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_labels": 2**31}, ("num_labels is 2147483648",)),
        ({"text_config": {"num_labels": 10**12}}, ("num_labels is 1000000000000",)),
        ({"num_hidden_layers": 4096}, ("num_hidden_layers is 4096", "the checkpoint has 39 tensors")),
        ({"num_hidden_layers": 65}, ("num_hidden_layers is 65",)),
    ],
    ids=["labels", "nested-labels", "layers", "a-layer-too-many"],
)
def test_more_than_the_checkpoint_could_fill(spelled, values, words):
    ended = cli("plan", spelled(**values), "--rank", "4")
    refused(ended, 3, "config.json", *words)
    assert ended.cpu_seconds < 10


def test_as_much_as_a_checkpoint_may_have(spelled):
    """Layers that share their weights have few tensors."""
    model = skeleton.build(spelled(num_hidden_layers=64), 39)
    assert len(model.encoder.layer) == 64
    with pytest.raises(InputError, match=f"more than {configuration.most_modules(1)} modules"):
        skeleton.build(spelled(num_hidden_layers=64, model_type="albert", architectures=None, num_hidden_groups=300), 1)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "config.json"])
def test_a_pipe_beside_the_weights(spelled, make, name):
    """transformers would open it by its name, and never come back."""
    source = spelled()
    (source / name).unlink(missing_ok=True)
    make(source / name)
    refused(cli("plan", source, "--rank", "4"), 3, f"{name}: not a regular file")


def test_a_limit_is_no_count(spelled):
    """Qwen2-VL's configuration says 80 for a model of any size."""
    assert cli("plan", spelled(max_window_layers=80), "--rank", "4").code == 0
