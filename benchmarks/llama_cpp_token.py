"""How fast is one token generated on a CPU beside llama.cpp, on the same weights and on one thread?

Peer: llama.cpp through llama-cpp-python, on the same model in float16, on the exports of the packed directories (the
same codes: Q4_0, and TQ2_0 with blocks of 256 weights), and dense bfloat16 weights in transformers. All with a LoRA of
rank 16 on every linear layer, then without one.

Goal: at 4 and at 2 bits 0.8 times the speed of llama.cpp's float16, and 0.5 times that of its Q4_0. A Llama of 5
layers, hidden 2048, 0.27 billion weights; a token after a prompt of 8, in bfloat16 on our side. With hidden 256 its
weights are next to nothing: that is what the calls take.

It needs `loftq[gguf]` and llama-cpp-python; LLAMA_CPP_LIB_PATH, which the latter reads, is where another libllama lies.
"""

import contextlib
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from peft import LoraConfig, get_peft_model

import loftq
from after_training import LlamaCpp, as_gguf
from generate import PROMPT, RANK, Shape, one_token
from harness import Bench, Versus
from models import llama

AUTO = transformers.AutoModelForCausalLM
DENSE, LOFTQ4, LOFTQ2 = "dense, bfloat16", "loftq 4 bits, bfloat16", "loftq 2 bits, bfloat16"
F16, Q4, Q2 = "llama.cpp F16", "llama.cpp Q4_0", "llama.cpp TQ2_0"
PACKED = {LOFTQ4: (Q4, {"bits": 4, "block_size": 32}), LOFTQ2: (Q2, {"bits": 2, "block_size": 256})}
VERSUS = [
    *(Versus(side, F16, 0.8) for side in PACKED),
    *(Versus(side, Q4, 0.5) for side in PACKED),
    Versus(LOFTQ2, Q2),
    *(Versus(side, DENSE) for side in PACKED),
]


def vocabulary(place: Path) -> None:
    """A tokenizer of bytes and some merges: a file of llama.cpp's must have one."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=256 + 16, initial_alphabet=letters, show_progress=False)
    inner.train_from_iterator([__doc__ or ""], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(place)


def adapted(model: Any, place: Path) -> Any:
    """With a LoRA whose ``B`` is not zero, so that no side can leave it out; saved in ``place``."""
    tuned = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.01)
    tuned.save_pretrained(place)
    return tuned


def one_more(cpp: LlamaCpp, file: Path, lora: Path | None) -> Callable[[], Any]:
    """A call that makes one token after a prompt, as ours do."""
    model = cpp.load(file, lora)
    model.eval(list(range(PROMPT)))

    def call() -> None:
        model.n_tokens = PROMPT  # what is behind is forgotten
        model.eval([PROMPT])

    return call


def speed(bench: Bench, shape: Shape, versus: list[Versus]) -> None:
    """All sides in turn, with the adapter and without; all are in memory."""
    cpp, told = LlamaCpp(None), [Versus(v.side, v.peer) for v in VERSUS]
    case, repeats = f"one token, hidden {shape[0]}, {shape[1]} layers, 1 thread", 3 if bench.quick else 15
    with tempfile.TemporaryDirectory() as work:
        ours, files, loras = made(Path(work), shape)
        calls = {side: one_token(model) for side, model in ours.items()}
        theirs = {side: one_more(cpp, file, loras[side]) for side, file in files.items()}
        bench.compare(case, {**calls, **theirs}, versus, repeats=repeats, number=2)
        theirs = {side: one_more(cpp, file, None) for side, file in files.items()}
        with contextlib.ExitStack() as switched_off:
            for model in ours.values():
                switched_off.enter_context(model.disable_adapter())
            bench.compare(f"{case}, without adapter", {**calls, **theirs}, told, repeats=repeats, number=2)


def made(work: Path, shape: Shape) -> tuple[dict[str, Any], dict[str, Path], dict[str, Path]]:
    """Our models; files of llama.cpp's, and their adapters."""
    llama(*shape, "float16").save_pretrained(work / "dense")
    vocabulary(work / "dense")
    files = {F16: as_gguf(work / "dense", work / "f16")}
    ours = {DENSE: adapted(AUTO.from_pretrained(work / "dense", dtype=torch.bfloat16), work / "dense-lora")}
    loras = {}
    for side, (theirs, options) in PACKED.items():
        base, run, out = (work / f"{what}-{options['bits']}" for what in ("base", "lora", "gguf"))
        given = {"serve": "gguf", "code": "int", "preset": "qlora", "rank": RANK, "workers": 1, "progress": False}
        loftq.quantize(work / "dense", base, **given, **options)
        ours[side] = adapted(AUTO.from_pretrained(base, dtype=torch.bfloat16), run)
        loftq.export(base, out, to="gguf", adapter=run, progress=False)
        files[theirs], loras[theirs] = out / "model.gguf", out / "adapter.gguf"
    return ours, files, {F16: loras[Q4], **loras}


def main() -> None:
    bench = Bench(__file__, __doc__)
    if importlib.util.find_spec("llama_cpp") is None:
        bench.console.print("skipped, nothing is written: there is no llama-cpp-python")
        return
    torch.set_num_threads(1)
    bench.clock = time.process_time
    bench.note("Times are CPU seconds of one thread, since others worked on the machine.")
    module = LlamaCpp(None).module
    features = module.llama_print_system_info().decode().replace(" = 1", "").strip(" |")
    bench.note(f"llama.cpp of llama-cpp-python {module.__version__}: {features}.")
    if not bench.quick:
        bench.part(lambda: speed(bench, (2048, 5, 4096), VERSUS), "one token")
    bench.part(lambda: speed(bench, (256, 5, 512), []), "one token of small matrices")
    bench.finish()


if __name__ == "__main__":
    main()
