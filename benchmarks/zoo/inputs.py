"""Inputs for a model of any class, from the names in its ``forward`` and the sizes in its configuration.

Several readings of a name are possible (audio features with the time first or last, one image or several), so there are
candidates, richest first; the first that the dense model takes is used.
"""

import contextlib
import inspect
import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zoo.configs import HINTS

BATCH, LENGTH = 2, 8
LARGEST_WORD = 90  # below the tokens that mean something
WIDTHS = re.compile(
    r"shapes cannot be multiplied \(\d+x(\d+) and (\d+)x"
    r"|tensor a \((\d+)\) must match the size of tensor b \((\d+)\)"
)
PICTURES = ("pixel_values", "image_embeds", "input_features", "input_values", "pixel_values_videos")

SESSIONS = {
    "inference_session": "takes the session of a video, which its processor makes",
    "shared_kv_states": "takes the keys and values of the model that it assists",
}


def unreachable(cls: Any) -> str:
    """Why no inputs of tensors alone run a class; empty if some may."""
    if cls is None:
        return "not in this transformers"
    if cls.forward is nn.Module.forward:
        return "has no forward; it generates, or encodes, with parts"
    names = inspect.signature(cls.forward).parameters
    return next((why for name, why in SESSIONS.items() if name in names), "")


def candidates(model: Any, model_type: str) -> Iterator[dict[str, Any]]:
    """Inputs to try, richest first."""
    names = list(inspect.signature(model.forward).parameters)
    required = [
        n for n, p in inspect.signature(model.forward).parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]  # fmt: skip
    maker = _Maker(model, HINTS.get(model_type, {}))
    hint = {k: _tensor(v) for k, v in HINTS.get(model_type, {}).get("inputs", {}).items()}
    main = model.main_input_name
    mains = main if isinstance(main, (list, tuple)) else [main]
    wanted = list(dict.fromkeys([*[m for m in mains if m in names or ("kwargs" in names and not required)], *required]))
    wanted = [n for n in wanted if n not in ("kwargs", "args", *hint)]
    text = "input_ids" in names and "input_ids" not in hint
    if text and any(n in names for n in PICTURES):
        yield from ({**c, **hint} for c in maker.multimodal(names, wanted))
    if text and "input_ids" not in wanted:
        yield from ({**c, **hint} for c in maker.product([*wanted, "input_ids"], names))
    yield from ({**c, **hint} for c in maker.product(wanted, names))
    if text and wanted != ["input_ids"]:
        yield from ({**c, **hint} for c in maker.product(["input_ids"], names))
    if text and {"use_cache", "kwargs"} & set(names):  # transformers has no cache for every mixture of layers
        yield from ({**c, "use_cache": False, **hint} for c in maker.product(["input_ids"], names))


def _tensor(value: Any) -> Any:
    """A hint's data: ``{"shape": …}`` random floats, ``{"shape": …, "below": n}`` whole numbers, lists as they are."""
    if isinstance(value, dict) and "shape" in value:
        generator = torch.Generator().manual_seed(2)
        if "below" in value:
            return torch.randint(value.get("from", 0), value["below"], value["shape"], generator=generator)
        if value.get("bool"):
            return torch.ones(value["shape"], dtype=torch.bool)
        return torch.rand(value["shape"], generator=generator) * value.get("scale", 1)
    return torch.tensor(value) if isinstance(value, list) else value


def refitted(given: dict[str, Any], error: str) -> dict[str, Any] | None:
    """The inputs with floats as wide as a product or a sum wanted them; None if the error says no width."""
    found = WIDTHS.search(error)
    got, wanted = [int(n) for n in found.groups() if n] if found else (0, 0)
    narrow = [k for k, v in given.items() if isinstance(v, Tensor) and v.is_floating_point() and v.shape[-1] == got]
    if not narrow or not 0 < wanted < 4096:
        return None
    generator = torch.Generator().manual_seed(3)
    return {**given, **{k: torch.randn((*given[k].shape[:-1], wanted), generator=generator) for k in narrow}}


