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
        str, typer.Option(help="Dtype of the matrices: bfloat16, float16 or float32. Vectors keep theirs.")
    ] = "bfloat16",
    max_shard_size: Annotated[str, typer.Option(help="Size of the largest file: 500MB, 2GB.")] = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """Merge an adapter into the quantized weights, as a plain dense checkpoint; one matrix is in memory at a time."""
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
            help="Target: gguf (llama.cpp, Ollama), compressed-tensors (vLLM), mlx, onnx; or an adapter alone: "
            "lora-for-original (for the original model), per-expert (for a dense mixture of experts).",
            show_default=False,
        ),
    ],
    adapter: AdapterOf = None,
    tokenizer_rule: Annotated[
        str | None,
        typer.Option(help="With gguf: llama.cpp's name of the tokenizer's pre-tokenization, if it is not recognized."),
    ] = None,
    converter: Annotated[
        str | None,
        typer.Option(help="With gguf: path of llama.cpp's convert_hf_to_gguf.py, for families without support here."),
    ] = None,
    block_type: Annotated[
        str | None,
        typer.Option(help="With gguf, for 2 bits in blocks of 256: TQ2_0 or Q2_K. Default: TQ2_0."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the files of other software with exactly the directory's codes, and the adapter in a file of its own."""
    from loftq import verbs

    quiet_transformers()
    made = verbs.export(
        directory,
        output,
        to=to,
        adapter=adapter,
        tokenizer_rule=tokenizer_rule,
        converter=converter,
        block_type=block_type,
        overwrite=overwrite,
    )
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
        str | None, typer.Option(help="Text to answer or to continue. Default: standard input; in a terminal, a chat.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message of a chat.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text, even if there is a chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Largest number of tokens of an answer.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature; 0 is greedy. Default: as in generation_config.json.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Nucleus sampling. Default: as in generation_config.json.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … Default: the GPU if there is one.")] = None,
) -> None:
    """Answer a prompt, or chat, with the tokenizer's chat template; without a template, continue a text."""
    import sys

    from loftq.serving.generate import GenerateOptions, Writer

    quiet_transformers()
    options = GenerateOptions(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    writer = Writer(target, adapter, device)
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
