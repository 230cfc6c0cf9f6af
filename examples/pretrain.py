"""Train a small Llama, mixture of experts or BART, with a tokenizer of its own, from any text: to measure methods on.

    python examples/pretrain.py wiki.txt.gz news.jsonl.gz --output small-llama
    python examples/pretrain.py wiki.txt.gz news.jsonl.gz --output small-moe --architecture moe
    python examples/pretrain.py news.jsonl.gz --output small-bart --architecture bart

Files are text, or JSONL whose columns text, document, article and context are read; both may be gzipped. The defaults
make 6M parameters in about a quarter of an hour on two cores; on a GPU, --hidden 512 --layers 8 --steps 20000
makes 30M. A BART first has to find out that most of its output stands in its input: --steps 6000 --batch 4
--learning-rate 7e-4 did it, in half an hour on one core with --bf16. The last hundredth of the text is held out, and
the perplexity on it is written into the model's README.

A Llama learns to predict the next token. So does the mixture, a Qwen3-MoE: each token goes to two of the experts of a
layer, which are each half as wide as the model, and a part of the loss keeps them equally busy. A BART learns to
restore texts in which spans of about three tokens, 30 % of all, are each replaced by one mask: the text infilling of
arXiv 1910.13461, section 2.2, without shuffled sentences.
"""

import argparse
import gzip
import json
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer, processors
from torch import Tensor
from transformers import BartConfig, LlamaConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Trainer, TrainingArguments

BEGIN, END, PAD, MASK = "<s>", "</s>", "<pad>", "<mask>"
COLUMNS = ("text", "document", "article", "context")
MASKED, SPAN = 0.3, 3.0


def documents(files: list[Path]) -> Iterator[str]:
    """Every text once: a whole text file is one, a row of a JSONL file is one."""
    seen = set()
    for file in files:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
            if ".jsonl" not in file.suffixes:
                yield lines.read()
                continue
            for row in map(json.loads, lines):
                for text in (row[column] for column in COLUMNS if column in row):
                    if text not in seen:  # SQuAD has each paragraph many times
                        seen.add(text)
                        yield text


def make_tokenizer(texts: list[str], architecture: str, vocabulary: int, length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that no text has unknown characters; BART's puts begin and end around a text."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=vocabulary, special_tokens=[BEGIN, END, PAD, MASK], show_progress=False, min_frequency=2
    )
    if architecture == "bart":
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, 0), (END, 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        mask_token=MASK,
        model_max_length=length,
    )


def make_model(options: argparse.Namespace, vocabulary: int) -> transformers.PreTrainedModel:
    special = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if options.architecture == "llama":
        config = LlamaConfig(
            hidden_size=options.hidden,
            intermediate_size=11 * options.hidden // 4,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            max_position_embeddings=2 * options.length,
            tie_word_embeddings=True,
            **special,
        )
        return transformers.LlamaForCausalLM(config)
    if options.architecture == "moe":
        config = Qwen3MoeConfig(
            hidden_size=options.hidden,
            head_dim=options.hidden // options.heads,
            moe_intermediate_size=options.hidden // 2,
            num_experts=options.experts,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.heads,
            max_position_embeddings=2 * options.length,
            tie_word_embeddings=True,
            output_router_logits=True,  # adds the balance of the experts to the loss
            router_aux_loss_coef=0.01,
            **special,
        )
        return transformers.Qwen3MoeForCausalLM(config)
    config = BartConfig(
        d_model=options.hidden,
        encoder_layers=options.layers // 2,
        decoder_layers=options.layers // 2,
        encoder_attention_heads=options.heads,
        decoder_attention_heads=options.heads,
        encoder_ffn_dim=4 * options.hidden,
        decoder_ffn_dim=4 * options.hidden,
        max_position_embeddings=options.length,
        decoder_start_token_id=1,
        forced_eos_token_id=1,
        dropout=0.0,  # no text is seen often
        **special,
    )
    return aligned(transformers.BartForConditionalGeneration(config))


@torch.no_grad()
def aligned(model: transformers.BartForConditionalGeneration) -> transformers.BartForConditionalGeneration:
    """Let a decoder begin by attending to what is alike in the encoder: equal positions, equal tokens.

    With BART's own initialization, a small model did not learn to copy its input within 800 steps. So positions begin
    as waves, the same on both sides, and queries and keys of cross-attention begin equal, large enough to choose.
    """
    width = model.config.d_model
    for part in (model.model.encoder, model.model.decoder):
        weight = part.embed_positions.weight
        angles = torch.arange(len(weight))[:, None] * 10000 ** (-torch.arange(0, width, 2) / width)
        weight.copy_(model.config.init_std * 2**0.5 * torch.cat([angles.sin(), angles.cos()], 1))
    for layer in model.model.decoder.layers:
        attention = layer.encoder_attn
        for linear in (attention.q_proj, attention.v_proj, attention.out_proj):
            linear.weight.normal_(std=width**-0.5)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
    return model


