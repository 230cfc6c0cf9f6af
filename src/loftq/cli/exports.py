"""Verbs on what was trained: merge, export, generate."""

from typing import Annotated, Any

import typer

from loftq.cli.app import app
from loftq.cli.options import Directory, Output, quiet_transformers, takes
from loftq.errors import UsageError, quoted
from loftq.options import fields_of
from loftq.serving.options import Exporting, Generating, Merging


@app.command()
@takes(Merging)
def merge(
    directory: Directory,
    output: Output,
    max_shard_size: Annotated[str, typer.Option(help="Size of the largest file: 500MB, 2GB.")] = "5GB",
    **given: Any,
) -> None:
    """Merge an adapter into the quantized weights, as a plain dense checkpoint; one matrix is in memory at a time."""
    from loftq import verbs
    from loftq.planning import parse_size

    quiet_transformers()
    largest = parse_size("--max-shard-size", max_shard_size)
    made = verbs.merge(directory, output, max_shard_bytes=largest, **given)
    print(f"{quoted(output)}: {made.line}")


@app.command()
@takes(Exporting)
def export(
    directory: Directory,
    output: Output,
    to: Annotated[
        str,
        typer.Option(
            help="Target: gguf (llama.cpp, Ollama), compressed-tensors (vLLM), mlx, onnx; or an adapter alone: "
            "lora-for-original (for the original model), per-expert (for a dense mixture of experts).",
            show_default=False,
        ),
    ],
    **given: Any,
) -> None:
    """Write the files of other software with exactly the directory's codes, and the adapter in a file of its own."""
    from loftq import verbs

    quiet_transformers()
    made = verbs.export(directory, output, to=to, **given)
    print(f"{quoted(output)}: {made.line}. In it:")
    for command in made["commands"]:
        print(f"  {command}")


@app.command()
@takes(Generating)
def generate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A quantized directory, a run of `loftq train`, or a dense model.",
            show_default=False,
        ),
    ],
    prompt: Annotated[
        str | None, typer.Option(help="Text to answer or to continue. Default: standard input; in a terminal, a chat.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message of a chat.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text, even if there is a chat template.")] = False,
    **given: Any,
) -> None:
    """Answer a prompt, or chat, with the tokenizer's chat template; without a template, continue a text."""
    import sys

    from loftq.serving.generate import GenerateOptions, Writer

    quiet_transformers()
    options = GenerateOptions(**fields_of(GenerateOptions, given))
    writer = Writer(target, given["adapter"], given["device"])
    chats = writer.chats and not raw
    if system is not None and not chats:
        raise UsageError("--system needs a chat, and the tokenizer has no chat template; leave it out")
    messages = [] if system is None else [{"role": "system", "content": system}]
    talking = prompt is None and sys.stdin.isatty()
    while True:
        text = _asked(prompt, talking)
        if text is None:
            return
        messages.append({"role": "user", "content": text})
        answer = writer.write(messages if chats else text, options, lambda piece: print(piece, end="", flush=True))
        print()
        messages.append({"role": "assistant", "content": answer})
        if not talking:
            return


def _asked(prompt: str | None, talking: bool) -> str | None:
    """The prompt; of a terminal the next line that is not empty, None at the end."""
    import sys

    if not talking:
        return sys.stdin.read().rstrip("\n") if prompt is None else prompt
    try:
        while not (text := input("> ").strip()):
            pass
    except EOFError:
        print()
        return None
    return text
