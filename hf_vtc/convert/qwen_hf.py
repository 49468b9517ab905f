"""Qwen2.5-VL, Qwen3-VL and Qwen3.5 in transformers: bases whose tower sees grids.

Their `model_type` is `qwen2_5_vl`, `qwen3_vl` and `qwen3_5`.
"""

import re
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from ..methods import Record
from ..models.chat_templates_vtc import chatml_template
from ..models.host_vtc import GRID_BASES, require_base
from ..models.video_processing_vtc import VideoSettings
from .internvl_hf import require_object
from .layout import Layout
from .plan import Plan, ProcessorSettings, Renamed, Source, is_tied
from .targets import plan_base, targets_of

_IMAGE_TOKEN = "<|image_pad|>"
# of transformers' image processor, which files may leave out: CLIP's colours, and limits in pixels
_IMAGE_DEFAULTS = {
    "resample": 3,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "do_rescale": True,
    "do_normalize": True,
    "min_pixels": 56 * 56,
    "max_pixels": 28 * 28 * 1280,
}
# the same of the classes of video processors
_VIDEO_DEFAULTS = {
    "qwen2_5_vl": {
        "image_mean": _IMAGE_DEFAULTS["image_mean"],
        "image_std": _IMAGE_DEFAULTS["image_std"],
        "min_pixels": 128 * 28 * 28,
        "max_pixels": 28 * 28 * 768,
    },
    "qwen3_vl": {
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        "min_pixels": 128 * 32 * 32,
        "max_pixels": 32 * 32 * 768,
    },
}
_SAMPLING_DEFAULTS = {"qwen2_5_vl": {}, "qwen3_vl": {"do_sample_frames": True, "fps": 2}}
# settings of a video processor that images do not have
_OF_VIDEOS = ("fps", "num_frames", "min_frames", "max_frames", "do_sample_frames", "cap_pixels_per_frame")
# settings of the base's image processor that ours takes over
_HONOURED = (
    "resample",
    "image_mean",
    "image_std",
    "do_rescale",
    "do_normalize",
    "size",
    "min_pixels",
    "max_pixels",
)
# settings that say who wrote the file and where it runs, or speak of steps that the base's image processor has not
WITHOUT_EFFECT = (
    "auto_map",
    "crop_size",
    "default_to_square",
    "device",
    "disable_grouping",
    "feature_extractor_type",
    "image_processor_type",
    "input_data_format",
    "max_duration",
    "max_image_size",
    "max_video_tokens",
    "model_valid_processing_keys",
    "pad_size",
    "processor_class",
    "return_metadata",
    "return_tensors",
    "size_divisor",
    "transformers_version",
    "use_token_compression",
    "video_metadata",
    "video_processor_type",
)

_PREFIXES = (
    (re.compile(r"^(model\.)?visual\."), "model.vision_tower."),
    # files of Qwen2.5-VL keep the names that the decoder had before it moved
    (
        re.compile(r"^model\.(language_model\.)?(?=embed_tokens\.|layers\.|norm\.|rotary_emb\.)"),
        "model.language_model.",
    ),
    (re.compile(r"^lm_head\."), "lm_head."),
)


