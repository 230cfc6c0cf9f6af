"""The options of ``loftq merge``, ``export`` and ``generate``, once, as in :mod:`loftq.options`."""

from typing import Annotated, TypedDict

from loftq.options import SCALE_DTYPES, Option, Place, Replacing


class Adapted(TypedDict, total=False):
    """What was trained on a quantized directory."""

    adapter: Annotated[
        Place | None,
        Option(None, metavar="DIR|none"),
        "An adapter that PEFT wrote, or a run of `loftq train`; none: the quantized weights alone. Default: the "
        "directory's own initialization.",
    ]


class Merging(Adapted, Replacing, total=False):
    """Of :func:`loftq.merge`."""

    dtype: Annotated[
        str,
        Option("bfloat16", choices=SCALE_DTYPES),
        "Dtype of the matrices: bfloat16, float16 or float32. Vectors keep theirs.",
    ]


class Exporting(Adapted, Replacing, total=False):
    """Of :func:`loftq.export`."""

    tokenizer_rule: Annotated[
        str | None,
        Option(None),
        "With gguf: llama.cpp's name of the tokenizer's pre-tokenization, if it is not recognized.",
    ]
    converter: Annotated[
        Place | None,
        Option(None),
        "With gguf: path of llama.cpp's convert_hf_to_gguf.py, for families without support here.",
    ]
    block_type: Annotated[
        str | None,
        Option(None, choices=("TQ2_0", "Q2_K")),
        "With gguf, for 2 bits in blocks of 256: TQ2_0, which is smaller, or Q2_K, for which GPUs have kernels. "
        "Default: TQ2_0.",
    ]


class Generating(Adapted, total=False):
    """Of :func:`loftq.generate`."""

    max_new_tokens: Annotated[
        int, Option(256, bounds={"ge": 1}), "Largest number of tokens of an answer; fewer if the model's positions end."
    ]
    temperature: Annotated[
        float | None,
        Option(None, bounds={"ge": 0}),
        "Sampling temperature; 0 is greedy. Default: as in generation_config.json.",
    ]
    top_p: Annotated[
        float | None,
        Option(None, bounds={"gt": 0, "le": 1}),
        "Nucleus sampling. Default: as in generation_config.json.",
    ]
    seed: Annotated[int, Option(0, bounds={"ge": 0}), "Seed of the sampling."]
    device: Annotated[str | None, Option(None), "cpu, cuda, … Default: the GPU if there is one."]
