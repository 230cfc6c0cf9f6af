"""A tiny configuration of any model type: the class's own defaults, shrunk by what a key counts.

Five shrinkages are tried in turn. ``even`` gives every width the same small number, which keeps widths that must
agree in agreement. ``filled`` gives numbers also to what the class leaves open. ``headed`` leaves two heads as wide
as they are, for what depends on a head's width. ``divided`` divides all widths by one power of two, which keeps their
ratios. ``shallow`` leaves the widths and takes layers, words and experts away. What no rule can know stands in
``hints.json``, by model type: values of the ``config`` that are set afterwards, values ``before``, without which the
class cannot even be made, ``classes``, ``inputs``, and ``places``, the number of tokens that stand for a picture.
"""

import functools
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HINTS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("hints.json").read_text())
SHRINKAGES = ("even", "filled", "headed", "divided", "shallow")
WORDS, WIDTH, INNER, HEAD, HEADS, EXPERTS = 160, 64, 96, 16, 4, 4
ABSENT = {
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts": 4,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
}  # what a class leaves open, and cannot do without
FILLED = {
    "num_key_value_heads": HEADS // 2,
    "head_dim": HEAD,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "shared_expert_intermediate_size": INNER // 3,
    "num_attention_heads": HEADS,
    "num_hidden_layers": 2,
    "sliding_window": 4,
    "vocab_size": WORDS,
    "mlp_layer_types": ["dense", "sparse"],
}  # likewise, where the class cannot be made or run without
RESNET = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 24, 32, 40],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # in the place of a backbone of timm, where that is not installed
TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {
        "img_size": 64,
        "embed_dim": WIDTH,
        "depth": 2,
        "num_heads": HEADS,
        "class_token": False,
        "global_pool": "avg",
    },
}
NAMES = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

LAYERS = re.compile(r"(^|_)(n_)?(layers?|depth|blocks?)$|num_hidden_layers|^n_layers?$|num_.*_layers$|^num_blocks$")
INDICES = re.compile(r"(indices|indexes|idxs?|layer_ids|_layers_idx|deepstack.*|feature_layers?)$")
VOCABULARY = re.compile(r"vocab_size|_vocab$|^n_words$|^emb_size_words$")
TOKEN = re.compile(r"_(token_)?(id|ids|index)$")
KV_HEADS = re.compile(r"(key_value|kv).*heads|^num_query_groups$|multi_query_group_num|num_key_value_groups")
HEAD_COUNT = re.compile(r"(^|_)n?heads?$|n_head")
HEAD_DIM = re.compile(r"head_dim|headdim|^d_kv$|head_size$|^kv_channels$|d_head")
EXPERT_COUNT = re.compile(r"(num|n)_.*experts$|^num_experts$|moe_num_experts|^n_experts$")
TOP_K = re.compile(r"experts_per_tok|moe_top_?k|^top_k(_experts)?$|moe_k$|num_selected_experts|^num_experts_per")
INNER_DIM = re.compile(
    r"intermediate|ffn?_dim|ffn_hidden|^d_ff|^n_inner|mlp_dim|feedforward|feed_forward|ff_dim|inner_dim"
)
WIDE = re.compile(
    r"hidden_size|hidden_dim|d_model|d_embed|n_embd|embed_dim|embedding_(size|dim)|emb_dim|(^|_)dim$|_size$|_channels?$"
    r"|channels$|_dims?$|_width$|^width$|hidden_sizes|_filters$|units|_rank$|^n_state|num_features"
)
NOT_WIDE = re.compile(
    r"patch|kernel|image_size|window|chunk|crop|vocab|codebook_size|grid|stride|batch|pool|spec|num_channels|in_channels|audio_channels"
    r"|input_size|merge_size|local_.*size|^vision_config.*size|attention_size|max_.*|group|bucket|sample|mel|low_res|context|fft|hop|scale|"
    r"conv_size|hash|position|out_channels$|beam|memory_size|time|block_size|num_mask|queue|resolution|label|bins|frame|level"
)
ONE = re.compile(
    r"first_k_dense_replace|^n_group$|topk_group|n_shared_experts|num_shared_experts|n_groups$|num_expert_groups?|ngroups"
)
STEP = re.compile(
    r"sparse_step$|layer_(period|freq|frequency|interval|step)|moe_every|full_attention_interval|_interval$|layer_offset$"
)
PATTERN = re.compile(r"(layer|block)s?_(types?|pattern)$")
PASSED = {"model_type", "architectures", "transformers_version", "dtype", "id2label", "label2id", "stage_names"}