def blocks(texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> Tensor:
    """``(n, length)``: all texts, each with its end, one after the other, cut; what is left over is left out."""
    ids = [torch.tensor([*row, 1]) for row in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
    stream = torch.cat(ids)
    return stream[: len(stream) // length * length].view(-1, length)


class Blocks(torch.utils.data.Dataset):
    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> Tensor:
        return self.rows[at]


def next_token(rows: list[Tensor]) -> dict[str, Tensor]:
    batch = torch.stack(rows)
    return {"input_ids": batch, "labels": batch}


def infilling(rows: list[Tensor]) -> dict[str, Tensor]:
    """Spans with lengths from a Poisson distribution become one mask each; the whole text is to be restored."""
    inputs = []
    for row in rows:
        lost = torch.zeros(len(row), dtype=torch.bool)
        while lost.sum() < MASKED * len(row):
            at, span = int(torch.randint(len(row), ())), int(torch.poisson(torch.tensor(SPAN)))
            lost[at : at + max(1, span)] = True
        first = lost & ~torch.cat([torch.tensor([False]), lost[:-1]])
        inputs.append(torch.where(first, 3, row)[~lost | first])
    padded = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True, padding_value=2)
    return {"input_ids": padded, "attention_mask": (padded != 2).long(), "labels": torch.stack(rows)}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--architecture", choices=("llama", "moe", "bart"), default="llama")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6, help="a BART has half of them in the encoder")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8, help="of a layer, in a mixture")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256, help="tokens of a text; for a BART the most it can read")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, help="[default: 2e-3, for a BART 5e-4]")
    parser.add_argument("--bf16", action="store_true", help="mixed precision; always on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    options.learning_rate = options.learning_rate or (5e-4 if options.architecture == "bart" else 2e-3)
    warnings.filterwarnings("ignore", category=UserWarning, message=".*pin_memory.*")
    transformers.set_seed(options.seed)
    texts = list(documents(options.files))
    tokenizer = make_tokenizer(texts, options.architecture, options.vocabulary, options.length)
    rows = blocks(texts, tokenizer, options.length)
    held = max(1, len(rows) // 100)
    model = make_model(options, len(tokenizer))
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.1f}M parameters, {rows.numel() / 1e6:.2f}M tokens, {options.steps} steps", flush=True)
    arguments: dict[str, Any] = {
        "output_dir": str(options.output),
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, options.steps // 20),
        "weight_decay": 0.1,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": options.bf16 or torch.cuda.is_available(),
        "logging_steps": max(1, options.steps // 50),
        "save_strategy": "no",
        "report_to": "none",
        "seed": options.seed,
        "prediction_loss_only": True,
        "remove_unused_columns": False,
    }
    trainer = Trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=Blocks(rows[:-held]),
        eval_dataset=Blocks(rows[-held:]),
        data_collator=infilling if options.architecture == "bart" else next_token,
    )
    began = time.monotonic()
    trainer.train()
    model.config.output_router_logits = False  # the loss of the text alone
    loss = trainer.evaluate()["eval_loss"]
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    given = " ".join(
        f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}")
        for k, v in vars(options).items()
        if v is not False and k not in ("files", "output")
    )
    story = (
        f"# {options.output.name}\n\nA {type(model).__name__} of {size / 1e6:.1f}M parameters, made by\n\n"
        f"    python examples/pretrain.py {' '.join(file.name for file in options.files)} {given}\n\n"
        f"{(time.monotonic() - began) / 60:.1f} minutes, {len(rows)} blocks of {options.length} tokens, "
        f"{options.steps * options.batch / len(rows):.2f} times over. Held out: loss {loss:.3f} nats per token, "
        f"perplexity {math.exp(loss):.1f}.\nFor measuring methods against each other, not for its text.\n"
    )
    (options.output / "README.md").write_text(story, encoding="utf-8")
    print(f"held out: loss {loss:.3f} nats per token, perplexity {math.exp(loss):.1f}; saved to {options.output}")


if __name__ == "__main__":
    main()
