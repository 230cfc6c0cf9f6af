"""Statistics collected block by block are those of hooks on the whole model, however rows are put into batches."""

from types import SimpleNamespace

import pytest
import small
import torch
from torch import nn

import models
from loftq.calibration.blocks import load_offloaded
from loftq.calibration.collect import collect, matrices
from loftq.calibration.fisher import collect_fisher
from loftq.errors import NumericalError, UsageError

# Encoders, decoders, both; a block called three times, a convolution between blocks, inputs that rows have in common.
NAMES = ["bert", "llama", "bart", "t5", "gpt2", "deberta-v3", "albert", "deberta-conv", "mixtral", "phi"]
ROWS = small.rows()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", NAMES)
def test_block_by_block_is_as_the_whole_model(name, tmp_path):
    """float32 products of a few rows, compared with float64 ones: off by their rounding."""
    model = small.tiny(name)
    model.save_pretrained(tmp_path / "model")
    offloaded = load_offloaded(tmp_path / "model", tmp_path / "offload")
    blocks = [p for n, p in offloaded.named_parameters() if any(f".{k}." in f".{n}" for k in "01")]
    assert blocks
    assert all(p.is_meta for p in blocks), "the weights of blocks are on disk"
    wanted = small.plainly(model, small.fitted(ROWS))
    assert len(wanted) > 4
    for found in (small.collected(model, ROWS), small.collected(offloaded, ROWS)):
        assert set(found) == set(wanted)
        for matrix, (moments, count) in wanted.items():
            assert small.away(found[matrix].fit.columns, moments) < 1e-6, matrix
            assert found[matrix].tokens == count


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_blocks_run_on_a_device(name, tmp_path):
    model = small.tiny(name)
    model.save_pretrained(tmp_path)
    offloaded = load_offloaded(tmp_path, tmp_path / "offload", "cuda")
    assert "cuda" in {str(place).partition(":")[0] for place in offloaded.hf_device_map.values()}
    found = small.collected(offloaded, ROWS)
    wanted = small.plainly(model, small.fitted(ROWS))
    assert all(small.away(found[m].fit.columns, h) < 1e-5 for m, (h, _) in wanted.items())


def test_a_pickled_checkpoint(tmp_path):
    model = small.tiny("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    found = small.collected(load_offloaded(tmp_path, tmp_path / "offload"), ROWS)
    wanted = small.plainly(model, small.fitted(ROWS))
    assert all(small.away(found[m].fit.columns, h) < 1e-6 for m, (h, _) in wanted.items())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["bert", "deberta-v3", "t5", "albert"])
def test_order_and_size_of_batches_do_not_matter(name):
    """Also where all rows of a batch have an input in common: DeBERTa's relative positions go through query and key."""
    model = small.tiny(name)
    kept, held = small.fitted(ROWS), [row for row in ROWS if row not in small.fitted(ROWS)]
    other = kept[::-1]
    for place, row in zip((3, 7), held[::-1], strict=True):
        other.insert(place, row)
    first = small.collected(model, ROWS, tokens=1)
    for some, tokens in ((ROWS, 14), (ROWS, 4096), (other, 4096)):
        found = small.collected(model, some, tokens=tokens)
        for matrix, moments in first.items():
            assert small.away(found[matrix].fit.columns, moments.fit.columns) < 1e-6
            assert small.away(found[matrix].held.columns, moments.held.columns) < 1e-6
            assert found[matrix].tokens == moments.tokens


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_padding_that_is_masked_changes_nothing(name):
    model, some = small.tiny(name), small.fitted(ROWS)
    longest = max(len(row["input_ids"]) for row in some)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in some])
    mask = torch.tensor([[i < len(row["input_ids"]) for i in range(longest)] for row in some])
    seen = {}
    for matrix, module in matrices(model).items():

        def see(_, args, matrix=matrix):
            if args[0].shape[:2] == mask.shape:  # the pooler sees no tokens
                x = args[0][mask].double()
                seen[matrix] = x.T @ x / len(x)

        module.register_forward_pre_hook(see)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask.long())
    padded = dict(seen)  # the hooks stay, and see the batches below
    found = small.collected(model, ROWS)
    assert len(padded) >= 12
    assert all(small.away(found[matrix].fit.columns, h) < 1e-5 for matrix, h in padded.items())


def test_the_diagonal_is_the_diagonal():
    model = small.tiny("llama")
    full, diagonal = small.collected(model, ROWS), small.collected(model, ROWS, "diagonal")
    assert full.keys() == diagonal.keys()
    for matrix, moments in diagonal.items():
        assert small.away(full[matrix].fit.columns.diagonal(), moments.fit.columns) < 1e-6
        assert moments.fit.rows is None


