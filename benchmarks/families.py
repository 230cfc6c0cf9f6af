"""Every model type of transformers, tiny and random, from plan to merge: what works, what is refused, what is wrong?

Each family goes the way of ``zoo/stages.py`` in a process of its own, with limits of time and memory. Results are
appended to a file as they come, so a sweep that was stopped goes on where it was; ``--again DEFECT`` repeats what
ended so, ``--older`` what was found at another commit, of all families or of those that are named. ``--page
docs/families.md`` makes the page of that file, and leaves one result of every family in it.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "data" / "families.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types [default: all]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file that results are appended to")
    parser.add_argument("--page", type=Path, help="make this page of the results, and run nothing")
    parser.add_argument("--again", action="append", default=[], metavar="OUTCOME", help="also families that ended so")
    parser.add_argument("--older", action="store_true", help="also families whose result is of another commit")
    parser.add_argument("--seconds", type=float, default=25, help="limit of one family, of a processor")
    parser.add_argument("--gigabytes", type=float, default=3, help="likewise")
    parser.add_argument("--shard", type=int, default=0, help="this of several sweeps that share the work")
    parser.add_argument("--shards", type=int, default=1, help="how many sweeps share it")
    parser.add_argument("--commit", help="what to write down as the commit")
    options = parser.parse_args()
    if options.page:
        from zoo import configs, page

        reduce(options.results)
        options.page.write_text(page.page(read(options.results), len(configs.types())), encoding="utf-8")
        return
    sweep(options)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last result of every family."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {r["family"]: r for r in map(json.loads, lines)}


def reduce(path: Path) -> None:
    """Leave the last result of every family, in the order of their names."""
    results = read(path)
    text = "".join(json.dumps(results[family]) + "\n" for family in sorted(results))
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def sweep(options: argparse.Namespace) -> None:
    from zoo import configs

    wanted = options.families or configs.types()[options.shard :: options.shards]
    known, commit = read(options.results), options.commit or _commit()
    if options.older:
        wanted = [f for f in wanted if f not in known or known[f]["commit"] != commit]
    elif not options.families:
        wanted = [f for f in wanted if f not in known or known[f]["outcome"] in options.again]
    preload()
    written = {"commit": commit, "versions": _versions()}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for i, family in enumerate(wanted):
        began = time.monotonic()
        result = in_child(family, options.seconds, options.gigabytes)
        result = {**result, **written, "seconds": round(time.monotonic() - began, 1)}
        result = {k: v for k, v in result.items() if v not in ([], "") and k != "passed"}
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        said = f"{result['outcome']} {result.get('stage', '')} {result.get('why', '')[:150]}"
        print(f"{i + 1}/{len(wanted)} {family}: {said}", flush=True)


def _commit() -> str:
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return run.stdout.strip()


def _versions() -> str:
    names = ("transformers", "peft", "torch", *(["timm"] if importlib.util.find_spec("timm") else []))
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def preload() -> None:
    """What every child needs, imported once, kernels compiled."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for module in ("peft", "zoo.stages", "loftq.checkpoint.quantize", "transformers.generation"):
        importlib.import_module(module)
    import loftq

    loftq.quantize_weight(torch.randn(64, 64), bits=4, rank=4)


def in_child(family: str, seconds: float, gigabytes: float) -> dict[str, Any]:
    """The journey of one family in a forked process, which is ended at its limits."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
        from zoo.stages import journey

        with os.fdopen(writer, "w", buffering=1) as pipe:
            result = journey(family, lambda report: pipe.write(json.dumps(report) + "\n"))
            pipe.write(json.dumps({**result, "done": True}) + "\n")
        os._exit(0)
    os.close(writer)
    why = _watched(pid, 10 * seconds, gigabytes)
    with os.fdopen(reader) as pipe:
        lines = pipe.read().splitlines()
    result = json.loads(lines[-1]) if lines else {"family": family, "outcome": "DEFECT", "stage": "", "passed": []}
    if not result.pop("done", False):
        result["why"] = why
        if result["stage"] in ("", "build") or why.startswith("over the limit"):
            result["outcome"] = "not built"
    return result


def _watched(pid: int, seconds: float, gigabytes: float) -> str:
    """Wait for a child; kill it at its limits. Why it ended early, if it did."""
    ends, why = time.monotonic() + seconds, ""
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            return why or ("over the limit of time" if code == -signal.SIGXCPU else f"ended with {code}")
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            pages = 0
        if time.monotonic() > ends or pages * os.sysconf("SC_PAGE_SIZE") > gigabytes * 2**30:
            why = why or ("over the limit of time" if time.monotonic() > ends else "over the limit of memory")
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    main()