def tiny(config_class: Any, model_type: str, shrinkage: str, values: dict[str, Any] | None = None) -> Any:
    """A small configuration of this class."""
    hint = HINTS.get(model_type, {})
    base = config_class(**_nested(hint.get("before", {})))
    small = _typed(_Shrinker(shrinkage).whole(base.to_dict()), base)
    for key, value in hint.get("config", {}).items():
        place = small
        *path, last = key.split(".")
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return config_class(**small)


def _typed(values: dict[str, Any], base: Any) -> dict[str, Any]:
    """Lists made tuples again, where the class has tuples: ``to_dict`` does not tell."""
    for key, value in values.items():
        default = vars(base).get(key)
        if isinstance(value, list) and isinstance(default, tuple):
            values[key] = tuple(value)
        elif isinstance(value, dict) and hasattr(default, "to_dict"):
            _typed(value, default)
    return values


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in flat.items():
        place = result
        *path, last = key.split(".")
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return result


class _Shrinker:
    """One shrinkage, applied to a configuration and those nested in it. Equal names of tokens get equal numbers."""

    def __init__(self, how: str) -> None:
        self.absent = {**FILLED, **ABSENT} if how == "filled" else ABSENT
        self.how = "even" if how == "filled" else how
        self._tokens: dict[str, int] = {}
        self._widths: dict[int, int] = {}  # headed: hidden sizes, old and new, of the whole tree

    def whole(self, values: dict[str, Any]) -> dict[str, Any]:
        self._collect(values)
        return self.config(values, nested=False)

    def _collect(self, values: dict[str, Any]) -> None:
        for value in values.values():
            if isinstance(value, dict):
                self._collect(value)
        width, heads = _first(values, _MAIN), _first(values, _HEADS)
        if width and heads and width % heads == 0:
            self._widths[width] = width // heads * min(heads, 2)

    def config(self, values: dict[str, Any], nested: bool = True) -> dict[str, Any]:
        """The changed values alone, and what names the class; what follows from others is left to the class."""
        if "model_args" in values and "architecture" in values and find_spec("timm"):
            return {**TIMM, **{k: values[k] for k in ("model_type", "do_pooling")}, "hidden_size": WIDTH}
        factor = max(1, _first(values, _MAIN) // WIDTH)
        while factor & (factor - 1):
            factor &= factor - 1
        kept = self._layers(values)
        result: dict[str, Any] = {}
        defaults = _defaults(values["model_type"]) if nested else values
        for key, value in values.items():
            if key in ("out_features", "out_indices") and _first(values, _DEPTHS) > 2:
                if key == "out_indices" and value and len(value) > 1:
                    result[key] = list(range(1, len(kept) + 1))
                continue
            if key in PASSED or key.startswith("_"):
                if key == "model_type":
                    result[key] = value
                continue
            if value is None and key in self.absent:
                value = self.absent[key]
            new = self._value(key, value, values, factor, kept)
            if new != values[key] or isinstance(value, dict) or (key in defaults and defaults[key] != new):
                result[key] = new
        return result

    def _layers(self, values: dict[str, Any]) -> list[int]:
        """Which of the layers stay: one of every kind, and two at least."""
        count = _first(values, _DEPTHS)
        if count <= 2:
            return list(range(count))
        outputs = values.get("out_indices") or ()
        if len(outputs) > 1:  # a backbone of which several layers are wanted
            return list(range(min(count, len(outputs))))
        lists = [v for v in values.values() if isinstance(v, (list, tuple)) and len(v) == count]
        lists = [v for v in lists if all(isinstance(e, (str, int, bool)) for e in v)]
        kinds: dict[Any, int] = {}
        for i in range(count):
            kinds.setdefault(tuple(v[i] for v in lists), i)
        patterns = [v for k, v in values.items() if PATTERN.search(k) and isinstance(v, (list, tuple))]
        repeated = max(map(len, patterns), default=0)
        if 2 < repeated < count and not lists:
            return list(range(min(repeated, 4)))
        chosen = sorted(kinds.values())[:4]
        return chosen if len(chosen) >= 2 else [0, 1]

    def _value(self, key: str, value: Any, values: dict[str, Any], factor: int, kept: list[int]) -> Any:
        if isinstance(value, dict):
            if value and all(str(k).isdecimal() and int(k) < _first(values, _DEPTHS) for k in value):  # by layer
                found = {int(k): v for k, v in value.items()}
                return {i: self._value(key, found[n], values, factor, kept) for i, n in enumerate(kept) if n in found}
            if any(not isinstance(k, str) for k in value):
                return value
            if value.get("model_type") == "timm_backbone" or ("model_args" in value and not find_spec("timm")):
                return RESNET
            if key == "rope_parameters" or key == "rope_scaling" or not value:
                return {k: self._rope(k, v) for k, v in value.items()}
            if not value.get("model_type"):  # no configuration with defaults of its own
                return {k: self._value(k, v, values, factor, kept) for k, v in value.items()}
            return self.config(value)
        if isinstance(value, (list, tuple)):
            return type(value)(self._list(key, list(value), values, factor, kept))
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        return self._number(key, value, values, factor, kept)

    def _rope(self, key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: self._rope(k, v) for k, v in value.items()}
        if key == "mrope_section" and self.how == "even" and isinstance(value, (list, tuple)):
            return _parts(list(value), HEAD // 2)
        return value

    def _list(self, key: str, value: list[Any], values: dict[str, Any], factor: int, kept: list[int]) -> Any:
        count = _first(values, _DEPTHS)
        if key == "mrope_section" and self.how == "even":
            return _parts(value, HEAD // 2)
        if INDICES.search(key) and value and all(isinstance(v, int) for v in value):
            return sorted({v if v < 0 else min(v, max(0, len(kept) - 1)) for v in value}) if count else value
        if value and isinstance(value[0], dict) and "model_type" in value[0]:
            return [self.config(v) for v in value]
        if count > 2 and len(value) == count:
            value = [value[i] for i in kept]
        if key in ("depths", "layer_depths", "num_layers", "layers") and all(isinstance(v, int) for v in value):
            return [min(v, 1 if len(value) > 2 else 2) for v in value]
        return [
            self._number(key, v, values, factor, kept) if isinstance(v, int) and not isinstance(v, bool) else v
            for v in value
        ]

    def _number(self, key: str, value: int, values: dict[str, Any], factor: int, kept: list[int]) -> int:
        if VOCABULARY.search(key):
            return min(value, WORDS)
        if TOKEN.search(key):
            return self._token(key, value)
        if key in _DEPTHS:
            return min(value, max(2, len(kept)))
        if key == "num_kv_shared_layers":
            return 0
        if key == "num_queries":  # the best of many random places: with fewer, none is as good as the next
            return min(value, 20)
        if LAYERS.search(key) and "feat_extract" not in key:
            return min(value, 2)
        if TOP_K.search(key):
            return min(value, 2)
        if EXPERT_COUNT.search(key):
            return min(value, EXPERTS)
        if ONE.search(key):
            return min(value, 1)
        if STEP.search(key):
            return min(value, 1 if "offset" in key else 2)
        if key.startswith(("max_position", "max_source", "max_target", "n_positions", "max_seq")):
            return min(value, 512 if self.how != "even" else 256)
        if key == "image_size" and self.how == "even":
            patch = values.get("patch_size")
            return min(value, 4 * patch) if isinstance(patch, int) and patch >= 8 else min(value, 64)
        if self.how == "shallow":
            return value
        if self.how == "headed":
            return self._headed(key, value, values)
        return self._even(key, value, values) if self.how == "even" else self._divided(key, value, factor)

    def _token(self, key: str, value: int) -> int:
        if 0 <= value < WORDS - 40:
            return value
        if value < 0:
            return value
        return NAMES.get(key) or self._tokens.setdefault(key, WORDS - 1 - len(self._tokens))

    def _even(self, key: str, value: int, values: dict[str, Any]) -> int:
        if HEAD_DIM.search(key):
            rope, nope = values.get("qk_rope_head_dim") or 0, values.get("qk_nope_head_dim") or 0
            rotated = "rope" in key or (key == "head_dim" and value == rope)
            return min(value, HEAD // 2 if rotated else HEAD + HEAD // 2 if value == rope + nope else HEAD)
        if KV_HEADS.search(key):
            heads = _first(values, _HEADS) or value
            return min(value, HEADS if value >= heads else HEADS // 2)
        if HEAD_COUNT.search(key):
            expand = next((values[k] for k in ("expand", "mamba_expand") if k in values), None)
            mamba = expand and ("mamba" in key or not any(k in values for k in _HEADS[:2]))
            return min(value, int(expand * WIDTH) // HEAD if mamba else HEADS)
        if INNER_DIM.search(key):
            return min(value, INNER // 3 if "moe" in key or "expert" in key else INNER)
        if key.endswith("_groups"):
            return min(value, WIDTH)
        if NOT_WIDE.search(key):
            return value
        return min(value, WIDTH) if WIDE.search(key) else value

    def _headed(self, key: str, value: int, values: dict[str, Any]) -> int:
        if HEAD_DIM.search(key):
            return value
        if KV_HEADS.search(key):
            return min(value, 2 if value >= (_first(values, _HEADS) or value) else 1)
        if HEAD_COUNT.search(key):
            return min(value, 2)
        if INNER_DIM.search(key):
            return min(value, INNER)
        wide = WIDE.search(key) and not NOT_WIDE.search(key)
        return self._widths.get(value, value if value <= 512 else WIDTH) if wide else value

    def _divided(self, key: str, value: int, factor: int) -> int:
        if HEAD_COUNT.search(key) or KV_HEADS.search(key):
            return value if value % factor else max(1, value // factor)
        wide = INNER_DIM.search(key) or (WIDE.search(key) and not NOT_WIDE.search(key)) or HEAD_DIM.search(key)
        if HEAD_DIM.search(key) or not wide:
            return value
        return value // factor if value % factor == 0 and value // factor >= 4 else value


_MAIN = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "emb_dim", "hidden_dim", "decoder_hidden_size")
_DEPTHS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "depth", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers",
)  # fmt: skip
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads", "decoder_attention_heads")


@functools.cache
def _defaults(model_type: str) -> dict[str, Any]:
    """What the class of a nested configuration has by default, which its owner may have set otherwise."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[model_type]().to_dict()
    except Exception:
        return {}


def _first(values: dict[str, Any], keys: tuple[str, ...]) -> int:
    """The first whole number under one of these keys; 0 if there is none."""
    return next((values[k] for k in keys if isinstance(values.get(k), int) and values[k] > 0), 0)


def _parts(sizes: list[int], total: int) -> list[int]:
    """``sizes`` in about the same proportions, with another sum."""
    whole = sum(sizes)
    result = [max(1, size * total // whole) for size in sizes]
    result[0] += total - sum(result)
    return result


def classes(model_type: str) -> list[str]:
    """Names of the model classes of a type, the one with a usual head first, the base model last."""
    from transformers.models.auto import modeling_auto

    found: list[str] = []
    for suffix in _TASKS:
        names = getattr(modeling_auto, f"MODEL_{suffix}MAPPING_NAMES", {}).get(model_type, ())
        found += [names] if isinstance(names, str) else list(names)
    return list(dict.fromkeys(HINTS.get(model_type, {}).get("classes", []) + found))


_TASKS = (
    "FOR_SEQ_TO_SEQ_CAUSAL_LM_", "FOR_IMAGE_TEXT_TO_TEXT_", "FOR_SPEECH_SEQ_2_SEQ_", "FOR_MULTIMODAL_LM_",
    "FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_", "FOR_MASKED_LM_", "FOR_CAUSAL_LM_", "FOR_CTC_", "FOR_RNNT_", "FOR_TDT_",
    "FOR_IMAGE_CLASSIFICATION_",
    "FOR_VIDEO_CLASSIFICATION_", "FOR_OBJECT_DETECTION_",
    "FOR_UNIVERSAL_SEGMENTATION_", "FOR_SEMANTIC_SEGMENTATION_", "FOR_DEPTH_ESTIMATION_", "FOR_AUDIO_CLASSIFICATION_",
    "FOR_VISUAL_QUESTION_ANSWERING_", "FOR_TIME_SERIES_PREDICTION_", "FOR_ZERO_SHOT_OBJECT_DETECTION_", "",
    "FOR_PRETRAINING_", "FOR_MASK_GENERATION_", "FOR_TEXT_TO_WAVEFORM_", "FOR_TEXT_TO_SPECTROGRAM_", "FOR_RETRIEVAL_",
    "FOR_TEXT_ENCODING_", "FOR_BACKBONE_", "FOR_IMAGE_TO_IMAGE_", "FOR_IMAGE_MATTING_", "FOR_KEYPOINT_DETECTION_",
    "FOR_KEYPOINT_MATCHING_", "FOR_POSE_ESTIMATION_", "FOR_NORMAL_ESTIMATION_", "FOR_POINTMAP_ESTIMATION_",
    "FOR_TABLE_RECOGNITION_", "FOR_TEXT_RECOGNITION_", "FOR_AUDIO_XVECTOR_", "FOR_DECISION_", "FOR_IMAGE_",
    "FOR_SEQUENCE_CLASSIFICATION_", "FOR_TOKEN_CLASSIFICATION_",
)  # fmt: skip


def types() -> list[str]:
    """All model types with a model class: those that write first, parts of other types' models last."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    parts: set[str] = set()
    for own in CONFIG_MAPPING.values():
        nested = [c for c in getattr(own, "sub_configs", {}).values() if c is not own]
        parts |= {c.model_type for c in nested if getattr(c, "model_type", "")}
    write = [t for t in _TASKS if "LM_" in t or "TEXT_TO_TEXT" in t or "SEQ_2_SEQ" in t]
    heads = {name for t in write for name in getattr(modeling_auto, f"MODEL_{t}MAPPING_NAMES")}
    names = (name for name in CONFIG_MAPPING if classes(name))
    return sorted(names, key=lambda name: (name in parts, name not in heads, name))
