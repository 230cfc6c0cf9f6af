"""Statistics of experts: of the tokens that are routed to each, and of its layer where these are few."""

import json
import logging

import pytest
import small
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

import loftq
import models
from loftq.architecture import experts
from loftq.architecture.experts import LAST
from loftq.calibration import collect as collecting
from loftq.calibration.blocks import load_offloaded
from loftq.calibration.calibrate import open_statistics
from loftq.calibration.collect import collect
from loftq.calibration.fisher import collect_fisher
from loftq.formats.stack_statistics import StackGroup
from loftq.formats.statistics import Statistics
from loftq.numerics import towards_diagonal

ROWS = small.rows()


def groups_of(model, kind="full"):
    return {g.stack: g for found in collect(model, ROWS, kind) for g in found if isinstance(g, StackGroup)}


def inputs_of_experts(model, rows):
    """stack -> for every expert the inputs that it was given, by its own equations."""
    found = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            is_llama4 = isinstance(module, Llama4TextExperts)
            if not hasattr(module, "is_transposed") and not is_llama4:
                continue
            first = "gate_up_proj" if is_llama4 or module.has_gate else "up_proj"
            given = []
            hook = module.register_forward_pre_hook(lambda _, args, given=given: given.append(args))
            for row in rows:
                model(input_ids=torch.tensor([row["input_ids"]]))
            hook.remove()
            count, inner = len(getattr(module, first)), []
            if is_llama4:  # all tokens for every expert, zeros where they are not sent to it
                x = torch.cat([one.unflatten(0, (count, -1)) for (one,) in given], 1)
                outer = [one[one.any(1)] for one in x]
            else:
                x, index = (torch.cat(parts) for parts in list(zip(*given, strict=True))[:2])
                outer = [x[(index == e).any(1)] for e in range(count)]
            for e, mine in enumerate(outer):
                if is_llama4:
                    gate, up = (mine @ module.gate_up_proj[e]).chunk(2, -1)
                    inner.append(up * module.act_fn(gate))
                    continue
                weight = getattr(module, first)[e]
                y = mine @ (weight if module.is_transposed else weight.T)
                y = y + getattr(module, f"{first}_bias")[e] if module.has_bias else y
                inner.append(module._apply_gate(y) if module.has_gate else module.act_fn(y))
            found |= {f"{name}.{first}": outer, f"{name}.{LAST}": inner}
    return found


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["mixtral", "llama4", "gpt-oss", "nemotron-h"])
def test_each_expert_has_the_moments_of_its_tokens(name, tmp_path, monkeypatch):
    monkeypatch.setattr(experts, "_tried", {})  # so that the module that is tried is first offloaded, with hooks
    model = small.tiny(name)
    model.save_pretrained(tmp_path / "model")
    wanted = inputs_of_experts(model, small.fitted(ROWS))
    classes = [type(m) for m in model.modules()]
    offloaded = load_offloaded(tmp_path / "model", tmp_path / "offload")
    for found in (groups_of(offloaded), groups_of(model)):
        assert set(found) == set(wanted)
        for stack, group in found.items():
            assert group.tokens["fit"] == [len(x) for x in wanted[stack]]
            for e, x in enumerate(x.double() for x in wanted[stack]):
                if len(x):
                    assert small.away(group.parts["fit.columns"][e], x.T @ x / len(x)) < 1e-5
            everything = torch.cat(wanted[stack]).double()
            mean = everything.T @ everything / len(everything)
            mean = mean.diagonal().mean().reshape(1) if stack.endswith(LAST) else mean
            assert small.away(group.parts["fit.mean"], mean) < 1e-5
            assert 0 < sum(group.tokens["held"]) < sum(group.tokens["fit"])
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_the_fewer_the_tokens_the_more_is_the_layers(kind):
    found = groups_of(small.tiny("mixtral"), kind)
    for group in found.values():
        group.tokens["fit"][0] = 0
    statistics = Statistics.of(kind, found.values(), len(ROWS))
    for stack, group in found.items():
        n = group.parts["fit.columns"].shape[1]
        mean = group.parts["fit.mean"]
        if stack.endswith(LAST):
            mean = mean * (torch.eye(n) if kind == "full" else torch.ones(n))
        elif kind == "full":
            mean = towards_diagonal(mean, sum(group.tokens["fit"]))
        for e, tokens in enumerate(group.tokens["fit"]):
            share = n / (n + tokens)
            moments = statistics.moments(f"{stack}.{e}")
            assert moments.tokens == tokens
            own = group.parts["fit.columns"][e]
            assert small.away(moments.fit.columns, (1 - share) * own + share * mean) < 1e-5
    assert statistics.moments(stack) is None


def test_too_many_numbers_keep_the_correlations_of_the_layer(monkeypatch):
    whole = groups_of(small.tiny("mixtral"))
    monkeypatch.setattr(collecting, "MOST", 4 * 40 * 40)
    found = groups_of(small.tiny("mixtral"))
    statistics = Statistics.of("full", found.values(), len(ROWS))
    for stack, group in found.items():
        own = group.parts["fit.columns"]
        assert own.ndim == (3 if stack.endswith(LAST) else 2)
        if own.ndim == 3:
            assert torch.equal(own, whole[stack].parts["fit.columns"])
            continue
        mean = group.parts["fit.mean"]
        assert small.away(mean, whole[stack].parts["fit.mean"]) < 1e-6
        h = statistics.moments(f"{stack}.1").fit.columns
        share = len(mean) / (len(mean) + group.tokens["fit"][1])
        assert small.away(h.diagonal(), (1 - share) * own[1] + share * mean.diagonal()) < 1e-5
        mean = towards_diagonal(mean, sum(group.tokens["fit"]))
        scale = (h.diagonal() / mean.diagonal()).sqrt()
        assert small.away(h / scale / scale[:, None], mean) < 1e-5


