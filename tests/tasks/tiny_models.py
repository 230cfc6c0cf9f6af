"""Tokenizers whose tokens can be told by eye, and tiny random models for them."""

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
BART = {
    "vocab_size": 300,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def words(**options: Any) -> Any:
    """``[CLS] a [SEP] b [SEP]``, a token a letter, as BERT does it."""
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(_vocabulary())}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.decoder = decoders.WordPiece()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_max_length=256,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **options,
    )


def letters(**options: Any) -> Any:
    """``<s> text``, a token a byte, as Llama does it; with no token for padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
        **options,
    )


def model(kind: str, **options: Any) -> Any:
    """A random model of the class that tasks of ``kind`` ask for, with weights large enough to tell rows apart."""
    torch.manual_seed(0)
    if kind in ("text-classification", "span-qa"):
        config: Any = transformers.BertConfig(**SIZES, **options)
        cls = {
            "text-classification": transformers.BertForSequenceClassification,
            "span-qa": transformers.BertForQuestionAnswering,
        }[kind]
    elif kind == "summarization":
        config, cls = transformers.BartConfig(**BART, **options), transformers.BartForConditionalGeneration
    else:
        config, cls = transformers.LlamaConfig(**SIZES, **options), transformers.LlamaForCausalLM
    made = cls(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def _vocabulary() -> list[str]:
    printable = [chr(i) for i in range(33, 127) if not chr(i).isupper()]
    return ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *printable]
