"""The half of every compressing model before the language model: tower, connectors, router, and the steps of a method.

    layout (host) -> encode -> score -> choose (host) -> connect

A method's step is a pure function of what it is given, with a plain default here. `VtcVision` is abstract; it can be
built and loaded without a language model, and `modeling_vtc.py` adds one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .configuration_vtc import VtcConfig
from .grids_vtc import pooled_frames, scaled_down, scaled_map
from .host_tower_vtc import bare_parameters_of, build_tower, restore_places, run_grid_tower
from .host_vtc import FORWARD_ARGUMENTS
from .layout_vtc import Layout, layout_of_images
from .packing_vtc import Span, to_device, to_host
from .padding_vtc import places_apart
from .prompt_vtc import Budget, VisionInputs, refuse_unknown
from .tiling_vtc import joined_order
from .tower_vtc import Connector, run_tower_to, unused_modules

# bytes to which torch aligns what it allocates on a CPU
_ALIGNMENT = 64

Features = torch.Tensor | dict[str, torch.Tensor]


class Scores(NamedTuple):
    """What `score` found: what the host reads, what the outputs show, and what `connect` may use again."""

    for_host: tuple[torch.Tensor, ...]
    router_logits: torch.Tensor
    reused: Any = None


@dataclass
class Choice:
    """What `choose` decided, on the CPU.

    `num_entering`, `num_kept` `(num_images,)`: visual tokens that enter the language model, and that leave the
    compression, which is in it if `strides` says how many of an image become one there. `frames`: as `num_frames` of
    each image's `Span`, None for 1. `decisions`: as `router_decisions` of the outputs.
    """

    num_entering: torch.LongTensor
    num_kept: torch.LongTensor
    decisions: torch.Tensor | None = None
    strides: list[int] | None = None
    frames: list[int] | None = None

    @property
    def shortens(self) -> bool:
        """Whether several visual tokens become one."""
        return any(each != 1 for each in (*(self.strides or ()), *(self.frames or ())))

    def spans(
        self, rows: Sequence[int], starts: torch.LongTensor, lengths: torch.LongTensor, columns: Sequence[int | None]
    ) -> list[Span]:
        """Where the images lie that get shorter; arguments are the fields of each."""
        frames = [1] * len(rows) if self.frames is None else self.frames
        fields = zip(rows, starts.tolist(), lengths.tolist(), self.strides, columns, frames, strict=True)
        return [Span(*each) for each in fields]


@dataclass
class VisualTokens:
    """What `connect` gives back: visual tokens, and which placeholders they fill.

    `embeds` `(V, D)` in prompt order. `slots` `(V,)`, on the CPU: which of all placeholders of the call they fill,
    rising; all of them if None. `position_shifts` `(..., V)`: if given, every token keeps the position that it has in
    the prompt before images got shorter, visual tokens that of their placeholder plus this; `entered_slots`: what was
    left of that prompt then, all of it if None. `layer_rows` `(R, V, D)`: what the first R decoder layers add to the
    visual tokens behind them, None for nothing. `router_decisions`, `router_logits`: if they were made here.
    """

    embeds: torch.Tensor
    slots: torch.LongTensor | None = None
    position_shifts: torch.Tensor | None = None
    router_decisions: torch.Tensor | None = None
    router_logits: torch.Tensor | None = None
    entered_slots: torch.LongTensor | None = None
    layer_rows: torch.Tensor | None = None


class _Touched(torch.autograd.Function):
    """The first tensor as it is; the others get gradients of zero, whatever their values are."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        ctx.likes = [(other.shape, other.dtype, other.device) for other in others]
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.likes)
        return gradient, *zeros


