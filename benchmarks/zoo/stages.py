"""The way of one tiny model through ``loftq``, stage by stage, each against what the dense model gives."""

import copy
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import loftq
from loftq.checkpoint.verify import verify
from loftq.errors import LoftqError
from loftq.nn.experts import PackedExperts
from loftq.nn.layers import Packed, PackedWeight
from zoo import configs, inputs, outputs

MOST_PARAMETERS = 40_000_000
MOST_CLASSES = 3  # tried, of a family
MOST_SECONDS = 8  # of a processor, after which no other class, shrinkage or inputs are tried
REPEATED = 1e-5  # the same weights at other places in memory
JUMPS = "nothing can be compared: weights that differ by 1e-6 move outputs of the dense model by {:.0e} (a top-k)"
WORKS, REFUSED, DEFECT, NOT_BUILT, UPSTREAM = "works", "refused", "DEFECT", "not built", "not in transformers"


class NotBuilt(Exception):
    """This script found no configuration or no inputs with which the dense model runs."""


class Upstream(Exception):
    """The dense model alone fails in the same way."""


@dataclass
class Journey:
    """One family on its way.

    Attributes:
        tell: called before every stage with the report.
        report: what is known so far; every stage that passed is in it.
        dense: the tiny model; ``expected``, with the dequantized weights; ``sum``, with Q + s·BA.
        model: the packed model; ``packed``, its packed layers.
        started: the packed model under its adapter, which sits on the layers ``adapted``.
        outputs: of ``started``, at the start and after the adapter has been changed.
    """

    model_type: str
    directory: Path
    tell: Callable[[dict[str, Any]], object] = lambda report: None
    report: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    dense: Any = None
    expected: Any = None
    sum: Any = None
    model: Any = None
    packed: dict[str, Any] = field(default_factory=dict)
    started: Any = None
    adapted: dict[str, Any] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        """Every stage, or up to the first that fails; never raises."""
        self.report = {"family": self.model_type, "outcome": DEFECT, "stage": "", "passed": [], "why": ""}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                for stage in STAGES:
                    self.report["stage"] = stage.__name__.removeprefix("_")
                    self.tell(self.report)
                    stage(self)
                    self.report["passed"].append(self.report["stage"])
                self.report["outcome"] = WORKS
            except NotBuilt as e:
                self._ended(NOT_BUILT, str(e))
            except Upstream as e:
                self._ended(UPSTREAM, str(e))
            except LoftqError as e:
                before = self.report["stage"] == "quantize"
                self._ended(REFUSED if before else DEFECT, f"{type(e).__name__}: {e}")
            except outputs.Failed as e:
                jump = self._jump() if isinstance(e, outputs.Differ) else 0.0
                self._ended(NOT_BUILT if jump else DEFECT, JUMPS.format(jump) if jump else str(e))
            except Exception as e:
                self._ended(DEFECT, f"{_said(e)} [{_where(e)}]")
        return self.report

    def _jump(self) -> float:
        """How far a dense model's outputs move when its weights do by a millionth; 0 if it computes continuously."""
        found = [outputs.moved(model, self.inputs) for model in (self.dense, self.expected, self.sum) if model]
        worst = max(found, default=0.0)
        return worst if worst > outputs.TOLERANCE else 0.0

    def _ended(self, outcome: str, why: str) -> None:
        self.report.update(outcome=outcome, why=why[:600])

    def forward(self, model: Any) -> list[Tensor]:
        return outputs.computed(model, self.inputs)

    def load(self) -> Any:
        return type(self.dense).from_pretrained(self.output)

    def start(self) -> Any:
        return PeftModel.from_pretrained(self.load(), self.output, subfolder="loftq_init", is_trainable=True)

    @property
    def source(self) -> Path:
        return self.directory / "dense"

    @property
    def output(self) -> Path:
        return self.directory / "quantized"


