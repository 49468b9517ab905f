"""Text, images and videos to model inputs: one processor for every method.

A chat template or a raw prompt holds one placeholder per image. The processor replaces it by `image_start_token`, as
many placeholders as the method may need for that image (contract: reserve, then pack), and `image_end_token`.
"""

import inspect
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, BatchFeature, PretrainedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.processing_utils import MultiModalData
from transformers.utils import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE, PROCESSOR_NAME

from .chat_templates_vtc import (  # noqa: F401  public under this name too
    chat_template_for,
    chatml_template,
    mistral_template,
    vicuna_template,
)
from .counting_vtc import COUNT_RULES
from .host_processor_vtc import ProcessorBase
from .image_loading_vtc import alone_in_rows, rows_or_flat, sizes_of_images
from .image_processing_vtc import VtcImageProcessor, push_copy, write_json
from .padding_vtc import images_apart
from .processor_arguments_vtc import CALL_ARGUMENTS, VtcProcessorKwargs, layout_fields, refuse_unknown_arguments
from .prompt_vtc import BY_SCORES, budgets_per_image, chosen_levels
from .tiling_vtc import TilingSettings, refuse_misnamed, refuse_unknown
from .video_processing_vtc import VideoSettings
from .video_prompts_vtc import VIDEO_ARGUMENTS, VideoPrompts, image_argument

TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
# what the decoders take; tokenizers of some versions add `token_type_ids`, which `generate` refuses
TEXT_INPUT_NAMES = ["input_ids", "attention_mask"]


