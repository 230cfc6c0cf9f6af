"""Fine-tuning a small mixture of experts: perplexity on WikiText before and after, at 16, 4 and 2 bits.

    python benchmarks/study_moe.py --data DIR --model SMALL-MOE --minutes 60   # until nothing is missing

examples/pretrain.py --architecture moe --steps 1200 makes such a model. The recipe is the decoder's, with half of its
batch: all experts are packed and trained, of one rank with everything else, and `descent` is calibrated on the tokens
that are routed to each.
"""

import sys

import study
import study_decoder

WIDTHS = [4, 2]


def main() -> None:
    given = study.options(__doc__ or "", model=None, tasks=("wikitext2",))
    study.run("moe", given, [study_decoder.recipe(given, "wikitext2", WIDTHS, batch_size=4, trellis=False)])


if __name__ == "__main__":
    sys.exit(main())