def matches(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of this layout."""
    return config.get("model_type") in GRID_BASES


def methods(config: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Record]:
    """What a checkpoint of this layout can become."""
    return targets_of(config["model_type"])


def rename(name: str) -> Renamed | None:
    """Map a name of a file or of a model in memory to ours, None for a name that this layout does not have."""
    for old, new in _PREFIXES:
        if old.match(name):
            return Renamed((old.sub(new, name, count=1),))
    return None


def plan(source: Source, target: Record, overrides: Mapping[str, Any]) -> Plan:
    """Plan the conversion of a Qwen2.5-VL, Qwen3-VL or Qwen3.5 model of transformers; a rename, no tensor changes.

    Args:
        source (`Source`): the checkpoint, or the config and the tensors of a model in memory.
        target (`Record`): what it becomes.
        overrides (`Mapping`): fields of the new config that replace those of the file.

    Raises:
        ValueError: a setting that has no counterpart here.
    """
    config, stored = source.config, source.stored
    base = config["model_type"]
    require_base(base, CONFIG_MAPPING)
    require_object(config, "vision_config")
    # old files have the decoder's fields beside the others
    parts = CONFIG_MAPPING[base].from_dict(dict(config))
    head = "lm_head.weight" if "lm_head.weight" in stored else None
    embeddings = next((name for name in stored if name.endswith("embed_tokens.weight")), "")
    tied = is_tied(source, config.get("text_config") or {}, head, embeddings)
    parts.text_config.tie_word_embeddings = tied
    images = _pixel_settings(source.image_processor, parts.vision_config)
    video, video_token_id = None, None
    if base not in _VIDEO_DEFAULTS:
        notes = ["Images only, since videos were not tried on this base: a prompt with a video is refused."]
    elif not 0 <= parts.video_token_id < parts.text_config.vocab_size:
        notes = ["The vocabulary has no placeholder of videos: a prompt with a video is refused."]
    else:
        video, notes = _video_settings(source, parts.vision_config, base, images)
        video_token_id = parts.video_token_id
    return plan_base(
        target,
        overrides,
        layout=f"{base} of transformers",
        fields={
            "vision_config": parts.vision_config,
            "text_config": parts.text_config,
            "image_token_id": source.image_token_id,
            "video_token_id": video_token_id,
            "downsample_ratio": 1.0,
            "tie_word_embeddings": tied,
        },
        rename=rename,
        processor=_processor(source, parts.vision_config, images, video),
        ignored=({head: "equal to the input embeddings"} if tied and head else {})
        | {name: "drafts tokens for speculation, which stock models do not" for name in stored if "mtp." in name},
        notes=notes,
    )


def _processor(
    source: Source, vision: PretrainedConfig, images: Mapping[str, Any], video: Mapping[str, Any] | None
) -> ProcessorSettings:
    """Settings of our processor from those of the base's; a part that does what ours does not is refused."""
    return ProcessorSettings(
        images={
            "tiling": "patches",
            "patch_size": vision.patch_size,
            "token_stride": vision.patch_size * vision.spatial_merge_size,
            **images,
        },
        fields={
            "image_token": _IMAGE_TOKEN,
            # the template writes them
            "image_start_token": None,
            "image_end_token": None,
            "count_rule": "stride",
            "video": video,
            "chat_template": source.chat_template or chatml_template(f"<|vision_start|>{_IMAGE_TOKEN}<|vision_end|>"),
        },
    )


def _video_settings(
    source: Source, vision: PretrainedConfig, base: str, images: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, list[str]]:
    """How videos are taken, and notes; None with the reason where their settings ask for what ours do not do."""
    given = {name: value for name, value in source.video_processor.items() if value is not None}
    own = {name: given.pop(name) for name in _OF_VIDEOS if name in given}
    try:
        if own.pop("cap_pixels_per_frame", False):
            raise ValueError("`cap_pixels_per_frame` of the video processor must be False, got True.")
        pixels = _pixel_settings(given, vision, _IMAGE_DEFAULTS | _VIDEO_DEFAULTS[base], "video")
        limits = {name: pixels.pop(name) for name in ("min_pixels", "max_pixels")}
        for name, value in pixels.items():
            if value != images[name]:
                raise ValueError(
                    f"`{name}` of the video processor must be that of the image processor, {images[name]}, got "
                    f"{value}."
                )
        sampling = {**_SAMPLING_DEFAULTS[base], **own}
        if "num_frames" in own and "fps" not in own:
            sampling.pop("fps", None)
        return VideoSettings(base=base, **limits, **sampling).to_dict(), []
    except ValueError as error:
        return None, [f"The processor refuses prompts with videos: {error}"]


def _pixel_settings(
    given: Mapping[str, Any],
    vision: PretrainedConfig,
    defaults: Mapping[str, Any] = _IMAGE_DEFAULTS,
    kind: str = "image",
) -> dict[str, Any]:
    """How pixels become values, from the settings of an image processor or a video processor of the base.

    Raises:
        ValueError: a setting asks for what our image processor does not do, or is none that it knows.
    """
    given = {name: value for name, value in given.items() if value is not None}
    only = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "do_resize": True,
        "do_convert_rgb": True,
        "do_center_crop": False,
        "do_pad": False,
        "data_format": "channels_first",
        "rescale_factor": 1 / 255,
    }
    for name, value in only.items():
        if given.get(name, value) != value:
            raise ValueError(
                f"`{name}` of the {kind} processor must be {value} for this tower, got {given[name]}. Repair its file."
            )
    for name in given:
        # names with an underscore are attributes that some versions of transformers wrote by mistake
        if not name.startswith("_") and name not in {*only, *_HONOURED, *WITHOUT_EFFECT}:
            raise ValueError(
                f"`{name}` of the {kind} processor is not known to be without effect, and ours has no such setting. "
                "Remove it from its file if it changes nothing."
            )
    return {
        **{name: given.get(name, defaults[name]) for name in ("resample", "do_rescale", "do_normalize")},
        **{name: _by_channel(given.get(name, defaults[name])) for name in ("image_mean", "image_std")},
        **_limits(given, defaults, kind),
    }


def _by_channel(value: Any) -> Any:
    return [value] * 3 if isinstance(value, (int, float)) else list(value)


def _limits(given: Mapping[str, Any], defaults: Mapping[str, Any], kind: str) -> dict[str, int]:
    """Pixels between which the size of an image is left alone; their own names win over `size`, as in transformers."""
    size = given.get("size", {})
    known = {"shortest_edge", "longest_edge", "min_pixels", "max_pixels"}
    if not isinstance(size, Mapping) or not known.issuperset(size):
        raise ValueError(
            f"`size` of the {kind} processor must be limits in pixels, `shortest_edge` and `longest_edge`, got "
            f"{size}. Repair its file."
        )
    size = {name: value for name, value in size.items() if value is not None}
    return {
        name: given.get(name) or size.get(edge) or size.get(name) or defaults[name]
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
    }


LAYOUT = Layout(
    title="Qwen2.5-VL, Qwen3-VL and Qwen3.5 of transformers (`model_type` 'qwen2_5_vl', 'qwen3_vl', 'qwen3_5')",
    image_token=_IMAGE_TOKEN,
    matches=matches,
    methods=methods,
    rename=rename,
    plan=plan,
    model_classes=(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "Qwen3_5ForConditionalGeneration",
    ),
)
