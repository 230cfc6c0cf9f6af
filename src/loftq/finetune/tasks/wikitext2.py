"""WikiText-2, raw (arXiv 1609.07843), in blocks of 1024 tokens: perplexity on the validation set."""

from loftq.finetune.tasks.base import Hub, Limits, plain_splits
from loftq.finetune.tasks.causal_lm import CausalLM

TASK = CausalLM(
    name="wikitext2",
    version=1,
    hub=Hub(path="Salesforce/wikitext", config="wikitext-2-raw-v1", splits=plain_splits("train", "validation", "test")),
    columns={"text": ("text",)},
    rows="lines",
    limits=Limits(max_length=1024),
)