def _build(journey: Journey) -> None:
    """A dense model that computes something finite, of the first class and shrinkage that give one."""
    names, tried, began = configs.classes(journey.model_type), [], time.process_time()
    for name in names[:MOST_CLASSES]:
        cls = getattr(transformers, name, None)
        why = inputs.unreachable(cls)
        if why:
            tried.append(f"{name}: {why}")
            continue
        for shrinkage in configs.SHRINKAGES:
            if time.process_time() - began > MOST_SECONDS:
                break
            try:
                model = _model(cls, journey.model_type, shrinkage)
                journey.inputs = _inputs_for(model, journey.model_type)
            except Exception as e:
                tried.append(f"{name}, {shrinkage}: {_said(e)}")
                continue
            journey.dense = model
            journey.report.update({"class": name, "shrinkage": shrinkage, "parameters": _count(model)})
            journey.report["inputs"] = sorted(journey.inputs)
            return
    raise NotBuilt("; ".join(dict.fromkeys(tried)) or "no model class of its own")


def _model(cls: Any, model_type: str, shrinkage: str) -> Any:
    config = _own(configs.tiny(CONFIG_MAPPING[model_type], model_type, shrinkage), cls)
    with torch.device("meta"):
        count = _count(cls(copy.deepcopy(config)))
    if count > MOST_PARAMETERS:
        raise NotBuilt(f"{count / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def _own(config: Any, cls: Any) -> Any:
    """The configuration that ``cls`` is made of: this, or one nested in it."""
    wanted = cls.config_class
    nested = [v for v in vars(config).values() if hasattr(v, "to_dict")]
    found = [config, *nested] if isinstance(wanted, type) else [config]
    return next((c for c in found if not isinstance(wanted, type) or isinstance(c, wanted)), config)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _inputs_for(model: Any, model_type: str) -> dict[str, Any]:
    errors: list[str] = []
    began = time.process_time()
    for first in inputs.candidates(model, model_type):
        if errors and time.process_time() - began > MOST_SECONDS:
            break
        candidate, found = first, None
        while found is None and candidate is not None:
            try:
                found = outputs.computed(model, candidate)
            except Exception as e:
                errors.append(f"{{{', '.join(candidate)}}}: {_said(e)}")
                candidate = inputs.refitted(candidate, str(e)) if candidate is first else None
        if candidate is None or found is None:
            continue
        if not found:
            errors.append("no outputs")
        elif not all(f.isfinite().all() or _masks(f) for f in found):
            errors.append("outputs that are not finite")
        else:
            return candidate
    reasons = list(dict.fromkeys([*errors[:1], *errors[-1:]]))
    raise NotBuilt(" | ".join(reasons) or f"no inputs known for {model.main_input_name}")


def _masks(output: Tensor) -> bool:
    """Infinities on purpose, as some heads put out for what is masked; NaN never."""
    return not output.isnan().any() and bool(output.isfinite().any())


def _saved(journey: Journey) -> None:
    """transformers saves the dense model and reads it back."""
    journey.dense.save_pretrained(journey.source)
    try:
        again = type(journey.dense).from_pretrained(journey.source).eval()
        difference = outputs.difference(journey.forward(again), journey.forward(journey.dense))
    except Exception as e:
        raise Upstream(f"saved by transformers, it does not load: {_said(e)}") from e
    if difference > outputs.TOLERANCE:
        raise Upstream(f"saved and loaded by transformers, it gives other outputs (by {difference:.1e})")
    journey.dense = again  # some classes make what stands for padding zero on loading


def _quantize(journey: Journey) -> None:
    options = {"bits": 4, "rank": 4, "rank_policy": "clamp", "workers": 1}
    try:
        manifest = loftq.quantize(journey.source, journey.output, **options)
    except LoftqError as e:
        if "less than" not in str(e) or "coverage" not in str(e):
            raise
        journey.report["asked"] = "--min-coverage 0"
        manifest = loftq.quantize(journey.source, journey.output, **options, min_coverage=0.0)
    plan = manifest["plan"]
    done = sum(m.get("experts", 1) * m["shape"][0] * m["shape"][1] for m in plan["matrices"])
    missed: dict[str, int] = {}
    for kept in plan["kept"]:
        if kept["missed"]:
            missed[kept["reason"]] = missed.get(kept["reason"], 0) + torch.Size(kept["shape"]).numel()
    journey.report["matrices"] = len(plan["matrices"])
    journey.report["coverage"] = round(done / (done + sum(missed.values())), 4)
    journey.report["missed"] = sorted(missed, key=lambda reason: -missed[reason])[:3]
    packed = {m["name"] for m in plan["matrices"]}
    routers = [n for n in packed if {"router", "gate"} & set(n.split(".")[:-1])]
    journey.report["routers"] = routers[:2]


def _verify(journey: Journey) -> None:
    verify(journey.output)


def _load(journey: Journey) -> None:
    load = transformers.PreTrainedModel.from_pretrained.__func__  # what a class overrides it with may not tell
    model, info = load(type(journey.dense), journey.output, output_loading_info=True)
    _, dense = load(type(journey.dense), journey.source, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        odd = set(map(str, info[kind])) - set(map(str, dense[kind]))
        if odd:
            raise outputs.Failed(f"{kind}: {sorted(odd)[:3]}")
    journey.packed = _packed(model)
    if len(journey.packed) != journey.report["matrices"]:
        raise outputs.Failed(f"{len(journey.packed)} packed layers of {journey.report['matrices']} matrices")
    journey.model = model.eval()


def _forward(journey: Journey) -> None:
    """The packed model computes what the dense model with dequantized weights computes."""
    journey.expected = _substituted(_rounded(journey), {n: _dequantized(m, n) for n, m in journey.packed.items()})
    outputs.compare(journey.forward(journey.model), journey.forward(journey.expected), "packed against dequantized")


def _initialization(journey: Journey) -> None:
    """Plain PEFT puts the initialization on every packed layer and computes Q + s·BA."""
    journey.started = journey.start().eval()
    journey.adapted = _adapted(journey.started)
    missing = set(journey.packed) - {n for n, m in journey.adapted.items() if isinstance(m.get_base_layer(), Packed)}
    if missing:
        raise outputs.Failed(
            f"no adapter on {len(missing)} of {len(journey.packed)} packed layers: {sorted(missing)[:3]}"
        )
    if set(journey.adapted) - set(journey.packed):
        raise outputs.Failed(
            f"an adapter on what is not packed: {sorted(set(journey.adapted) - set(journey.packed))[:3]}"
        )
    zero = [n for n, m in journey.adapted.items() if not _delta(m).abs().max()]
    if zero:
        raise outputs.Failed(f"the initialization is zero on {len(zero)} layers: {zero[:3]}")
    values = _sums(journey.adapted)
    journey.sum = _substituted(journey.expected, values)
    journey.outputs = journey.forward(journey.started)
    outputs.compare(journey.outputs, journey.forward(journey.sum), "initialization against Q + sBA")


def _load_start(journey: Journey) -> None:
    model = loftq.load_start(journey.load(), journey.output).eval()
    if set(_adapted(model)) != set(journey.adapted):
        raise outputs.Failed("load_start adapts other layers than PEFT")
    outputs.compare(journey.forward(model), journey.outputs, "load_start against PEFT")


def _backward(journey: Journey) -> None:
    """Every adapter gets a gradient whose layer would get one in the dense model."""
    reference = journey.sum.requires_grad_(True)
    try:
        able = outputs.backpropagate(reference, journey.inputs)
    except Exception:  # changes in place of what a gradient needs, or only in training mode
        able = False
    if not able:
        journey.report["unused"] = "all: the dense model has no gradient"
        return
    journey.started.zero_grad()
    if not outputs.backpropagate(journey.started, journey.inputs):
        raise outputs.Failed("no gradient from the outputs to any adapter")
    used = {n for n in journey.adapted if outputs.has_gradient([_weight(reference, n)])}
    got = {
        n
        for n, m in journey.adapted.items()
        if outputs.has_gradient(p for k, p in m.named_parameters() if k.startswith("lora_"))
    }
    if used - got:
        raise outputs.Failed(
            f"no gradient in {len(used - got)} adapters of {len(journey.adapted)}: {sorted(used - got)[:3]}"
        )
    journey.report["unused"] = len(journey.adapted) - len(got)
    journey.report["unused_names"] = sorted(set(journey.adapted) - got)[:2]
    reference.zero_grad()


def _train_mode(journey: Journey) -> None:
    """A step in training mode too, where the dense model takes one on these inputs without labels."""
    try:
        able = outputs.backpropagate(journey.sum.train(), journey.inputs)
    except Exception:
        able = False
    journey.sum.eval().requires_grad_(False)
    if not able:
        journey.report["train_mode"] = "not without labels"
        return
    averages = [b.clone() for b in journey.started.buffers()]
    outputs.backpropagate(journey.started.train(), journey.inputs)
    journey.started.eval().zero_grad()
    for buffer, before in zip(journey.started.buffers(), averages, strict=True):
        buffer.copy_(before)  # what batch normalization has counted


def _adapter_saved(journey: Journey) -> None:
    with torch.no_grad():
        for name, parameter in journey.started.named_parameters():
            if parameter.requires_grad and "lora_" in name:
                parameter.mul_(1.01)
    journey.outputs = journey.forward(journey.started)
    journey.started.save_pretrained(journey.directory / "adapter")
    again = PeftModel.from_pretrained(journey.load(), journey.directory / "adapter").eval()
    outputs.same(_factors(again), _factors(journey.started), "adapter saved and loaded")
    outputs.compare(journey.forward(again), journey.outputs, "adapter saved and loaded", REPEATED)


def _packed_saved(journey: Journey) -> None:
    journey.model.save_pretrained(journey.directory / "again")
    again = type(journey.dense).from_pretrained(journey.directory / "again").eval()
    outputs.same(again.state_dict(), journey.model.state_dict(), "packed model saved and loaded")
    outputs.compare(journey.forward(again), journey.forward(journey.model), "packed model saved and loaded", REPEATED)


def _generate(journey: Journey) -> None:
    if not getattr(journey.dense, "can_generate", lambda: False)():
        return
    given = {k: v for k, v in journey.inputs.items() if not k.startswith("decoder_")}
    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": 1}

    def words(model: Any) -> Any:
        torch.manual_seed(0)
        with torch.no_grad():
            return model.generate(**copy.deepcopy(given), **options)

    try:
        expected = words(journey.expected)
    except Exception as e:
        journey.report["generate"] = f"not with these inputs: {_said(e)}"
        return
    got = words(journey.model)
    words(journey.started)
    if isinstance(got, Tensor) and not (got.shape == expected.shape and torch.equal(got, expected)):
        raise outputs.Failed("other tokens are generated than by the dequantized model")
    journey.report["generate"] = "yes"


def _merge(journey: Journey) -> None:
    merged = journey.started.merge_and_unload().eval()
    if any(isinstance(m, Packed) for m in merged.modules()):
        raise outputs.Failed("packed layers are left after merging")
    outputs.compare(journey.forward(merged), journey.outputs, "merged")
    merged.save_pretrained(journey.directory / "merged")
    again = type(journey.dense).from_pretrained(journey.directory / "merged").eval()
    try:
        outputs.compare(journey.forward(again), journey.outputs, "merged, saved and loaded")
    except outputs.Differ:
        if _dense_merges_wrongly(journey):
            raise Upstream("merged by PEFT and saved, the dense model too gives other outputs when loaded") from None
        raise


def _dense_merges_wrongly(journey: Journey) -> bool:
    """Whether plain LoRA on the dense model, merged and saved, comes back as another model."""
    stacks = [n for n, m in journey.packed.items() if isinstance(m, PackedExperts)]
    lora = LoraConfig(r=4, target_modules=sorted({*journey.packed} - {*stacks}), target_parameters=stacks)
    merged = get_peft_model(copy.deepcopy(journey.dense), lora).merge_and_unload().eval()
    merged.save_pretrained(journey.directory / "dense-merged")
    again = type(journey.dense).from_pretrained(journey.directory / "dense-merged").eval()
    return outputs.difference(journey.forward(again), journey.forward(merged)) > outputs.TOLERANCE


def _in_memory(journey: Journey) -> None:
    """``loftq.get_peft_model`` packs these layers of the model in memory too, and computes Q + s·BA."""
    options = {"min_coverage": 0.0} if "asked" in journey.report else {}
    model = type(journey.dense).from_pretrained(journey.source).eval()
    wrapped = loftq.get_peft_model(model, bits=4, rank=4, rank_policy="clamp", workers=1, progress=False, **options)
    adapted = _adapted(wrapped)
    if set(journey.adapted) - set(adapted):  # it may have more: what transformers converts only on loading
        raise outputs.Failed("get_peft_model leaves out layers that the files have")
    expected = _substituted(journey.dense, _sums(adapted))
    outputs.compare(journey.forward(wrapped.eval()), journey.forward(expected), "get_peft_model against Q + sBA")


STAGES: tuple[Callable[[Journey], None], ...] = (
    _build, _saved, _quantize, _verify, _load, _forward, _initialization, _load_start, _backward, _train_mode,
    _adapter_saved, _packed_saved, _generate, _merge, _in_memory,
)  # fmt: skip


def _packed(model: nn.Module) -> dict[str, Any]:
    """What is packed: layers by their names, and modules of experts by the names of each of their stacks."""
    named = dict(model.named_modules())
    stacks = {f"{n}.{stack}": m for n, m in named.items() if isinstance(m, PackedExperts) for stack in m.stacks}
    return {n: m for n, m in named.items() if isinstance(m, PackedWeight)} | stacks


def _dequantized(module: Any, name: str) -> Tensor:
    if isinstance(module, PackedExperts):
        return module.dense(name.rpartition(".")[2], torch.float32)
    return module.dequantize()


def _weight(model: nn.Module, name: str) -> Any:
    """The dense weight of a layer, or the stack of this name."""
    owner, _, leaf = name.rpartition(".")
    parent: Any = model.get_submodule(owner)
    return parent._parameters[leaf] if leaf in parent._parameters else model.get_submodule(name).weight


def _adapted(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers, by the names of the layers or stacks under them."""
    found = {}
    for name, m in model.named_modules():
        if isinstance(m, BaseTunerLayer):
            stack = f".{m.parameter_name}" if isinstance(m, ParamWrapper) else ""
            found[name.removeprefix("base_model.model.").replace(".base_layer", "") + stack] = m
    return found


def _sums(adapted: dict[str, Any]) -> dict[str, Tensor]:
    """Q + s·BA of every layer."""
    return {name: _dequantized(m.get_base_layer(), name) + _delta(m) for name, m in adapted.items()}


def _rounded(journey: Journey) -> Any:
    """The dense model with what is not quantized as the packed model has it: rounded to bfloat16, at the most."""
    model, held = copy.deepcopy(journey.dense), journey.model.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            found = held.get(name)
            if found is None or found.dtype != tensor.dtype or found.shape != tensor.shape:
                continue
            if not torch.allclose(found, tensor, rtol=2**-8, atol=1e-30, equal_nan=True):
                raise outputs.Failed(f"{name} is kept, and has other values")
            tensor.copy_(found)
    return model


def _delta(layer: Any) -> Tensor:
    """s·BA, ``(out, in)`` or a table's shape."""
    delta = layer.get_delta_weight("default").detach()
    return delta.T if getattr(layer, "fan_in_fan_out", False) else delta


def _substituted(dense: nn.Module, values: dict[str, Tensor]) -> Any:
    from transformers.pytorch_utils import Conv1D

    model = copy.deepcopy(dense)
    with torch.no_grad():
        for name, value in values.items():
            turned = isinstance(dict(model.named_modules()).get(name), Conv1D)
            _weight(model, name).copy_(value.T if turned else value)
    return model


def _factors(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if "lora_" in n}


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {' '.join(lines)[:300] if lines else ''}"


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    last = next((f for f in reversed(frames) if "loftq" in f.filename), frames[-1])
    deep = frames[-1]
    return f"{Path(last.filename).name}:{last.lineno}, {Path(deep.filename).name}:{deep.lineno}"


def journey(model_type: str, tell: Callable[[dict[str, Any]], object] = lambda report: None) -> dict[str, Any]:
    """The whole way of one family, in a directory that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="zoo-") as directory:
        return Journey(model_type, Path(directory), tell).run()