def test_fisher_of_experts_is_of_the_samples_that_reached_them():
    model = small.tiny("mixtral")
    found = {g.modules[0].rpartition(".")[0]: g for g in collect_fisher(model, ROWS) if isinstance(g, StackGroup)}
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    squares, fitted = [], small.fitted(ROWS)
    for row in fitted:
        model.zero_grad()
        ids = torch.tensor([row["input_ids"]])
        model(input_ids=ids, labels=ids).loss.backward()
        squares.append(model.get_parameter(stack).grad.double() ** 2)
    for e, group in enumerate([found[stack]] * 4):
        reached = [s[e] for s in squares if s[e].any()]
        assert group.tokens["fit"][e] == round(sum(len(r["input_ids"]) for r in fitted) * len(reached) / len(fitted))
        assert small.away(group.parts["fit.columns"][e], sum(reached).mean(0) / len(reached)) < 1e-5
        assert small.away(group.parts["fit.rows"][e], sum(reached).mean(1) / len(reached)) < 1e-5
    moments = Statistics.of("fisher", found.values(), len(ROWS)).moments(f"{stack}.2")
    assert moments.fit.rows.shape == (80,)
    assert moments.held.rows is not None


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A mixture with a tokenizer, texts, and statistics of two kinds."""
    place = tmp_path_factory.mktemp("mixture")
    model, text = small.checkpoint(place / "model", "mixtral"), small.text(place, 300)
    for kind in ("full", "fisher"):
        loftq.calibrate(model, text, output=place / kind, samples=24, max_length=64, kind=kind)
    return place


def made(mixture, output, **options):
    exact = {"bits": 2, "rank": 4, "workers": 1, "dtype": "source", "adapter_dtype": "float32"}
    return loftq.quantize(mixture / "model", output, **{**exact, **options})


@pytest.mark.sampled(3)
@pytest.mark.parametrize("preset", ["qera-diag", "cloq", "projq", "srr", "lq-lora"])
def test_every_kind_of_preset_solves_experts(mixture, tmp_path, preset):
    """One of each metric, rounding and beginning."""
    kind = "fisher" if preset == "lq-lora" else "full"
    manifest = made(mixture, tmp_path / "out", calibrate=mixture / kind, preset=preset)
    stacks = [m for m in manifest["matrices"] if "experts" in m]
    assert len(stacks) == 4
    assert stacks == [m for m in manifest["matrices"] if "tokens" in m]
    for m in stacks:
        assert len(m["tokens"]) == 4
        assert 0 < m["output_errors"][-1] <= m["output_errors"][0] < 1
    assert loftq.verify(tmp_path / "out")


def test_outputs_of_experts_are_closer_than_without_texts(mixture, tmp_path, caplog):
    """On tokens of texts that the statistics are not of."""
    with caplog.at_level(logging.WARNING, "loftq"):
        made(mixture, tmp_path / "descent", calibrate=mixture / "full", preset="descent")
    assert "of 16 experts' matrices each was fitted on" in caplog.text
    assert "no statistics for" not in caplog.text
    made(mixture, tmp_path / "fitted")
    dense = AutoModelForCausalLM.from_pretrained(mixture / "model")
    generator = torch.Generator().manual_seed(9)
    others = [{"input_ids": torch.randint(5, 90, (64,), generator=generator).tolist()} for _ in range(12)]
    left = {"descent": 0.0, "fitted": 0.0}
    for way in left:
        found = models.written(tmp_path / way)
        for stack, inputs in inputs_of_experts(dense, others).items():
            rest = dense.get_parameter(stack).detach() - sum(found[stack])
            left[way] += sum((x @ one.T).square().sum().item() for x, one in zip(inputs, rest, strict=True))
    assert left["descent"] < left["fitted"]


def test_from_disk_and_in_memory_they_are_the_same(mixture):
    model = AutoModelForCausalLM.from_pretrained(mixture / "model")
    tokenizer = small.tokenizer()
    there = loftq.calibrate(model, mixture / "text.txt", tokenizer, samples=24, max_length=64)
    stored = open_statistics(mixture / "full")
    assert set(stored.modules) == set(there.modules)
    assert stored.routed == there.routed
    stack = "model.layers.1.mlp.experts.down_proj"
    for e in range(4):
        assert small.away(stored.moments(f"{stack}.{e}").fit.columns, there.moments(f"{stack}.{e}").fit.columns) < 1e-5
    said = json.loads((mixture / "full" / "statistics.json").read_text())
    assert said["format_version"] == 2
    wrapped = loftq.get_peft_model(model, bits=2, rank=4, calibration=there, progress=False)
    assert models.outputs(wrapped).isfinite().all()


def test_a_budget_goes_by_what_experts_are_given(mixture, tmp_path):
    manifest = made(mixture, tmp_path / "out", calibrate=mixture / "full", bits=None, budget=3.3)
    stacks = {m["name"]: m for m in manifest["matrices"] if "experts" in m}
    assert len(stacks) == 4
    assert all(0 < m["output_errors"][-1] < m["output_errors"][0] for m in stacks.values())
