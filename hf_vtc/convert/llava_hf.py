"""LLaVA, LLaVA-NeXT and LLaVA-OneVision in transformers: bases.

Repositories of `llava-hf`, `model_type` `llava`, `llava_next` and `llava_onevision`.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any

from ..methods import Record
from ..models.image_processing_vtc import LLAVA_NEXT_PINPOINTS
from ..models.video_processing_vtc import VideoSettings
from .internvl_hf import decoder_config, head_name, one_layer, require_object
from .layout import Layout
from .llava_official import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGE_TOKEN,
    llava_processor,
    merge_fields,
    normalization,
    tower_config,
)
from .plan import Plan, Renamed, Source, is_tied
from .qwen_hf import WITHOUT_EFFECT
from .targets import plan_base, targets_of

_ONEVISION_SIDES = range(384, 2305, 384)
# what a `config.json` may leave out: decoder, feature layer, features that are read, canvases
_DEFAULTS = {
    "llava": ("llama", -2, "default", None),
    "llava_next": ("llama", -2, "default", LLAVA_NEXT_PINPOINTS),
    "llava_onevision": ("qwen2", -1, "full", tuple(itertools.product(_ONEVISION_SIDES, repeat=2))),
}
_TITLES = {"llava": "LLaVA", "llava_next": "LLaVA-NeXT", "llava_onevision": "LLaVA-OneVision"}
_PADDED = "Images are padded to squares, as in training; transformers crops them by default."
_IMAGES_ONLY = "Images only: a prompt with a video is refused."
# the placeholder of videos, and its id where a file does not say it
_VIDEO_TOKEN, _VIDEO_TOKEN_ID = "<video>", 151647
# of the video processor of LLaVA-OneVision: what ours honours, and what it does, with the defaults of the base
_SAMPLING = ("do_sample_frames", "fps", "num_frames")
_VIDEO_DEFAULTS = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "do_center_crop": False,
    "data_format": "channels_first",
    "rescale_factor": 1 / 255,
    "resample": 3,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}

_PREFIXES = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(model\.)?language_model\.(model\.)?"), "model.language_model."),
    # the level that CLIP and SigLIP had before transformers 5.x
    (re.compile(r"^(model\.)?vision_tower\.(vision_model\.)?"), "model.vision_tower."),
    (re.compile(r"^(model\.)?multi_modal_projector\."), "model.multi_modal_projector."),
    (re.compile(r"^(model\.)?image_newline$"), "model.image_newline"),
    (re.compile(r"^lm_head\."), "lm_head."),
)


def matches(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of this layout."""
    return config.get("model_type") in _DEFAULTS and "text_config" in config


def methods(config: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Record]:
    """What a checkpoint of this layout can become."""
    return targets_of(config["model_type"])


def stored_image_token_id(config: Mapping[str, Any]) -> int | None:
    """Id of the placeholder in `config.json`, under its name of any version."""
    return config.get("image_token_id", config.get("image_token_index"))


def rename(name: str) -> Renamed | None:
    """Map a name of a file or of a model in memory to ours, None for a name that this layout does not have."""
    for old, new in _PREFIXES:
        if old.match(name):
            return Renamed((old.sub(new, name, count=1),))
    return None


