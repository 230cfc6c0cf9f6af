"""Tiny random models that read speech or pictures beside text, each with what it is given."""

from typing import Any

import torch
import transformers
from torch import Tensor

TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
WORDS = torch.tensor([[1, 5, 9, 33, 77, 4, 8]])
IMAGE = 100
CAPTION = torch.tensor([[1, IMAGE, IMAGE, IMAGE, IMAGE, 5, 9, 33, 4]])


def whisper() -> tuple[Any, dict[str, Tensor]]:
    widths = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    lengths = {"num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32}
    config = transformers.WhisperConfig(
        vocab_size=128, d_model=32, encoder_layers=1, decoder_layers=1, **widths, **lengths, **SPECIAL
    )
    given = {"input_features": torch.randn(1, 16, 40), "labels": WORDS}
    return transformers.WhisperForConditionalGeneration(config), given


def moonshine() -> tuple[Any, dict[str, Tensor]]:
    heads = {"encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2}
    layers = {"encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1}
    config = transformers.MoonshineConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, max_position_embeddings=64, **heads, **layers, **SPECIAL
    )
    given = {"input_values": torch.randn(1, 4000), "labels": WORDS}
    return transformers.MoonshineForConditionalGeneration(config), given


def llava() -> tuple[Any, dict[str, Tensor]]:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    given = {"input_ids": CAPTION, "pixel_values": torch.randn(1, 3, 16, 16), "labels": CAPTION}
    return transformers.LlavaForConditionalGeneration(config), given


def blip2() -> tuple[Any, dict[str, Tensor]]:
    opt = {"vocab_size": 128, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    qformer = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Blip2Config(
        vision_config=dict(VISION),
        qformer_config={**qformer, "vocab_size": 128, "encoder_hidden_size": 32},
        text_config={**opt, "model_type": "opt", "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    given = {"input_ids": CAPTION, "pixel_values": torch.randn(1, 3, 16, 16), "labels": CAPTION}
    return transformers.Blip2ForConditionalGeneration(config), given


def trocr() -> tuple[Any, dict[str, Tensor]]:
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 48, "max_position_embeddings": 32}
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**VISION),
        transformers.TrOCRConfig(vocab_size=128, d_model=32, cross_attention_hidden_size=32, **decoder),
    )
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    given = {"pixel_values": torch.randn(1, 3, 16, 16), "labels": WORDS}
    return transformers.VisionEncoderDecoderModel(config=config), given