def test_matrices_with_one_input_share_a_group():
    found = [set(g.modules) for groups in collect(small.tiny("llama"), ROWS, "diagonal") for g in groups]
    layer = "model.layers.1"
    assert {f"{layer}.self_attn.{x}_proj" for x in "qkv"} in found
    assert {f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"} in found
    assert {f"{layer}.self_attn.o_proj"} in found
    found = [set(g.modules) for groups in collect(small.tiny("deberta-v3"), ROWS, "diagonal") for g in groups]
    attention = "encoder.layer.0.attention.self"
    assert {f"{attention}.query_proj", f"{attention}.key_proj"} in found
    assert {f"{attention}.value_proj"} in found, "relative positions do not go through it"


def test_a_block_is_done_before_the_next():
    """What was yielded is all of a block, in order; what lies outside of blocks comes last."""
    blocks = [[m for g in groups for m in g.modules] for groups in collect(small.tiny("bart"), ROWS, "diagonal")]
    stems = ["model.encoder.layers.0.", "model.encoder.layers.1.", "model.decoder.layers.0.", "model.decoder.layers.1."]
    assert len(blocks) == 5
    for stem, names in zip(stems, blocks, strict=False):
        assert names
        assert all(name.startswith(stem) for name in names)
    assert blocks[-1] == ["lm_head"]


def test_progress_is_told():
    told = []

    def begin(total):
        told.append(total)
        return lambda: told.append(1)

    assert list(collect(small.tiny("bert"), ROWS, "diagonal", begin, tokens=4096))
    assert told[0] == sum(told[1:]) == 3 * 5  # two blocks and the rest; four lengths to fit, one held out


def test_the_model_is_left_as_it_was():
    model = small.tiny("bart").train()
    before = models.outputs(model.eval()).clone()
    model.train()
    found = list(collect(model, ROWS, "full"))
    assert found
    assert model.training
    assert all("forward" not in module.__dict__ and not module._forward_pre_hooks for module in model.modules())
    assert torch.equal(models.outputs(model.eval()), before)


class Crossed(nn.Module):
    """Blocks of which each is given more than the output of the one before."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=False)
        self.table, self.layers = nn.Embedding(90, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(count))

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        first = self.table(input_ids)
        made = [first]
        for layer in self.layers:
            made.append(layer(sum(made)).tanh())
        return made[-1]


def test_blocks_that_are_no_chain():
    model = Crossed()
    found, wanted = small.collected(model, ROWS), {}
    for i, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(
            lambda _, args, i=i: wanted.setdefault(i, []).append(args[0].detach()[0].double())
        )
    for row in small.fitted(ROWS):
        model(torch.tensor([row["input_ids"]]))
    for i, inputs in wanted.items():
        x = torch.cat(inputs)
        assert small.away(found[f"layers.{i}"].fit.columns, x.T @ x / len(x)) < 1e-6


class Restless(Crossed):
    """Never the same twice."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) + self.layers[0](torch.rand(1, 8))


def test_a_model_that_cannot_be_played_back():
    with pytest.raises(UsageError, match="Restless cannot be run block by block"):
        small.collected(Restless(), ROWS)


def test_inputs_that_are_not_finite():
    model = small.tiny("llama")
    model.model.layers[0].mlp.up_proj.weight.data.fill_(float("inf"))
    with pytest.raises(NumericalError, match=r"layers\.0\.mlp\.down_proj: its inputs are not finite"):
        small.collected(model, ROWS)


def gradients(model, ids, labels, **more):
    """matrix -> squared gradients of one sample's loss, (out, in)."""
    model.zero_grad()
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, **more).loss.backward()
    found = {n: m.weight.grad for n, m in matrices(model).items() if m is not model.get_output_embeddings()}
    return {n: (g if isinstance(model.get_submodule(n), nn.Linear) else g.T).double() ** 2 for n, g in found.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert-mlm"])
def test_fisher_is_the_mean_of_squared_gradients(name):
    model = small.tiny(name)
    model.get_output_embeddings().weight.requires_grad_(False)
    groups = collect_fisher(model, ROWS, mask_token=4)
    assert not model.get_output_embeddings().weight.requires_grad
    assert sum(p.requires_grad for p in model.parameters()) > 10
    squares = []
    for row in small.fitted(ROWS):
        ids = torch.tensor([row["input_ids"]])
        labels = ids
        if name == "bert-mlm":
            hidden = torch.arange(ids.shape[1])[None] % 7 == min(7, ids.shape[1]) // 2
            ids, labels = ids.masked_fill(hidden, 4), ids.masked_fill(~hidden, -100)
        squares.append(gradients(model, ids, labels))
    assert {g.modules[0] for g in groups} == set(squares[0])
    for group in groups:
        wanted = sum(s[group.modules[0]] for s in squares) / len(squares)
        assert small.away(group.moments.fit.columns, wanted.mean(0)) < 1e-5
        assert small.away(group.moments.fit.rows, wanted.mean(1)) < 1e-5
        assert group.moments.held.rows is not None
        assert group.moments.tokens == sum(len(row["input_ids"]) for row in small.fitted(ROWS))


@pytest.mark.parametrize(("name", "mask", "words"), [("bert", 4, "BertModel has none"), ("bert-mlm", None, "no mask")])
def test_fisher_needs_a_loss(name, mask, words):
    with pytest.raises(UsageError, match=words):
        collect_fisher(small.tiny(name), ROWS, mask)