class _Maker:
    def __init__(self, model: Any, hint: dict[str, Any]) -> None:
        self.model, self.config, self.hint = model, model.config, hint
        self.generator = torch.Generator().manual_seed(1)
        self.names = list(inspect.signature(model.forward).parameters)

    def find(self, *keys: str, default: Any = None, config: Any = None) -> Any:
        """The first of these attributes in the configuration or, breadth first, in those nested in it."""
        configs = [config or self.config]
        for each in configs:
            for key in keys:
                value = getattr(each, key, None)
                if value is not None:
                    return value
            configs += [v for v in vars(each).values() if hasattr(v, "to_dict") and v not in configs]
        return default

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def ids(self, length: int = LENGTH, batch: int = BATCH) -> Tensor:
        top = LARGEST_WORD
        with contextlib.suppress(NotImplementedError, AttributeError):
            top = min(top, self.model.get_input_embeddings().weight.shape[0])
        top = min(top, self.find("vocab_size", default=top) or top)
        ids = torch.randint(min(3, top - 1), top, (batch, length), generator=self.generator)
        ends = self.find("eos_token_id")
        if isinstance(ends, int) and 0 <= ends < top:
            ids[:, -1] = ends
        return ids

    def size(self, config: Any = None) -> tuple[int, int]:
        size = self.find("image_size", "input_size", "img_size", "size", default=64, config=config)
        if isinstance(size, dict):
            size = [size.get("height", 64), size.get("width", 64)]
        if isinstance(size, (list, tuple)):
            return (int(size[-2]), int(size[-1])) if len(size) > 1 else (int(size[0]),) * 2
        return (int(size), int(size))

    def channels(self) -> int:
        found = self.find("num_channels", "in_channels", "in_chans", "channels", default=3)
        found = found if isinstance(found, int) else 3
        return found if found in (1, 3, 4) else 3

    def options(self, name: str) -> list[Any]:
        """What a parameter of this name may be given; none if nothing is known."""
        maker = getattr(self, f"_{name}", None)
        if maker:
            return maker()
        if name.endswith(("input_ids", "_ids", "labels", "tokens", "codes")):
            return [self.ids()]
        if name.endswith("features_mask") or name == "feature_attention_mask":
            lengths = dict.fromkeys(max(f.shape[1:]) for f in self._input_features())
            return [torch.ones(BATCH, length, dtype=torch.long) for length in lengths]
        if name.endswith("attention_mask"):
            return [torch.ones(BATCH, LENGTH, dtype=torch.long)]
        if name.endswith("pixel_values"):
            return self._pixel_values()
        if name.startswith(("return_", "output_")):
            return [True]
        width = self.find("hidden_size", "d_model", default=64)
        if name.endswith(("embeds", "embeddings", "hidden_states", "embedding")):
            return [self.normal(BATCH, LENGTH, width)]
        return []

    def _pixel_values(self) -> list[Any]:
        vision = getattr(self.config, "vision_config", None)
        (height, width), c = self.size(vision), self.channels()
        frames = self.find("num_frames", default=4)
        patch = self.find("patch_size", default=16)
        patch = patch[0] if isinstance(patch, (list, tuple)) else patch
        shapes = [
            (BATCH, c, height, width), (BATCH, c, 64, 64), (BATCH, c, 224, 224), (BATCH, frames, c, height, width),
            (BATCH, 1, c, height, width), (BATCH, 2, c, height, width), (BATCH, 16, c * int(patch) ** 2),
            (BATCH, c, 512, 512), (BATCH, 1, 1, c, height, width),
            self._patches(["image_grid_thw"])["pixel_values"].shape,
        ]  # fmt: skip
        if "grid_thw" in self.names or "image_grid_thw" in self.names:  # a row, or a picture, for every patch
            p = int(patch)
            shapes = [shapes[-1], (BATCH * 16, c, p, p), *((BATCH * 16, c * t * p * p) for t in (1, 2)), *shapes]
        return [self.normal(*s) for s in dict.fromkeys(shapes)]

    def _pixel_values_videos(self) -> list[Any]:
        vision = getattr(self.config, "vision_config", None)
        (height, width), c = self.size(vision), self.channels()
        frames = self.find("frames_per_clip", "num_frames", default=4)
        return [self.normal(BATCH, n, c, height, width) for n in dict.fromkeys((frames, 4, 8, 16))]

    def _input_features(self) -> list[Any]:
        mels = self.find(
            "num_mel_bins", "feature_size", "input_feat_size", "n_mels", "feature_projection_input_dim",
            "input_feat_per_channel", "input_dim", "mel_bins", "num_mels", "input_size", "spec_size", default=80,
        )  # fmt: skip
        mels = mels if isinstance(mels, int) else 80
        longest = self.find("max_source_positions", default=32)
        spec = self.find("spec_size", default=256)
        shapes = [
            (BATCH, mels, 2 * longest), (BATCH, 64, mels), (BATCH, mels, 64), (BATCH, 1, spec, mels),
            (BATCH, 200, mels), (BATCH, mels, 3000), (BATCH, 1, mels, 64), (BATCH, 1024, mels),
        ]  # fmt: skip
        return [self.normal(*s) for s in dict.fromkeys(shapes)]

    def _input_values(self) -> list[Any]:
        mels, longest = self.find("num_mel_bins", default=128), self.find("max_length", default=1024)
        shapes = [(BATCH, 8000), (BATCH, longest, mels), (BATCH, 1, 8000), (BATCH, 64, mels)]
        return [self.normal(*s) for s in shapes if isinstance(s[-1], int)]

    def _spectrogram(self) -> list[Any]:
        return [self.normal(BATCH, 20, self.find("model_in_dim", "num_mel_bins", default=80))]

    def _bbox(self) -> list[Any]:
        return [torch.tensor([[[5, 10, 40, 50]] * LENGTH] * BATCH)]

    def _grid_thw(self) -> list[Any]:
        return [torch.tensor([[1, 4, 4]] * BATCH)]

    def _image_grid_thw(self) -> list[Any]:
        return self._grid_thw()

    def _merge_sizes(self) -> list[Any]:
        return [torch.tensor([1] * BATCH), torch.tensor([2] * BATCH)]

    def _spatial_shapes(self) -> list[Any]:
        return [torch.tensor([[4, 4]] * BATCH)]

    def _pixel_attention_mask(self) -> list[Any]:
        return [torch.ones(BATCH, 16, dtype=torch.long)]

    def _target_sizes(self) -> list[Any]:
        return self._spatial_shapes()

    def _latents(self) -> list[Any]:
        width = self.find("hidden_size", "latent_dim", "d_model", default=64)
        return [self.normal(BATCH, *s) for s in ((LENGTH, width), (width, LENGTH))]

    def _inputs(self) -> list[Any]:
        return self._input_values() + self._input_features()

    def _audio_mel(self) -> list[Any]:
        return [self.normal(BATCH, 64, self.find("input_feat_size", default=128))]

    def _audio_mel_mask(self) -> list[Any]:
        return [torch.zeros(BATCH, 64, dtype=torch.bool)]

    def _encoder_hidden_states(self) -> list[Any]:
        width = self.find("encoder_hidden_size", "hidden_size", "d_model", default=64)
        return [self.normal(BATCH, LENGTH, width)]

    def _pixel_position_ids(self) -> list[Any]:
        return [torch.tensor([[[x, y] for y in range(4) for x in range(4)]] * BATCH)]

    def _hidden_states(self) -> list[Any]:
        width = self.find("hidden_size", "d_model", default=64)
        return [self._patches(["image_grid_thw"])["pixel_values"], self.normal(BATCH, LENGTH, width)]

    def _past_values(self) -> list[Any]:
        length, channels = (
            self.find("context_length", default=32),
            self.find("num_input_channels", "input_size", default=1),
        )
        lags = self.find("lags_sequence", default=[0])
        more = max(lags) if isinstance(lags, (list, tuple)) and lags else 0
        return [
            self.normal(BATCH, length + more, channels),
            self.normal(BATCH, length + more),
            self.normal(BATCH, length),
        ]

    def _past_observed_mask(self) -> list[Any]:
        return [torch.ones_like(v) for v in self._past_values()]

    def _past_time_features(self) -> list[Any]:
        number = self.find("num_time_features", default=0) or 1
        return [self.normal(*v.shape[:2], number) for v in self._past_values()]

    def _future_time_features(self) -> list[Any]:
        return [
            self.normal(
                BATCH, self.find("prediction_length", default=8), self.find("num_time_features", default=1) or 1
            )
        ]

    def _future_values(self) -> list[Any]:
        length, width = self.find("prediction_length", default=8), self.find("input_size", default=1)
        return [self.normal(BATCH, length), self.normal(BATCH, length, width)]

    def extras(self, found: dict[str, Any], names: list[str]) -> dict[str, Any]:
        """What goes with inputs that are chosen: masks, decoder tokens, sizes of pictures."""
        more: dict[str, Any] = {}
        if "input_ids" in found and "attention_mask" in names and found["input_ids"].ndim == 2:
            more["attention_mask"] = torch.ones_like(found["input_ids"])
        if "decoder_input_ids" in names and self.find("is_encoder_decoder"):
            more["decoder_input_ids"] = self.ids()
        for name in ("input_features_mask", "feature_attention_mask"):
            if name in names and "input_features" in found:
                features = found["input_features"]
                more[name] = torch.ones(BATCH, max(features.shape[1:]), dtype=torch.long)
        if "bbox" in names and "input_ids" in found:
            more["bbox"] = self._bbox()[0]
        return {k: v for k, v in more.items() if k not in found}

    def product(self, wanted: list[str], names: list[str]) -> Iterator[dict[str, Any]]:
        """Every combination of what the wanted parameters may be, with and without what goes with them."""
        lists = [self.options(n) for n in wanted]
        if any(not options for options in lists):
            return
        for chosen in itertools.islice(itertools.product(*lists), 40):
            found = dict(zip(wanted, chosen, strict=True))
            more = self.extras(found, names)
            yield {**found, **more}
            for left in dict.fromkeys((("attention_mask",), tuple(more))):
                if set(left) & set(more):
                    yield {**found, **{k: v for k, v in more.items() if k not in left}}

    def multimodal(self, names: list[str], required: list[str]) -> Iterator[dict[str, Any]]:
        """Text with pictures or sound: as many tokens that stand for them as the model makes of them."""
        if "pixel_values" in names and ("image_grid_thw" in names or "image_grid_hws" in names):
            yield from self._with_places(self._patches(names), "image", names)
        if "pixel_values" in names:
            for pixels in self._pixel_values()[:5]:
                more = (
                    {"image_sizes": torch.tensor([list(pixels.shape[-2:])] * BATCH)} if "image_sizes" in names else {}
                )
                yield from self._with_places({"pixel_values": pixels, **more}, "image", names)
        if "input_features" in names:
            for features in self._input_features():
                mask = torch.ones(features.shape[0], max(features.shape[1:]), dtype=torch.long)
                for more in ({}, {n: mask for n in ("feature_attention_mask", "input_features_mask") if n in names}):
                    yield from self._with_places({"input_features": features, **more}, "audio", names)
        for picture in (p for p in PICTURES if p in names):
            both = self.product(list(dict.fromkeys(["input_ids", picture, *required])), names)
            yield from itertools.islice(both, 6)

    def _patches(self, names: list[str]) -> dict[str, Any]:
        vision = getattr(self.config, "vision_config", self.config)
        patch = self.find("patch_size", default=14, config=vision)
        time = self.find("temporal_patch_size", default=1, config=vision)
        c = self.find("in_channels", "in_chans", "num_channels", default=3, config=vision)
        patch, time, c = (int(n[0]) if isinstance(n, (list, tuple)) else int(n) for n in (patch, time, c))
        rows = [[1, 4, 4]] * BATCH
        key = "image_grid_thw" if "image_grid_thw" in names else "image_grid_hws"
        grid = torch.tensor(rows if key.endswith("thw") else [r[1:] for r in rows])
        return {"pixel_values": self.normal(BATCH * 16, c * time * patch * patch), key: grid}

    def _with_places(self, given: dict[str, Any], kind: str, names: list[str]) -> Iterator[dict[str, Any]]:
        each = self.hint.get("places")
        token = self.find(f"{kind}_token_id", f"{kind}_token_index", "boi_token_id")
        features = getattr(self.model, f"get_{kind}_features", None) or getattr(
            getattr(self.model, "model", None), f"get_{kind}_features", None
        )
        if not isinstance(token, int) or (features is None and not each):
            return
        try:
            with torch.no_grad():
                each = each or -(-_rows(features(**given)) // BATCH)
        except Exception:
            return
        if not each:
            return
        ids = torch.cat([self.ids(2), torch.full((BATCH, each), token), self.ids(4)], dim=1)
        result = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **given}
        if "mm_token_type_ids" in names or "token_type_ids" in names:
            kinds = (ids == token).long()
            result["mm_token_type_ids" if "mm_token_type_ids" in names else "token_type_ids"] = kinds
        if "decoder_input_ids" in names:
            result["decoder_input_ids"] = self.ids()
        yield {k: v for k, v in result.items() if k in names or k in given}


def _rows(found: Any) -> int:
    """Vectors in what ``get_image_features`` returned, whatever it is wrapped in."""
    found = (
        getattr(found, "pooler_output", None)
        if hasattr(found, "pooler_output") and found.pooler_output is not None
        else found
    )
    found = getattr(found, "last_hidden_state", found)
    if isinstance(found, (list, tuple)):
        return sum(_rows(f) for f in found)
    return found.numel() // found.shape[-1] if isinstance(found, Tensor) and found.ndim > 1 else 0