def plan(source: Source, target: Record, overrides: Mapping[str, Any]) -> Plan:
    """Plan the conversion of a LLaVA, LLaVA-NeXT or LLaVA-OneVision model of transformers.

    Args:
        source (`Source`): the checkpoint, or the config and the tensors of a model in memory.
        target (`Record`): what it becomes.
        overrides (`Mapping`): fields of the new config that replace those of the file.

    Raises:
        ValueError: a tower or setting that has no counterpart here.
    """
    config, stored, base = source.config, source.stored, source.config["model_type"]
    default_decoder, default_layer, default_selected, canvases = _DEFAULTS[base]
    text = require_object(config, "text_config")
    if not config.get("multimodal_projector_bias", True):
        raise ValueError("`multimodal_projector_bias` must be True: the projector here has biases.")
    anyres = {} if canvases is None else {"image_grid_pinpoints": config.get("image_grid_pinpoints") or canvases}
    if base == "llava_onevision":
        anyres["max_map_tiles"] = _max_map_tiles(config)
    fields, notes = {}, {"llava": [_PADDED], "llava_onevision": [_IMAGES_ONLY]}.get(base, [])
    head = head_name(stored)
    embeddings = next((name for name in stored if name.endswith("embed_tokens.weight")), "")
    tied = is_tied(source, text, head, embeddings)
    tower = tower_config(require_object(config, "vision_config"))
    decoder = decoder_config(text, default_decoder, tied)
    processor = llava_processor(source, tower, decoder, anyres, "true_aspect")
    if base == "llava_onevision" and target.config.takes_tiled_videos:
        fields["video_token_id"] = config.get("video_token_id", config.get("video_token_index", _VIDEO_TOKEN_ID))
        processor.fields["video"], notes = _video_settings(source, processor.images)
    return plan_base(
        target,
        overrides,
        layout=f"{_TITLES[base]} of transformers",
        fields={
            "vision_config": tower,
            "text_config": decoder,
            "image_token_id": source.image_token_id,
            "vision_feature_layer": one_layer(config.get("vision_feature_layer", default_layer)),
            "vision_feature_select_strategy": config.get("vision_feature_select_strategy", default_selected),
            "projector_hidden_act": config.get("projector_hidden_act", "gelu"),
            "downsample_ratio": 1.0,
            "tie_word_embeddings": tied,
            **merge_fields(anyres, "true_aspect"),
            **fields,
        },
        rename=rename,
        processor=processor,
        ignored={head: "equal to the input embeddings"} if tied and head else {},
        notes=notes,
    )


def _video_settings(source: Source, images: Mapping[str, Any]) -> tuple[dict[str, Any] | None, list[str]]:
    """How videos are taken, and notes; None with the reason where their settings ask for what ours do not do."""
    given = {name: value for name, value in source.video_processor.items() if value is not None}
    side = {"height": images["size"], "width": images["size"]}
    try:
        of_images = {name: list(value) for name, value in normalization(source).items()}
        only = {**_VIDEO_DEFAULTS, "size": side, **of_images}
        # settings of images stand in for those of videos, which are not cut or padded
        known = {*only, *_SAMPLING, *WITHOUT_EFFECT, "do_pad", "image_grid_pinpoints", "vision_aspect_ratio"}
        refused = [name for name in given if not name.startswith("_") and name not in known]
        if refused:
            raise ValueError(f"`{refused[0]}` of the video processor is not known to be without effect.")
        for name, value in only.items():
            found = given.get(name, _VIDEO_DEFAULTS.get(name, side))
            found = list(found) if isinstance(found, tuple) else found
            if found != value:
                raise ValueError(f"`{name}` of the video processor must be {value}, as of images, got {found}.")
        sampling = {name: given[name] for name in _SAMPLING if name in given}
        settings = VideoSettings("llava_onevision", token=_VIDEO_TOKEN, start_token="", end_token="", **sampling)
        return settings.to_dict(), []
    except ValueError as error:
        return None, [f"The processor refuses prompts with videos: {error}"]


def _max_map_tiles(config: Mapping[str, Any]) -> int:
    """The limit in `vision_aspect_ratio`, `"anyres_max_9"` where a file does not say it."""
    given = config.get("vision_aspect_ratio", "anyres_max_9")
    found = re.fullmatch(r"anyres_max_([1-9]\d*)", str(given))
    if found is None:
        raise ValueError(f"`vision_aspect_ratio` must be 'anyres_max_' and a number of tiles, got {given!r}.")
    return int(found[1])


LAYOUT = Layout(
    title="LLaVA, LLaVA-NeXT and LLaVA-OneVision of transformers, `llava-hf` (`model_type` "
    "'llava', 'llava_next', 'llava_onevision')",
    image_token=IMAGE_TOKEN,
    matches=matches,
    methods=methods,
    rename=rename,
    plan=plan,
    stored_image_token_id=stored_image_token_id,
    model_classes=(
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "LlavaOnevisionForConditionalGeneration",
    ),
)
