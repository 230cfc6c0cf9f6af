"""How small and how quick are packed experts, and what does quantizing them take? A layer of Qwen3-30B-A3B.

Its layer has 128 experts of 3 x 768 x 2048 weights; 8 of them take a token. 2 bits, rank 16, random weights.

Peer: the same layer in float32, by the two ways of transformers that run on a CPU: a loop over the experts (eager) and
grouped_mm; for LoRA on all experts PEFT's ParamWrapper on these dense stacks; for the error of the weights the paper's
LoftQ, expert by expert. Memory is the peak of a process of its own, weights and libraries included.

Goal: at most 0.145 of the bfloat16 bytes; 1.5 times the time of either for 1 and 16 tokens, 1.3 times for 512; with
LoRA, forward and backward, faster than PEFT's and in 0.3 of its memory; 12 GB of files in 12 minutes and 1.5 GiB.

With ``--layers 10`` these 12 GB are quantized, and not extrapolated to. Needs 16 GB of disk in TMPDIR.
"""

import gc
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import loftq
from harness import Bench, Versus, in_own_process, reset_peak, resident, save_shards
from loftq.kernels import backend
from loftq.nn.experts import pack_experts
from loftq.numerics import encode
from loftq.spec import QuantSpec
from streaming import IMPORTS, peak_of

BITS, RANK, LAYERS = 2, 16, 48
PACKED, EAGER, GROUPED, PEFT = "packed, 2 bits", "dense, eager", "dense, grouped_mm", "PEFT's ParamWrapper"
SLICE = 12e9  # bytes of the files that the goal is for
TOKENS = {1: 1 / 1.5, 16: 1 / 1.5, 512: 1 / 1.3}
SPEC = QuantSpec(bits=BITS, code="lloyd")
CASE = "128 experts of Qwen3-30B-A3B, 3 x 768 x 2048"


def configuration(quick: bool, layers: int = 1, experts: int = 128) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=128 if quick else 2048,
        moe_intermediate_size=64 if quick else 768,
        num_experts=8 if quick else experts,
        num_experts_per_tok=2 if quick else 8,
        num_hidden_layers=layers,
        num_attention_heads=4 if quick else 32,
        num_key_value_heads=4,
        head_dim=32 if quick else 128,
        architectures=["Qwen3MoeForCausalLM"],
    )


def dense_layer(quick: bool, count: int = 128) -> Any:
    experts: Any = Qwen3MoeExperts(configuration(quick, experts=count))
    draw = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data.normal_(0, 0.02, generator=draw)
        parameter.requires_grad_(False)
    return experts


def packed_layer(quick: bool, dense: Any = None, count: int = 128) -> Any:
    """With the weights of a dense one, or with random codes."""
    with torch.device("meta"):
        experts: Any = Qwen3MoeExperts(configuration(quick, experts=count))
    draw = torch.Generator().manual_seed(0)
    for name in [n for n, _ in experts.named_parameters()]:
        pack_experts(experts, name, SPEC, "cpu")
        for e, weight in enumerate(dense.get_parameter(name) if dense else ()):
            codes, _ = backend(weight.device, SPEC).quantize_residual(weight, weight, SPEC)
            experts.load_expert(name, e, encode(codes, SPEC))
    for parameter in () if dense else experts.parameters():
        parameter.data = (
            parameter.data.normal_(0, 0.01, generator=draw)
            if parameter.is_floating_point()
            else torch.randint(-128, 128, parameter.shape, dtype=torch.int8, generator=draw)
        )
    return experts


def routed(quick: bool, tokens: int, count: int = 128) -> tuple[torch.Tensor, ...]:
    """Hidden states, and of each token the experts and their weights."""
    config, draw = configuration(quick, experts=count), torch.Generator().manual_seed(1)
    scores = torch.rand(tokens, config.num_experts, generator=draw)
    weights, index = scores.topk(config.num_experts_per_tok)
    return torch.randn(tokens, config.hidden_size, generator=draw), index, weights.softmax(-1)


