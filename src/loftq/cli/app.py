"""The application that the verbs register with."""

import typer

app = typer.Typer(
    name="loftq",
    help="LoftQ: quantize a Hugging Face model to 2, 3, 4 or 8 bits, with the LoRA start that makes up for it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