def touch(states: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """`states`, in whose graph `others` take part with weight zero.

    Every process of distributed training must run the same modules, and every parameter that trains must have a
    gradient, whatever the data decide. Not a product with zero, which would pass on what overflowed.
    """
    others = tuple(other for other in others if other.requires_grad)
    return _Touched.apply(states, *others) if others else states


class VtcPreTrainedModel(PreTrainedModel):
    """Loading, saving and the flags that transformers asks for."""

    config_class = VtcConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    model_tags = ["vtc", "vision-token-compression", "custom_code"]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # how many tokens are kept depends on the data
    _can_compile_fullgraph = False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers guesses from names of classes in the source; tower and decoder have the attention that is meant
        return True

    def post_init(self) -> None:
        super().post_init()
        parts = [module for module in self.modules() if isinstance(module, PreTrainedModel)]
        names = {name for part in parts for name in part._no_split_modules or ()}
        # of all parts, which transformers 4 does not collect, and none that is not here, which FSDP would miss
        self._no_split_modules = sorted(names & {type(module).__name__ for module in self.modules()})

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        restore_places(module)
        if isinstance(module, VtcVision) and module.image_newline is not None:
            nn.init.normal_(module.image_newline, std=self.config.text_config.hidden_size**-0.5)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, to the last bit whatever the file looks like.

        Weights are left where they are mapped, and a tower of convolutions on a CPU rounds otherwise at odd addresses,
        which follow from the length of the file's header.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for weight in model.base_model.vision_tower.parameters():
            if weight.device.type == "cpu" and weight.data_ptr() % _ALIGNMENT:
                weight.data = weight.data.clone()
        return loaded

    def save_pretrained(self, save_directory: str, *args: Any, save_code: bool = True, **kwargs: Any) -> None:
        """`PreTrainedModel.save_pretrained`, and the code beside the weights.

        Args:
            save_directory (`str`): the folder.
            save_code (`bool`): copy the model's source files and write every `auto_map` key, so that the folder loads
                with `trust_remote_code=True` where hf_vtc is not installed. `False` writes neither.
        """
        if save_code:
            self.config.auto_map = self.config.remote_code_map()
        else:
            # a map without files would break every load with trust_remote_code
            vars(self.config).pop("auto_map", None)
        super().save_pretrained(save_directory, *args, **kwargs)
        if save_code and kwargs.get("is_main_process", True):
            custom_object_save(self, save_directory)


class VtcVision(VtcPreTrainedModel):
    """Tower, connectors and router: the way from pixels to visual tokens. Abstract.

    `image_features` are whatever `encode` gives: a tensor, or a dict of tensors with a leading axis of tiles.
    """

    _no_split_modules = ["CLIPEncoderLayer", "SiglipEncoderLayer", "InternVLVisionLayer", "Connector"]
    # whether text that comes later can change what a router decided for an image
    routes_by_text = False
    # whether a budget that is a number settles what was decided, or `router_decisions` alone
    budgets_settle = True

    def __init__(self, config: VtcConfig):
        super().__init__(config)
        self.vision_tower = self.make_tower(config)
        joined = config.mm_patch_merge_type == "spatial_unpad"
        self.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size)) if joined else None
        self.make_decoder(config)
        self.make_parts(config)
        self.post_init()

    def make_tower(self, config: VtcConfig) -> nn.Module:
        """Step: the vision tower. A method builds encoders of ours itself: remote code cannot find them by config."""
        tower = build_tower(config.vision_config)
        if config.grid_base is not None:
            return tower
        # no feature depends on them: without this, distributed training waits for their gradients
        for unused in unused_modules(tower, config.vision_feature_layer):
            unused.requires_grad_(False)
        return tower

    def make_decoder(self, config: VtcConfig) -> None:
        """Here there is none."""

    def make_parts(self, config: VtcConfig) -> None:
        """Step: connectors and router of the method; by default LLaVA's or InternVL's two linear layers, or what the
        tower has in it."""
        width = config.text_config.hidden_size
        own = Connector(config, [width, width], config.shuffle_factor) if config.grid_base is None else None
        self.multi_modal_projector = own

    def encode(self, pixel_values: torch.Tensor, layout: Layout | None = None) -> Features:
        """Step: features of each tile, `(total_tiles, 3, S, S)` to `(total_tiles, N, C)`, row-major.

        `layout` is None where nobody says what the images are for. Of a tower that sees grids, `(patches, C)` to
        visual tokens `(V, D)`, and to more rows for each that layers of the decoder read.
        """
        if self.config.grid_base is not None:
            return self._encode_grids(pixel_values, layout)
        features = run_tower_to(self.vision_tower, pixel_values.to(self.dtype), self.config.vision_feature_layer)
        return features[:, 1:] if self.config.vision_feature_select_strategy == "default" else features

    def encode_of(self, vision: VisionInputs, layout: Layout) -> Features:
        """`encode` the tiles of a call, which may stand in a block for each image, as those of LLaVA-NeXT do."""
        if layout.videos is None:
            return self.encode(_tiles_of(vision.pixel_values, layout.sizes.num_tiles), layout)
        return self.encode(self._patches_of(vision, layout), layout)

    def _patches_of(self, vision: VisionInputs, layout: Layout) -> torch.Tensor:
        """Patches, or tiles, of images and of frames of videos in prompt order: towers run once, whatever a batch
        shows."""
        sizes, order, of_videos = layout.sizes, layout.order, vision.pixel_values_videos
        in_prompts = sizes.num_tiles
        if in_prompts is None:
            in_prompts = sizes.image_sizes.prod(-1) // self.config.vision_config.patch_size**2
        elif of_videos is not None and of_videos.ndim == 5:
            of_videos = of_videos.flatten(0, 1)
        as_given = torch.empty_like(in_prompts).index_copy_(0, order, in_prompts)
        if vision.pixel_values is None:
            patches = of_videos
        else:
            patches = _tiles_of(vision.pixel_values, as_given[: layout.videos.num_images])
            patches = patches if of_videos is None else torch.cat([patches, of_videos.to(patches)])
        if bool((order.diff() == 1).all()):
            return patches
        firsts, ends = (as_given.cumsum(0) - as_given)[order], in_prompts.cumsum(0)
        source = torch.repeat_interleave(firsts - (ends - in_prompts), in_prompts) + torch.arange(int(ends[-1]))
        (source,) = to_device(patches.device, source)
        return patches.index_select(0, source)

    def _encode_grids(self, pixel_values: torch.Tensor, layout: Layout | None) -> Features:
        if layout is None:
            raise ValueError(f"The grids of the images must be known to {self.config.grid_base}. Give `layout`.")
        grids = nn.functional.pad(layout.sizes.image_sizes // self.config.vision_config.patch_size, (1, 0), value=1)
        (grids,) = to_device(pixel_values.device, grids)
        tokens, deeper = run_grid_tower(self.vision_tower, pixel_values.to(self.dtype), grids)
        return {"tokens": tokens, **{f"layer_{idx}": rows for idx, rows in enumerate(deeper)}}

    def score(self, features: Features, prompts: torch.Tensor | None, layout: Layout) -> Scores | None:
        """Step: what a router says of the images, None if nobody asks; `prompts` are embeddings `(B, L, D)`."""
        return None

    def choose(self, scores: list[torch.Tensor], layout: Layout) -> Choice:
        """Step, on the host: how many tokens each image keeps; `scores` are those of `score` that the host reads."""
        return Choice(layout.num_leaving, layout.num_leaving)

    def connect(self, features: Features, choice: Choice, layout: Layout, scores: Scores | None) -> VisualTokens:
        """Step: from features to visual tokens. In training every module runs once, in one order."""
        if self.config.grid_base is None:
            tokens, rows = self._joined(self.multi_modal_projector(features), layout), None
        else:
            tokens, *rows = features.values()
            rows = torch.stack(rows) if rows else None
        if len(tokens) != int(layout.num_reserved.sum()):
            raise ValueError(
                f"Image features and image tokens do not match: {len(tokens)} visual tokens for "
                f"{int(layout.num_reserved.sum())} placeholders. Pass `image_features` that `encode` gave for these "
                "images."
            )
        return VisualTokens(tokens, layer_rows=rows)

    def _joined(self, tokens: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Visual tokens of tiles, joined to images, and of frames of videos fewer."""
        if layout.sizes.frames is None:
            return self.join_tiles({0: tokens}, [0] * layout.num_images, layout)
        grids, chosen = [self.config.token_grid, self.config.frame_grid], (layout.sizes.frames > 0).long().tolist()
        bank = {1: pooled_frames(tokens, *grids)}
        return self.join_tiles(bank if all(chosen) else {0: tokens, **bank}, chosen, layout, grids)

    def routes(self, router: nn.Module, asked: bool) -> bool:
        """Whether a router runs: if it is asked, or if it trains, so that every process runs the same modules."""
        trains = (
            router.training and torch.is_grad_enabled() and any(each.requires_grad for each in router.parameters())
        )
        return asked or trains

    @contextmanager
    def graph_of(self, router: nn.Module) -> Iterator[None]:
        """No graph in the body if the router is frozen: what it reads would get gradients of zero through it."""
        trains = torch.is_grad_enabled() and any(each.requires_grad for each in router.parameters())
        with torch.set_grad_enabled(trains):
            yield

    def compress(
        self, vision: VisionInputs, layout: Layout, prompts: torch.Tensor | None
    ) -> tuple[Choice, VisualTokens]:
        """All steps from pixels to visual tokens."""
        features = self.encode_of(vision, layout) if vision.image_features is None else vision.image_features
        scores = self.score(features, prompts, layout)
        choice = self.choose([] if scores is None else to_host(*scores.for_host), layout)
        visual = self.connect(features, choice, layout, scores)
        if scores is not None:
            visual.router_logits = scores.router_logits
            if self.training:
                visual.embeds = touch(visual.embeds, scores.router_logits)
        if visual.router_decisions is None and choice.decisions is not None:
            visual.router_decisions = choice.decisions.to(visual.embeds.device, non_blocking=True)
        return choice, visual

    def join_tiles(
        self,
        tokens: dict[int, torch.Tensor],
        chosen: list[int],
        layout: Layout,
        grids: Sequence[tuple[int, int]] | None = None,
    ) -> torch.Tensor:
        """Visual tokens `(V, D)` of all images, one after the other, by one gather; as maps where the layout has any.

        Args:
            tokens (`dict[int, torch.Tensor]`): `(T, g, D)` tokens of every tile, at every granularity that is used.
            chosen (`list[int]`): the granularity of each image.
            grids (`Sequence[tuple[int, int]]`, *optional*): (rows, columns) of a tile's tokens at each granularity.
        """
        grids = [self.config.token_grid] if grids is None else grids
        bank = {idx: each.flatten(0, 1) for idx, each in tokens.items()}
        with bare_parameters_of(self):
            newline, parts = self.image_newline, list(bank.values())
        if layout.sizes.grids is None and len(bank) == 1:
            joined = parts[0]
        else:
            starts = dict(zip(bank, torch.tensor([0, *map(len, parts)]).cumsum(0).tolist(), strict=False))
            num_tiles = layout.sizes.num_tiles
            first_tiles = (num_tiles.cumsum(0) - num_tiles).tolist()
            order_of = lru_cache(None)(self._token_order)  # images of one shape share theirs
            shapes = self._shapes_of_maps(layout, chosen, grids)
            orders, end = [order_of(*shape) for shape in shapes], sum(map(len, parts))
            firsts = [
                starts[idx] + first_tile * grids[idx][0] * grids[idx][1]
                for idx, first_tile in zip(chosen, first_tiles, strict=True)
            ]
            if newline is not None:
                parts.append(newline[None].to(parts[0]))
            order, lengths = torch.cat(orders), torch.tensor([len(order) for order in orders])
            source = torch.where(order < 0, end, order + torch.tensor(firsts).repeat_interleave(lengths))
            (source,) = to_device(parts[0].device, source)
            joined = torch.cat(parts).index_select(0, source)
            if self.config.max_map_tiles is not None and layout.sizes.grids is not None:
                joined = self._scaled_maps(joined, lengths.tolist(), shapes)
        return touch(joined, newline) if self.training and newline is not None else joined

    def _shapes_of_maps(
        self, layout: Layout, chosen: list[int], grids: Sequence[tuple[int, int]]
    ) -> list[tuple[tuple[int, int], int, tuple[int, int] | None, tuple[int, int] | None]]:
        """Arguments of `_token_order` for each image."""
        num_tiles = layout.sizes.num_tiles.tolist()
        if layout.sizes.grids is None:
            return [(grids[idx], num, None, None) for idx, num in zip(chosen, num_tiles, strict=True)]
        # of all images at once, since one alone costs as much
        kept = {idx: layout.sizes.kept(grids[idx], self.config.unpad_rule).tolist() for idx in set(chosen)}
        tile_grids, frames = layout.sizes.grids.tolist(), layout.sizes.frames
        is_map = [True] * len(chosen) if frames is None else (frames == 0).tolist()
        return [
            (grids[idx], num_tiles[image_idx], tuple(tile_grids[image_idx]), tuple(kept[idx][image_idx]))
            if is_map[image_idx]
            else (grids[idx], num_tiles[image_idx], None, None)
            for image_idx, idx in enumerate(chosen)
        ]

    def _scaled_maps(self, joined: torch.Tensor, lengths: list[int], shapes: Sequence[tuple]) -> torch.Tensor:
        """Tokens of images of `lengths`, where maps with too many are scaled down; `shapes` are `_shapes_of_maps`."""
        images, is_scaled = list(joined.split(lengths)), False
        for idx, (token_grid, num_tiles, _, kept) in enumerate(shapes):
            if num_tiles <= 1:
                continue
            size = tuple(scaled_down(torch.tensor(kept), token_grid, self.config.max_map_tiles).tolist())
            if size != kept:
                images[idx] = scaled_map(images[idx], token_grid[0] * token_grid[1], kept, size)
                is_scaled = True
        return torch.cat(images) if is_scaled else joined

    def _token_order(
        self,
        token_grid: tuple[int, int],
        num_tiles: int,
        tile_grid: tuple[int, int] | None,
        kept: tuple[int, int] | None,
    ) -> torch.LongTensor:
        """Which token of an image stands where, counted in the order of its tiles; -1 = newline. `kept` are (rows,
        columns) that are left of its map, None where tiles are not joined; no tile is the newline behind a video."""
        per_tile = token_grid[0] * token_grid[1]
        if kept is None:
            return torch.arange(num_tiles * per_tile) if num_tiles else torch.tensor([-1])
        if num_tiles == 1:
            single = torch.arange(per_tile)
            return nn.functional.pad(single, (0, self.config.single_tile_newlines), value=-1)
        return joined_order(tile_grid, token_grid, kept)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        num_tiles: torch.LongTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        vtc_budget: Budget | Sequence[Budget] = "full",
        image_grid_thw: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Visual tokens of some images as they enter the language model.

        Args:
            vtc_budget: as in `forward`; by default all that the processor reserves.

        Returns:
            `last_hidden_state`: features of the tower; `pooler_output`: one tensor `(entering, D)` per image.

        Raises:
            ValueError: `"auto"`, of a router that reads the question.
        """
        refuse_unknown(kwargs, FORWARD_ARGUMENTS)
        vision = VisionInputs(pixel_values, None, num_tiles, image_sizes, vtc_budget, image_grid_thw=image_grid_thw)
        if not vision.given:
            raise ValueError("`pixel_values` must hold at least one image, got none.")
        layout = layout_of_images(self.config, vision)
        if layout.asks_scores and self.routes_by_text:
            raise ValueError(
                "`vtc_budget='auto'` needs the question, by which this router goes. Give a budget for each image."
            )
        vision.image_features = self.encode_of(vision, layout)
        choice, visual = self.compress(vision, layout, None)
        features = vision.image_features
        return BaseModelOutputWithPooling(
            # of several kinds the first, which are the tower's
            last_hidden_state=next(iter(features.values())) if isinstance(features, dict) else features,
            pooler_output=list(visual.embeds.split(choice.num_entering.tolist())),
        )


def _tiles_of(pixel_values: torch.Tensor, num_tiles: torch.LongTensor | None) -> torch.Tensor:
    """Tiles of images one after the other, which may stand in a block for each."""
    if pixel_values.ndim != 5:
        return pixel_values
    (places,) = to_device(pixel_values.device, places_apart(num_tiles, pixel_values.shape[1]))
    return pixel_values.flatten(0, 1).index_select(0, places)


class VtcVisionHalf(VtcVision):
    """A `VtcVision` that loads from the checkpoint of a whole model, whose language model it leaves out. Abstract."""

    _keys_to_ignore_on_load_unexpected = [r"^(model\.)?language_model\.", r"^lm_head\."]
