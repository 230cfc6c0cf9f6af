"""Verbs on what was trained: merge, export, generate."""

from typing import Annotated

import typer

from loftq.cli.app import app
from loftq.cli.options import Directory, Output, quiet_transformers
from loftq.errors import UsageError, quoted

AdapterOf = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="DIR|none",
        help="An adapter that PEFT wrote, or a run of `loftq train`; none: the quantized weights alone. "
        "Default: the directory's own initialization.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of loftq.")]


@app.command()
def merge(
    directory: Directory,
    output: Output,
    adapter: AdapterOf = None,
    dtype: Annotated[
        str, typer.Option(help="Of the matrices: bfloat16, float16 or float32. Vectors stay as they are.")
    ] = "bfloat16",
    max_shard_size: Annotated[str, typer.Option(help="Largest file: 500MB, 2GB.")] = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """Make a plain dense checkpoint of the quantized weights and an adapter, one matrix in memory at a time."""
    from loftq import verbs
    from loftq.planning import parse_size

    quiet_transformers()
    largest = parse_size("--max-shard-size", max_shard_size)
    made = verbs.merge(directory, output, adapter=adapter, dtype=dtype, max_shard_bytes=largest, overwrite=overwrite)
    print(f"{quoted(output)}: {made.line}")


@app.command()
def export(
    directory: Directory,
    output: Output,
    to: Annotated[
        str,
        typer.Option(
            help="gguf (llama.cpp, Ollama), compressed-tensors (vLLM), mlx, onnx, lora-for-original; per-expert: of a "
            "mixture, the adapter alone.",
            show_default=False,
        ),
    ],
    adapter: AdapterOf = None,
    tokenizer_rule: Annotated[
        str | None,
        typer.Option(help="Of gguf: llama.cpp's name of how the tokenizer cuts words, if it is not known here."),
    ] = None,
    converter: Annotated[
        str | None,
        typer.Option(help="Of gguf: llama.cpp's convert_hf_to_gguf.py, for a family that is not known here."),
    ] = None,
    block_type: Annotated[
        str | None,
        typer.Option(help="Of gguf, for 2 bits in blocks of 256: TQ2_0 or Q2_K. Default: TQ2_0."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a quantized directory in other software's files, with exactly its codes, and the adapter apart."""
    from loftq import verbs

    quiet_transformers()
    told = {"tokenizer_rule": tokenizer_rule, "converter": converter, "block_type": block_type}
    made = verbs.export(directory, output, to=to, adapter=adapter, overwrite=overwrite, **told)
    print(f"{quoted(output)}: {made.line}. In it:")
    for command in made["commands"]:
        print(f"  {command}")


@app.command()
def generate(
    target: Annotated[
        str,
        typer.Argument(help="A quantized directory, a run of `loftq train`, or a dense model.", show_default=False),
    ],
    adapter: AdapterOf = None,
    prompt: Annotated[
        str | None, typer.Option(help="What to answer or go on from. Default: standard input; in a terminal, a chat.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The first message of a chat.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Go on from the text, also if there is a chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy. Default: what generation_config.json says.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Default: what generation_config.json says.")] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … Default: the GPU if there is one.")] = None,
) -> None:
    """Answer a prompt, or chat, by the tokenizer's template; without one, go on from a text."""
    import sys

    from loftq.serving.generate import GenerateOptions, Writer

    quiet_transformers()
    options = GenerateOptions(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    writer = Writer(target, adapter, device)
    chats = writer.chats and not raw
    if system is not None and not chats:
        raise UsageError("--system is of a chat, and there is no template for one; leave it out")
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