# how a folder or repository is found and read, which holds for the model's configuration in it too
_SOURCE_ARGUMENTS = (
    "cache_dir",
    "code_revision",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
# keys of `processor_config.json` that are no fields
_WRITTEN_BY_HOSTS = ("processor_class", "auto_map", "image_processor", "tokenizer", "chat_template", "audio_tokenizer")


class VtcProcessor(VideoPrompts, ProcessorBase):
    """Chat or prompt plus images to `input_ids`, `attention_mask`, `pixel_values`, `num_tiles` and `image_sizes`.

    The given tokenizer is set up for generation: padding on the left, no `token_type_ids`, and if it has no padding
    token its end token pads. For training, `processor.tokenizer.padding_side` may be changed afterwards.

    A call reserves the largest count of placeholders, and the model drops what it does not need. Called with
    `vtc_budget`, as the model takes it, it writes just the visual tokens that enter the language model at that budget;
    the model takes such a prompt at this budget alone. Where only pixels can tell how many these are, at `"auto"` of
    a method that routes, that is refused. Budgets need the model's configuration, see `model_config`.

    Args:
        image_processor (`VtcImageProcessor`): cuts images into tiles.
        tokenizer (`PreTrainedTokenizerBase`): must know the image tokens.
        chat_template (`str` or `dict`): Jinja template that writes `image_token` once per image. Default: ChatML.
        image_seq_length (`int`): reserved placeholders per tile; what else it counts, `count_rule` says.
        image_token (`str`): the placeholder.
        image_start_token (`str`): written before the placeholders of an image; `None` for none.
        image_end_token (`str`): written after the placeholders of an image; `None` for none.
        count_rule (`str`): how many placeholders an image reserves; `"tiles"`: `image_seq_length` per tile;
            `"unpad_token_grid"`, `"unpad_true_aspect"`: those of a map without padding, for `tiling="anyres"`, see
            `counting_vtc.py` and the `unpad_rule` of the model's configuration; `"stride"`: one per `token_stride` x
            `token_stride` pixels of the processed image.
        return_layout (`bool`, *optional*): whether `num_tiles` are returned. Default: where the model could not find
            out by itself, which is for images without text, with `vtc_budget`, and where neither an
            `image_start_token` nor the size says where an image ends. `False` is for trainers that deal out images,
            as TRL's do, which have a `num_tiles` of their own: `pixel_values` are `(num_images, most tiles, 3, S, S)`
            then, as those of LLaVA-NeXT, with zeros behind the tiles of an image that has fewer. It concerns a
            trainer and not a checkpoint, so that it is not saved.
        video (`dict`, *optional*): how videos are taken, the fields of `VideoSettings` in `video_processing_vtc.py`;
            None for models that take none.

    Raises:
        ValueError: a token is unknown to the tokenizer, or a field is outside of its range.
    """

    valid_processor_kwargs = VtcProcessorKwargs

    def __init__(
        self,
        image_processor: VtcImageProcessor,
        tokenizer: Any,
        chat_template: str | dict[str, str] | None = None,
        image_seq_length: int = 256,
        image_token: str = "<IMG_CONTEXT>",
        image_start_token: str | None = "<img>",
        image_end_token: str | None = "</img>",
        count_rule: str = "tiles",
        return_layout: bool | None = None,
        video: dict[str, Any] | None = None,
    ):
        if image_seq_length < 1:
            raise ValueError(f"`image_seq_length` counts placeholders per tile, must be positive: {image_seq_length}.")
        if count_rule not in COUNT_RULES:
            raise ValueError(f"`count_rule` must be one of {', '.join(COUNT_RULES)}, got {count_rule!r}.")
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_start_token = image_start_token
        self.image_end_token = image_end_token
        self.count_rule = count_rule
        self.return_layout = return_layout
        self.video = None if video is None else VideoSettings.from_dict(video).to_dict()
        self._model_config: PretrainedConfig | None = None
        self._source: tuple[Any, dict[str, Any]] | None = None
        super().__init__(image_processor, tokenizer, chat_template=chat_template or chatml_template(image_token))
        self.image_token_id = self._known_id("image_token", image_token)
        for name, token in (("image_start_token", image_start_token), ("image_end_token", image_end_token)):
            if token is not None:
                self._known_id(name, token)
        if self.video is not None:
            needed = "anyres" if VideoSettings.from_dict(self.video).as_tiles else "patches"
            if image_processor.tiling != needed:
                raise ValueError(
                    f"`video` needs `tiling={needed!r}` of images for {self.video['base']}, got "
                    f"{image_processor.tiling!r}."
                )
            # under the names by which transformers looks for them
            self.video_token = self.video["token"]
            self.video_token_id = self._known_id("token of `video`", self.video_token)
        tokenizer.padding_side = "left"
        tokenizer.model_input_names = list(TEXT_INPUT_NAMES)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def _known_id(self, name: str, token: str) -> int:
        token_id = self.tokenizer.get_vocab().get(token)
        if token_id is None:
            raise ValueError(
                f"`{name}` must be one token of the tokenizer, which does not know {token!r}. Add it by "
                f"`tokenizer.add_tokens([{token!r}], special_tokens=True)` and resize the model's embeddings."
            )
        return token_id

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As in transformers. Where the processor comes from is remembered, for `model_config`."""
        source = {name: kwargs[name] for name in _SOURCE_ARGUMENTS if kwargs.get(name) is not None}
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        # a pair under `return_unused_kwargs`
        processor = loaded[0] if isinstance(loaded, tuple) else loaded
        processor._source = (pretrained_model_name_or_path, source)
        return loaded

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; a field that this version does not know is refused."""
        known = {*inspect.signature(cls.__init__).parameters} - {"self"}
        refuse_unknown(processor_dict, known | {*_WRITTEN_BY_HOSTS}, "`VtcProcessor`")
        # those of image processor, tokenizer and host stand here too
        refuse_misnamed(kwargs, known | {*TilingSettings.__dataclass_fields__}, "`VtcProcessor`")
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    @property
    def model_config(self) -> PretrainedConfig:
        """Configuration of the model, from which `vtc_budget` is planned.

        Read at first use from where the processor was loaded, and kept. It may be set, and must be where a model's
        configuration was changed in memory: `processor.model_config = model.config`.

        Raises:
            ValueError: there is none, or it is of another kind of model.
        """
        if self._model_config is None:
            self.model_config = self._read_model_config()
        return self._model_config

    @model_config.setter
    def model_config(self, config: PretrainedConfig) -> None:
        if not config.model_type.startswith("vtc_"):
            raise ValueError(
                f"`model_config` must be the configuration of a model of hf_vtc, got `model_type` "
                f"{config.model_type!r}. Set `processor.model_config = model.config`."
            )
        self._model_config = config

    def _read_model_config(self) -> PretrainedConfig:
        remedy = "Set `processor.model_config = model.config`, or leave `vtc_budget` out of the processor's call."
        if self._source is None:
            raise ValueError(
                f"`vtc_budget` needs the model's configuration, and this processor was not loaded beside one. {remedy}"
            )
        place, arguments = self._source
        try:
            return AutoConfig.from_pretrained(place, **arguments)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`vtc_budget` needs the model's configuration, and none could be read from {str(place)!r}, where "
                f"this processor comes from ({error}). {remedy}"
            ) from error

    @property
    def call_arguments(self) -> frozenset[str]:
        """Names of the arguments of a call."""
        return CALL_ARGUMENTS if self.video is None else CALL_ARGUMENTS | VIDEO_ARGUMENTS

    @property
    def unused_input_names(self) -> list[str]:
        """Outputs of the parts that no model takes, or that the caller does not want."""
        return ["token_type_ids", "num_patches"]

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """As in transformers, with fields of the image processor and `vtc_budget` among `kwargs`.

        Where videos are taken, also `video_metadata` (of each a dictionary with `fps`, and `total_num_frames` and
        `frames_indices` where frames were sampled before), `do_sample_frames`, `fps` and `num_frames`. A budget of a
        list names all images first, then all videos.
        """
        of_videos = {}
        if self.video is not None:
            text, of_videos, kwargs = self.with_videos(text, videos, kwargs)
            videos = None
        features = super().__call__(images, text, videos, audio, **kwargs)
        features.update(of_videos)
        if "num_tiles" not in features:
            return features
        if self.return_layout is False:
            features["pixel_values"] = images_apart(features["pixel_values"], features.pop("num_tiles"))
        elif self.return_layout is None and text is not None and image_argument("vtc_budget", kwargs) is None:
            runs_tell = self.image_start_token is not None or self.count_rule != "tiles"
            # by chance a map that is scaled down can be as long as some single tiles
            if runs_tell and self.image_processor.max_map_tiles is None:
                features.pop("num_tiles")
        return features

    def prepare_inputs_layout(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> tuple[Any, list[str] | None, Any, Any]:
        """Text as a new list, images loaded; no image at all is `None`.

        Raises:
            ValueError: an argument is unknown, or text and images are interchanged.
        """
        refuse_unknown_arguments(kwargs)
        if text is not None:
            text = list(text) if isinstance(text, (list, tuple)) else [text]
            # token ids are named below
            wrong = next((sample for sample in text if not isinstance(sample, (str, int, list, tuple))), None)
            if wrong is not None:
                raise ValueError(
                    f"`text` must be a string or a list of strings, got {type(wrong).__name__}. The order is "
                    "`processor(images, text)`. Better name them: `processor(text=..., images=...)`."
                )
        if images is not None:
            self.image_processor.check_rescaling(images, image_argument("do_rescale", kwargs))
            images = self._fetched(images, text, image_argument("input_data_format", kwargs))
        return images or None, text, videos, audio

    def _fetched(self, images: Any, text: list[str] | None, data_format: str | None) -> list:
        try:
            return rows_or_flat(self.image_processor.fetch_images(images, data_format))
        except OSError as error:
            if text is not None or not isinstance(images, str):
                raise
            raise type(error)(
                f"{error} If it is a prompt, name it: `processor(text=...)`; the first argument is `images`."
            ) from error

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> None:
        """Check that every placeholder has an image and every image a placeholder.

        Raises:
            ValueError: they do not match; the message names the sample.
        """
        if videos is not None or audio is not None:
            raise ValueError("`videos` and `audio` are not supported. Pass the frames of a video as images.")
        if images is None and text is None:
            raise ValueError("`text` or `images` must be given, got neither.")
        vtc_budget = image_argument("vtc_budget", kwargs)
        if text is None:
            if vtc_budget is not None:
                raise ValueError("`vtc_budget` says how many placeholders `text` gets, which was not given.")
            return
        runs_tell = self.return_layout is False and self.count_rule == "tiles"
        if vtc_budget is not None:
            budgets_per_image(vtc_budget, sum(len(row) if isinstance(row, list) else 1 for row in images or []))
            if runs_tell and "num_tiles" in self.image_processor.model_input_names:
                raise ValueError(
                    "`vtc_budget` does not go with `return_layout=False`: without `num_tiles` the model finds an "
                    "image's tiles from the length of its placeholders, of which there are fewer then."
                )
        if not all(isinstance(sample, str) for sample in text):
            raise ValueError("`text` must be a string or a list of strings. Decode token ids first.")
        if runs_tell and self.image_start_token is None:
            if any(self.image_token * 2 in sample for sample in text):
                raise ValueError(
                    f"`return_layout=False` needs something between images, got {self.image_token * 2}: the model "
                    "would take them for one. Write text between them, or set `return_layout=None`."
                )
        counts = [sample.count(self.image_token) for sample in text]
        images = [] if images is None else images
        rows = images if images and isinstance(images[0], list) else None
        if rows is None and (len(text) == 1 or not images):
            rows = [images] * len(text)
        if rows is None:
            if sum(counts) != len(images):
                raise ValueError(
                    f"The samples have {counts} image placeholders ({self.image_token}), {sum(counts)} together, but "
                    f"{len(images)} images were given. Pass `images` as one list per sample to see which one is wrong."
                )
            return
        if len(rows) != len(text):
            raise ValueError(f"`images` must have one list per sample, got {len(rows)} for {len(text)} samples.")
        for index, (count, row) in enumerate(zip(counts, rows)):
            if count != len(row):
                raise ValueError(
                    f"Sample {index} has {count} image placeholders ({self.image_token}) but {len(row)} images. Give "
                    "each image one placeholder in the text, or one content item in the chat."
                )

    def reserved_tokens(self, height: int, width: int, alone: bool = True, **overrides: Any) -> int:
        """Placeholders that an image of this size reserves, its start and end token not counted.

        Args:
            height (`int`): of the upright image, in pixels.
            width (`int`): of the upright image, in pixels.
            alone (`bool`): whether no other image is in its prompt, see `max_map_tiles` of `VtcImageProcessor`.
            **overrides: fields of the image processor for this call.
        """
        return COUNT_RULES[self.count_rule](
            self.image_processor.get_tile_layout(height, width, alone, **overrides), self.image_seq_length
        )

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """What one placeholder of the prompt becomes where the largest count is reserved."""
        if "image_grid_thw" in image_inputs:
            grid, of_images = image_inputs["image_grid_thw"][image_idx], self.image_processor
            return self._expanded(math.prod(map(int, grid)) * of_images.patch_size**2 // of_images.token_stride**2)
        height, width = (int(side) for side in image_inputs["image_sizes"][image_idx])
        alone = "num_tiles" not in image_inputs or int(image_inputs["num_tiles"][image_idx]) > 1
        return self._expanded(self.reserved_tokens(height, width, alone, **layout_fields(kwargs)))

    def written_tokens(
        self,
        image_sizes: Sequence[Sequence[int]],
        vtc_budget: Any = None,
        alone: Sequence[bool] | None = None,
        **overrides: Any,
    ) -> list[int]:
        """Placeholders that each image of a call gets, start and end tokens not counted.

        Args:
            image_sizes (`Sequence[Sequence[int]]`): (height, width) in pixels of upright images.
            vtc_budget: `None` for as many as the method may need at any budget; else as the model takes it, with one
                entry per image if it is a list, for as many as enter the language model at it.
            alone (`Sequence[bool]`, *optional*): of each image, as in `reserved_tokens`. Default: every one is.
            **overrides: fields of the image processor for this call.

        Raises:
            ValueError: nothing fits `vtc_budget`, only pixels can tell what does, or `model_config` is missing or of
                another model.
        """
        placed = list(zip(image_sizes, alone or [True] * len(image_sizes), strict=True))
        reserved = [self.reserved_tokens(*size, each, **overrides) for size, each in placed]
        if vtc_budget is None:
            return reserved
        config = self.model_config
        num_tiles = [self.image_processor.get_tile_layout(*size, each, **overrides).num_tiles for size, each in placed]
        told = [self.image_processor.get_model_size(*size, **overrides) for size in image_sizes]
        sizes = config.sizes_of(torch.tensor(num_tiles, dtype=torch.long), torch.tensor(told).reshape(-1, 2))
        of_model = config.reserved_tokens(sizes).tolist()
        if of_model != reserved:
            raise ValueError(
                f"The model of `model_config` needs {of_model} placeholders for these images without compression, but "
                f"this processor reserves {reserved}: they belong to different models. Set "
                "`processor.model_config = model.config` of the model that is run."
            )
        counts = config.levels(sizes)
        levels = chosen_levels(vtc_budget, counts, config.own_level)
        if BY_SCORES in levels:
            raise ValueError(
                f"`vtc_budget='auto'` lets {config.model_type} decide from the pixels of image "
                f"{levels.index(BY_SCORES)}, which the processor cannot know. Leave `vtc_budget` out of its call, so "
                "that every decision has room, or give a number of tokens, a share of them or 'full'."
            )
        if any(levels):
            config.check_exact()
        return [own[config.level_entering(level)] for own, level in zip(counts, levels, strict=True)]

    def images_and_placeholders(
        self, images: Any, vtc_budget: Any = None, **kwargs: Any
    ) -> tuple[dict[str, Any], list[str]]:
        """Model inputs of the images of a call, and what the placeholder of each becomes in the prompt."""
        image_inputs = self.image_processor(images, **kwargs)
        placed = sizes_of_images(images), vtc_budget, alone_in_rows(images)
        return image_inputs, list(map(self._expanded, self.written_tokens(*placed, **layout_fields(kwargs))))

    def _expanded(self, count: int) -> str:
        return (self.image_start_token or "") + self.image_token * count + (self.image_end_token or "")

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, vtc_budget: Any = None, **kwargs: Any
    ) -> MultiModalData:
        """Placeholders and tiles of images, given as (height, width) in pixels; serving engines call this.

        Args and errors: as `written_tokens`.
        """
        if image_sizes is None:
            return MultiModalData()
        fields = layout_fields(kwargs)
        return MultiModalData(
            num_image_tokens=self.written_tokens(image_sizes, vtc_budget, **fields),
            num_image_patches=[
                self.image_processor.get_number_of_image_patches(*size, fields) for size in image_sizes
            ],
        )

    def remote_code_map(self) -> dict[str, str]:
        """`auto_map` of a folder that carries its own code: auto class -> `file.Class`."""
        name = f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
        return {"AutoProcessor": name, **self.image_processor.remote_code_map()}

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, save_code: bool = True, **kwargs: Any
    ) -> list[str]:
        """Write one folder that every supported version of transformers loads.

        Args:
            save_directory (`str` or `os.PathLike`): made if missing.
            push_to_hub (`bool`): upload as well; `kwargs` then go to `push_to_hub` (`repo_id`, `token`, ...).
            save_code (`bool`): write `auto_map` keys and copy the code files, so that the folder works with
                `trust_remote_code=True` where hf_vtc is not installed.

        Returns:
            The paths of the configuration files.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(str(folder))
        _make_loadable_everywhere(folder / TOKENIZER_CONFIG_NAME)
        self._write_chat_templates(folder)
        config = self._config_dict()
        if save_code:
            config["auto_map"] = self.remote_code_map()
            config["image_processor"]["auto_map"] = self.image_processor.remote_code_map()
            custom_object_save(self, folder)
            custom_object_save(self.image_processor, folder)
        write_json(folder / PROCESSOR_NAME, config)
        if push_to_hub:
            push_copy(self, folder, save_code, **kwargs)
        return [str(folder / PROCESSOR_NAME)]

    def _config_dict(self) -> dict[str, Any]:
        return {
            "processor_class": type(self).__name__,
            "image_processor": self.image_processor.to_dict(),
            "image_seq_length": self.image_seq_length,
            "image_token": self.image_token,
            "image_start_token": self.image_start_token,
            "image_end_token": self.image_end_token,
            "count_rule": self.count_rule,
            **({} if self.video is None else {"video": self.video}),
        }

    def _write_chat_templates(self, folder: Path) -> None:
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        for name, template in templates.items():
            if Path(name).name != name:
                raise ValueError(f"A name in `chat_template` must be usable as a file name, got {name!r}.")
            file = folder / CHAT_TEMPLATE_FILE if name == "default" else folder / CHAT_TEMPLATE_DIR / f"{name}.jinja"
            file.parent.mkdir(exist_ok=True)
            file.write_text(template, encoding="utf-8")


def _make_loadable_everywhere(file: Path) -> None:
    """Rewrite what one version of transformers writes in `tokenizer_config.json` and another cannot read."""
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        # the name of this class before 5.0, which 5.x still knows
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_json(file, config | {"model_input_names": list(TEXT_INPUT_NAMES), "padding_side": "left"})
