"""Does vLLM write what transformers does, from an exported directory, with and without the adapter?

In two steps, for vLLM has an environment of its own. A model in bfloat16 is quantized to 4 bits and exported, and
transformers writes its most probable tokens in float32; then vLLM does, in bfloat16, so that near the end of a text a
token may differ. What is compared is the tokens, and the log-probability of those before a difference.

    python benchmarks/vllm_tokens.py prepare --model MODEL --work DIR
    VLLM/bin/python benchmarks/vllm_tokens.py run --work DIR --output docs/data/vllm.json
"""

import argparse
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

TEXTS = ["The history of the city", "In 1990 , the team"]
COUNT = 16


def prepare(model: str, work: Path) -> None:
    import torch
    import transformers

    import loftq
    from harness import environment

    transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(work / "source")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.save_pretrained(work / "source")
    loftq.quantize(work / "source", work / "base", bits=4, serve="compressed-tensors", rank=16)
    loftq.export(work / "base", work / "served", to="compressed-tensors")
    plain = transformers.AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32).eval()
    found: dict[str, Any] = {}
    for name, one in (("base", plain), ("adapter", None)):
        one = one or loftq.load_start(plain, work / "base").eval()
        rows = found.setdefault(name, [])
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt").input_ids
            given = {"max_new_tokens": COUNT, "do_sample": False, "return_dict_in_generate": True}
            made = one.generate(ids, output_scores=True, **given)
            tokens = made.sequences[0, ids.shape[1] :].tolist()
            steps = zip(made.scores, tokens, strict=True)
            rows.append([tokens, [score[0].log_softmax(-1)[token].item() for score, token in steps]])
    told = {"environment": environment(), "model": Path(model).name, "wanted": found}
    (work / "wanted.json").write_text(json.dumps(told))


def run(work: Path, output: Path) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
    from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

    served = str(work / "served")
    sizes = {"max_model_len": 256, "max_num_seqs": 2}
    model = LLM(served, dtype="bfloat16", enforce_eager=True, enable_lora=True, max_lora_rank=16, **sizes)
    told, rows = json.loads((work / "wanted.json").read_text()), []
    wanted = told.pop("wanted")
    for name, lora in (("base", None), ("adapter", LoRARequest("tuned", 1, f"{served}/adapter"))):
        parameters = SamplingParams(temperature=0, max_tokens=COUNT, logprobs=1)
        for text, made, (tokens, probabilities) in zip(
            TEXTS, model.generate(TEXTS, parameters, lora_request=lora), wanted[name], strict=True
        ):
            ids = list(made.outputs[0].token_ids)
            same = next((i for i, pair in enumerate(zip(ids, tokens, strict=True)) if pair[0] != pair[1]), len(ids))
            found = [step[token].logprob for step, token in zip(made.outputs[0].logprobs, ids, strict=True)]
            apart = max((abs(a - b) for a, b in zip(found[:same], probabilities[:same], strict=True)), default=0.0)
            rows.append({"with": name, "text": text, "tokens alike": same, "of": COUNT, "log-probability": apart})
            print(rows[-1], flush=True)
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version("vllm-cpu")
    output.write_text(json.dumps({**told, "vllm": version, "rows": rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "run"))
    parser.add_argument("--model", help="a decoder in one directory")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    prepare(given.model, given.work) if given.step == "prepare" else run(given.work, given.output)


if __name__ == "__main__":
    main()
