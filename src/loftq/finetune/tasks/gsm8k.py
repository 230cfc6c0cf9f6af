"""GSM8K (arXiv 2110.14168): share of the test problems whose final number is right.

Prompt and target follow the paper's script: no examples, the question and an instruction, and the data set's solution
with its marker ``####`` in words. The instruction's wording is ours.
"""

import re

from loftq.finetune.tasks.base import Hub, Limits, plain_splits
from loftq.finetune.tasks.instruction import Instruction
from loftq.finetune.tasks.metrics import last_number, numbers

MARKER = "The final answer is: "


def target(solution: str) -> str:
    """The solution as it is learned."""
    return re.sub(r"#### *", lambda _: MARKER, solution).strip()


def answer(text: str) -> float | None:
    """The first number after the marker; without a marker, or a number after it, the last in the text, or None."""
    _, _, after = text.partition(MARKER.strip())
    return next(iter(numbers(after)), last_number(text))


TASK = Instruction(
    name="gsm8k",
    version=1,
    hub=Hub(path="openai/gsm8k", config="main", splits=plain_splits("train", "test")),
    columns={"prompt": ("question",), "response": ("answer",)},
    template="{prompt}\nThink step by step first, then give the final number.\n",
    target=target,
    extract=answer,
    reported=("test",),
    generation={"max_new_tokens": 256},
    sampling={"do_sample": True, "temperature": 0.1, "top_k": 40, "top_p": 0.95, "seed": 42},
    limits=Limits(max_length=512),
)