def with_lora(experts: nn.Module) -> Any:
    """All experts with LoRA, none of it zero."""
    holder = nn.ModuleDict({"experts": experts})
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(holder, LoraConfig(r=RANK, target_modules=[], target_parameters=targets))
    draw = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.02, generator=draw)
    return model.base_model.model["experts"]


def step_of(experts: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Callable[[], None]:
    hidden, index, weights = inputs

    def step() -> None:
        experts(hidden.clone().requires_grad_(), index, weights).square().mean().backward()
        for parameter in experts.parameters():
            parameter.grad = None

    return step


def sizes(bench: Bench) -> None:
    packed = packed_layer(bench.quick)
    stored = sum(p.nbytes for p in packed.parameters())
    bench.record(CASE, "bytes, scales included", [stored], "B")
    bench.record(CASE, "bytes / bfloat16's", [stored / 2 / packed.weight_count], "x", at_most=0.145)


def forwards(bench: Bench) -> None:
    dense = dense_layer(bench.quick)
    packed = packed_layer(bench.quick, dense)

    def called(experts: Any, way: str, inputs: tuple[torch.Tensor, ...]) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            experts.config._experts_implementation = way
            with torch.no_grad():
                return experts(*inputs)

        return call

    for tokens, goal in TOKENS.items():
        inputs = routed(bench.quick, tokens)
        sides = {
            PACKED: called(packed, "eager", inputs),
            EAGER: called(dense, "eager", inputs),
            GROUPED: called(dense, "grouped_mm", inputs),
        }
        versus = [Versus(PACKED, peer, goal) for peer in (EAGER, GROUPED)]
        bench.compare(f"forward, tokens: {tokens}", sides, versus, repeats=5)


def steps(bench: Bench) -> None:
    tokens, count = 64 if bench.quick else 512, bench.options["experts"]
    case = f"forward and backward, LoRA on all of {count} experts, tokens: {tokens}"
    dense, inputs = dense_layer(bench.quick, count), routed(bench.quick, tokens, count)
    dense.config._experts_implementation = "grouped_mm"
    sides = {
        PACKED: step_of(with_lora(packed_layer(bench.quick, count=count)), inputs),
        PEFT: step_of(with_lora(dense), inputs),
    }
    bench.compare(case, sides, [Versus(PACKED, PEFT, 1.0)], repeats=3)
    del sides, dense
    gc.collect()
    peaks = {side: in_own_process(peak_of_steps, side, bench.quick, tokens, count) for side in (PACKED, PEFT)}
    for side, peak in peaks.items():
        bench.record(case, f"peak memory, {side}", [peak["peak"]], "B")
        bench.record(case, f"of it, before there is a layer, {side}", [peak["libraries"]], "B")
    ratio = peaks[PACKED]["peak"] / peaks[PEFT]["peak"]
    bench.record(case, f"peak memory of {PACKED} / {PEFT}", [ratio], "x", at_most=0.3)


def peak_of_steps(side: str, quick: bool, tokens: int, count: int) -> dict[str, int]:
    """Bytes of this process before there is a layer, and at the peak of two steps."""
    libraries = resident()
    experts = packed_layer(quick, count=count) if side == PACKED else dense_layer(quick, count)
    experts.config._experts_implementation = "grouped_mm"
    step = step_of(with_lora(experts), routed(quick, tokens, count))
    reset_peak()
    step()
    step()
    return {"libraries": libraries, "peak": resident("VmHWM")}


def errors(bench: Bench) -> None:
    """Of a few experts: what is left of the weights."""
    dense = dense_layer(bench.quick)
    for name in ("gate_up_proj", "down_proj"):
        weights = dense.get_parameter(name)[:2]
        found = {
            preset: [loftq.quantize_weight(w, bits=BITS, rank=RANK, preset=preset).error for w in weights]
            for preset in ("loftq", "fitted")
        }
        ratios = [ours / theirs for ours, theirs in zip(found["fitted"], found["loftq"], strict=True)]
        case = f"error of the weights, {name}"
        bench.record(case, "the paper's LoftQ", found["loftq"], "")
        bench.record(case, "fitted", found["fitted"], "")
        bench.record(case, "fitted / the paper's LoftQ", ratios, "x")


def write_slice(directory: Path, config: Qwen3MoeConfig) -> int:
    """A checkpoint with one tensor for each expert, as it is published; a shard a layer. Bytes on disk."""
    config.save_pretrained(directory)
    draw = torch.Generator().manual_seed(0)
    hidden, inner, words = config.hidden_size, config.moe_intermediate_size, config.vocab_size
    wide, narrow = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=draw) * 0.02).bfloat16()

    def layer(at: str) -> dict[str, torch.Tensor]:
        attention = {"q": (wide, hidden), "k": (narrow, hidden), "v": (narrow, hidden), "o": (hidden, wide)}
        shard = {f"{at}self_attn.{n}_proj.weight": random(*shape) for n, shape in attention.items()}
        shard |= {f"{at}self_attn.{n}_norm.weight": torch.ones(config.head_dim).bfloat16() for n in "qk"}
        norms = ("input_layernorm", "post_attention_layernorm")
        shard |= {f"{at}{n}.weight": torch.ones(hidden).bfloat16() for n in norms}
        shard[f"{at}mlp.gate.weight"] = random(config.num_experts, hidden)
        for e in range(config.num_experts):
            for n, shape in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
                shard[f"{at}mlp.experts.{e}.{n}_proj.weight"] = random(*shape)
        return shard

    def shards() -> Iterator[dict[str, torch.Tensor]]:
        tables = {f"{n}.weight": random(words, hidden) for n in ("model.embed_tokens", "lm_head")}
        yield {**tables, "model.norm.weight": torch.ones(hidden).bfloat16()}
        yield from (layer(f"model.layers.{i}.") for i in range(config.num_hidden_layers))

    return save_shards(directory, shards(), config.num_hidden_layers + 1)


