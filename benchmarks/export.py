"""How much memory, and how long, does an export take? It should be one matrix, however many layers there are.

A Llama of random weights is quantized to 2 bits (nearest codes; the start does not matter here) and exported, each
export in a process of its own. Peak is of the whole process, libraries included.

Goal: at most 1 GiB for a 2-bit directory of a 13 GB model, whose matrices have these sizes.

    python benchmarks/export.py                       # matrices of Llama 2 7B, one layer and two
    python benchmarks/export.py --hidden 1024 --inner 2816 --layers 2,8
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from harness import ROOT, environment, in_own_process, reset_peak, resident

TARGETS = ("gguf", "compressed-tensors", "mlx", "merge")


def prepared(place: str, hidden: int, inner: int, vocabulary: int, layers: int) -> int:
    """A base that every container holds; how many weights the model has."""
    import transformers

    import loftq

    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "vocab_size": vocabulary, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 128, "num_key_value_heads": hidden // 128}
    torch.set_default_dtype(torch.float16)  # as the scales of GGUF are, so that the others hold them too
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    model.save_pretrained(f"{place}/source")
    _tokenizer(vocabulary).save_pretrained(f"{place}/source")
    given = {"bits": 2, "serve": "gguf", "preset": "qlora", "rank": 16, "workers": 1, "progress": False}
    loftq.quantize(f"{place}/source", f"{place}/base", **given)
    return sum(parameter.numel() for parameter in model.parameters())


def _tokenizer(vocabulary: int) -> Any:
    import tokenizers
    import transformers

    inner = tokenizers.Tokenizer(tokenizers.models.BPE({f"t{i}": i for i in range(vocabulary)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner)


def exported(place: str, to: str) -> dict[str, Any]:
    """Peak and seconds of one export."""
    import transformers  # noqa: F401  # what is imported is no part of the time

    import loftq

    torch.set_num_threads(1)
    reset_peak()
    before, begun = resident(), time.perf_counter()
    base, output = f"{place}/base", f"{place}/out-{to}"
    if to == "merge":
        loftq.merge(base, output, progress=False)
    else:
        loftq.export(base, output, to=to, progress=False)
    seconds = time.perf_counter() - begun
    size = sum(path.stat().st_size for path in Path(output).rglob("*") if path.is_file())
    return {"before": before, "peak": resident("VmHWM"), "seconds": round(seconds, 2), "written": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--layers", default="1,2", help="several numbers, to see whether the peak grows")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "data" / "export.json")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for layers in map(int, given.layers.split(",")):
        with tempfile.TemporaryDirectory() as place:
            weights = in_own_process(prepared, place, given.hidden, given.inner, given.vocabulary, layers)
            for to in TARGETS:
                row = {"to": to, "layers": layers, "weights": weights, **in_own_process(exported, place, to)}
                rows.append(row)
                print(f"{layers} layers, {to}: peak {row['peak'] / 2**20:.0f} MiB, {row['seconds']} s", flush=True)
    sizes = {"hidden": given.hidden, "inner": given.inner, "vocabulary": given.vocabulary}
    result = {"environment": environment(), "sizes": sizes, "rows": rows}
    given.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {given.output}")


if __name__ == "__main__":
    main()