def quantizing(bench: Bench) -> None:
    layers, workers = bench.options["layers"], bench.threads
    with tempfile.TemporaryDirectory() as work:
        source, output = Path(work) / "source", Path(work) / "output"
        source.mkdir()
        size = write_slice(source, configuration(bench.quick, layers))
        began, before = time.perf_counter(), cpu_of_children()
        peak = peak_of(
            f"import loftq; loftq.quantize({str(source)!r}, {str(output)!r}, bits={BITS}, rank={RANK}, "
            f"preset='fitted', workers={workers})"
        )
        seconds, cpu = time.perf_counter() - began, cpu_of_children() - before
    case = f"quantizing {layers} of {LAYERS} layers, fitted, workers: {workers}"
    bench.record(case, "checkpoint", [size], "B")
    bench.record(case, "peak resident memory", [peak / 2**30], "GiB", at_most=1.5)
    bench.record(case, "of it, importing the libraries", [peak_of(IMPORTS) / 2**30], "GiB")
    whole = size >= SLICE
    bench.record(case, "wall time", [seconds / 60], "min", at_most=12 if whole else None)
    bench.record(case, "CPU time", [cpu / 60], "min")
    if not whole:
        half = [cpu / 120 * SLICE / size]
        bench.record(case, "CPU time of each of two cores, extrapolated to 12 GB", half, "min", at_most=12)
    bench.record(
        case, "CPU time of each of two cores, extrapolated to all layers", [cpu / 120 * LAYERS / layers], "min"
    )


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    bench = Bench(__file__, __doc__, layers=1, experts=128)
    torch.set_num_threads(bench.threads)
    if bench.threads == 1:
        bench.clock = time.process_time
        bench.note("Times are CPU seconds of one thread, since others worked on the machine.")
    for measure in (sizes, errors, forwards, steps, quantizing):
        bench.part(lambda measure=measure: measure(bench), measure.__name__)
    bench.finish()


if __name__ == "__main__":
    main()
