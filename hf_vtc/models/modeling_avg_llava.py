"""AVG-LLaVA: every tile pooled to several granularities, and a router that chooses one of them per image.

Paper: "AVG-LLaVA: An Efficient Large Multimodal Model with Adaptive Visual Granularity" (arXiv 2410.02745). Upstream:
DeepLearnXMU/AVG-LLaVA@3685bc8, `llava/model/llava_arch.py`, `llava/model/multimodal_router/builder.py` (Apache-2.0).
Weights: `zhibinlan/AVG-LLaVA` (LLaMA-2 community licence).

Ours: batches, padding on either side, several images per row, text-only rows, budgets; one gather of chosen tokens.
Three peculiarities of the released code are kept as options that the converter switches on, see `AvgLlavaConfig`:
attention across tiles, padding measured on the distorted grid of tokens, and no text for the later images of a row.
Where we differ: the text of an image is that of its own row (upstream takes the row whose index is that of the image,
which is the same where each row has one image); padding never fills up the text rows.

`modeling_router_avg_llava.py` has the router, this file what it needs and what follows from its choice.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .budget_vtc import budgets_per_image, largest_admissible, leaves_a_choice
from .configuration_avg_llava import AvgLlavaConfig
from .connector_vtc import Connector
from .modeling_router_avg_llava import GranularityRouter, filter_text
from .modeling_vtc import VtcForConditionalGeneration, VtcModel
from .ops_vtc import pool_pyramid
from .packing_vtc import rows_of_images
from .prompt_vtc import HostPrompt, Prompt, VisualTokens, tiles_of_images
from .tiling_vtc import best_canvases, joined_order, refuse_no_pixels, refuse_wrong_tiles, unpadded_grids


@dataclass
class ImagePlan:
    """Sizes of the images of one call at every granularity, on the CPU.

    `first_tile`, `num_tiles`: one int per image. `counts` `(num_images, E)`: visual tokens. `grids` `(num_images, 2)`
    and `kept` (one `(num_images, 2)` per granularity): (rows, columns) of tiles and of unpadded tokens; None where
    tiles follow each other as they are.
    """

    first_tile: list[int]
    num_tiles: list[int]
    counts: torch.Tensor
    grids: torch.Tensor | None
    kept: list[torch.Tensor] | None


class ImageSizes(NamedTuple):
    """What the token counts of images follow from: `num_tiles` `(num_images,)`, and `image_sizes` `(num_images, 2)` in
    pixels, None where tiles follow each other as they are."""

    num_tiles: torch.Tensor
    image_sizes: torch.Tensor | None


class AvgLlavaInit:
    """Initial values of the parameters that are not part of a standard layer, as upstream."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GranularityRouter):
            nn.init.normal_(module.voter)
            for linear in (module.linear_1, module.linear_2):
                nn.init.kaiming_normal_(linear.weight)
        if isinstance(module, AvgLlavaModel) and module.image_newline is not None:
            nn.init.normal_(module.image_newline, std=self.config.text_config.hidden_size**-0.5)


class AvgLlavaModel(AvgLlavaInit, VtcModel):
    """AVG-LLaVA without a head: the tokens of each image at one granularity.

    `router_logits` are `(num_images, E)`, `router_decisions` `(num_images,)`, indices of granularities, coarse first.

    With `mm_patch_merge_type="spatial_unpad"`, `image_sizes` and `num_tiles` are needed to join tiles; a single tile
    then gets one newline. Without `image_sizes` or `num_tiles` tiles follow each other as they are.
    """

    config_class = AvgLlavaConfig
    routes_by_text = True
    _no_split_modules = ["CLIPEncoderLayer", "SiglipEncoderLayer", "InternVLVisionLayer", "GranularityRouter"]

    def __init__(self, config: AvgLlavaConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.multi_modal_projector = Connector(config, [width, width], config.shuffle_factor)
        joined = config.mm_patch_merge_type == "spatial_unpad"
        self.image_newline = nn.Parameter(torch.empty(width)) if joined else None
        self.router = GranularityRouter(config)
        self.post_init()

    def compress(self, features: torch.Tensor, prompt: Prompt) -> VisualTokens:
        """Choose a granularity for each image of `features` `(T, N, C)`, and put its tokens in order.

        A router in training mode speaks whatever the call asks for, so that every rank runs the same modules.
        """
        vision = prompt.vision
        overridden = vision.router_decisions is not None
        if overridden and vision.vtc_budget is not None:
            raise ValueError("Give `router_decisions` or `vtc_budget`, not both: each decides the granularities.")
        _check_sizes(vision.image_sizes, vision.num_tiles)
        tokens = self.multi_modal_projector(features)
        routed = self.router.training or (
            self.config.router_select and not overridden and leaves_a_choice(vision.vtc_budget)
        )
        pyramid = router_logits = scores = None
        if routed:
            pyramid = pool_pyramid(tokens, self.config.vis_token_granularity)
            router_logits = self._route(pyramid, prompt)
            (scores,) = prompt.to_host(router_logits)
        else:
            prompt.to_host()

        plan = self._plan(prompt.host, features.shape[0])
        self._check_placeholders(prompt.host.placeholder_mask, plan)
        if overridden:
            decisions = _checked_decisions(prompt.host.router_decisions, plan.counts)
        else:
            decisions = self._decide(scores, plan.counts, vision.vtc_budget)
        embeds = self._join(tokens, pyramid, plan, decisions)
        num_images = len(decisions)
        if routed:
            router_logits = router_logits[:num_images]
        if self.training:
            unused = 0 * router_logits.sum() if routed else 0
            if self.image_newline is not None:
                unused = unused + 0 * self.image_newline.sum()
            embeds = embeds + torch.as_tensor(unused).to(embeds)
        decisions = torch.tensor(decisions, dtype=torch.long)
        return VisualTokens(
            embeds=embeds,
            num_reserved=plan.counts[:, -1],
            num_kept=plan.counts.gather(1, decisions[:, None])[:, 0],
            blocks_per_image=torch.ones(num_images, dtype=torch.long),
            router_logits=router_logits,
            router_decisions=decisions.to(features.device, non_blocking=True),
        )

    def _route(self, pyramid: list[torch.Tensor], prompt: Prompt) -> torch.Tensor:
        """Router logits, one row per image; more rows than images where `num_tiles` was not given.

        All on the device: nothing may be read back before the router has spoken.
        """
        finest = pyramid[-1]
        device, total_tiles = finest.device, finest.shape[0]
        placeholder_mask = prompt.placeholder_mask.to(device)
        if prompt.vision.num_tiles is None:
            num_tiles = _tiles_of_runs(placeholder_mask, total_tiles, finest.shape[1])
        else:
            num_tiles = prompt.vision.num_tiles.to(device)
        ends = num_tiles.cumsum(0)
        # clamped, so that numbers that do not add up live until the host refuses them
        image_of_tile = torch.searchsorted(ends, torch.arange(total_tiles, device=device), right=True)
        image_of_tile = image_of_tile.clamp(max=len(ends) - 1)
        base_tile = ends - num_tiles if self.config.base_tile == "first" else ends - 1
        base_features = finest[base_tile.clamp(0, total_tiles - 1)]

        reserved = self._counts(self._sizes(num_tiles, prompt.vision.num_tiles, prompt.vision.image_sizes), -1)
        rows = _rows_on_device(placeholder_mask, reserved.to(device))
        if self.config.router_text == "first_image":
            later = F.pad(rows[1:] == rows[:-1], (1, 0), value=False)
            rows = rows.masked_fill(later, -1)
        text_mask = prompt.attention_mask.to(device).bool() & ~placeholder_mask
        embeds = prompt.inputs_embeds.to(device, finest.dtype)
        text = filter_text(base_features, embeds, text_mask, rows, self.config.filtered_text_num)
        return self.router(pyramid, text, image_of_tile, num_tiles)

    def _sizes(
        self, num_tiles: torch.Tensor, given_tiles: torch.Tensor | None, image_sizes: torch.Tensor | None
    ) -> ImageSizes:
        joined = self.config.mm_patch_merge_type == "spatial_unpad" and given_tiles is not None
        if not joined or image_sizes is None:
            return ImageSizes(num_tiles, None)
        # MPS has no double precision, which the rule of padding needs
        device = torch.device("cpu") if num_tiles.device.type == "mps" else num_tiles.device
        # clamped, so that a size of zero lives until the host refuses it
        return ImageSizes(num_tiles.to(device), image_sizes.to(device).clamp(min=1))

    def _counts(self, sizes: ImageSizes, granularity_idx: int) -> torch.Tensor:
        """Visual tokens `(num_images,)` at one granularity, on the device of `sizes`."""
        per_tile = self.config.vis_token_granularity[granularity_idx]
        if sizes.image_sizes is None:
            return sizes.num_tiles * per_tile
        kept = unpadded_grids(
            sizes.image_sizes,
            self._grids(sizes),
            self.config.granularity_grids[granularity_idx],
            self.config.unpad_rule,
        )
        return torch.where(sizes.num_tiles == 1, per_tile + 1, per_tile + kept[:, 0] * (kept[:, 1] + 1))

    def _grids(self, sizes: ImageSizes) -> torch.Tensor:
        return best_canvases(sizes.image_sizes, self.config.image_grid_pinpoints) // self.config.tile_size

    def reserved_blocks(self, host: HostPrompt, num_tiles: int) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Reserved placeholders of each image, which are one block each: its tokens at the finest granularity."""
        reserved = self._plan(host, num_tiles).counts[:, -1]
        return reserved, torch.ones_like(reserved)

    def _plan(self, host: HostPrompt, total_tiles: int) -> ImagePlan:
        """Sizes at every granularity, checked against the tiles."""
        config = self.config
        tiles = tiles_of_images(host, total_tiles, config.image_seq_length)
        if host.image_sizes is not None:
            refuse_no_pixels(host.image_sizes)
        sizes = self._sizes(torch.tensor(tiles), host.num_tiles, host.image_sizes)
        counts = torch.stack([self._counts(sizes, idx) for idx in range(len(config.vis_token_granularity))], dim=1)
        grids = kept = None
        if sizes.image_sizes is not None:
            grids = self._grids(sizes)
            kept = [
                unpadded_grids(sizes.image_sizes, grids, tokens, config.unpad_rule)
                for tokens in config.granularity_grids
            ]
            refuse_wrong_tiles(sizes.image_sizes, grids, kept[-1], sizes.num_tiles.tolist())
        first_tile = [sum(tiles[:idx]) for idx in range(len(tiles))]
        return ImagePlan(first_tile, tiles, counts, grids, kept)

    def _check_placeholders(self, placeholder_mask: torch.Tensor, plan: ImagePlan) -> None:
        num_placeholders, num_reserved = int(placeholder_mask.sum()), int(plan.counts[:, -1].sum())
        if self.image_newline is not None and plan.grids is None and num_placeholders != num_reserved:
            raise ValueError(
                "Image features and image tokens do not match: the prompts hold "
                f"{num_placeholders} placeholders, but {sum(plan.num_tiles)} separate tiles need {num_reserved}. "
                "Images of several tiles need `num_tiles` and `image_sizes`: pass all that the processor returned."
            )
        rows_of_images(placeholder_mask, plan.counts[:, -1].tolist())

    def _decide(self, scores: torch.Tensor | None, counts: torch.Tensor, vtc_budget) -> list[int]:
        """Index of the granularity of each image: the router's, or the largest that fits the budget."""
        decisions = []
        for image_idx, budget in enumerate(budgets_per_image(vtc_budget, len(counts))):
            image_counts = counts[image_idx].tolist()
            finest = len(image_counts) - 1
            fits = [count <= image_counts[-1] for count in image_counts]
            if budget == "full" or budget == "auto" and not self.config.router_select:
                decisions.append(finest)
            elif budget == "auto":
                own = scores[image_idx].masked_fill(~torch.tensor(fits), float("-inf"))
                decisions.append(int(own.argmax()))
            else:
                admissible = [count for count, fit in zip(image_counts, fits, strict=True) if fit]
                chosen = largest_admissible(budget, admissible, image_idx)
                # the finest of those that take as many tokens
                decisions.append(finest - image_counts[::-1].index(chosen))
        return decisions

    def _join(
        self, tokens: torch.Tensor, pyramid: list[torch.Tensor] | None, plan: ImagePlan, decisions: list[int]
    ) -> torch.Tensor:
        """Visual tokens `(num_kept.sum(), D)` of all images, each at its granularity, by one gather."""
        scales = self.config.vis_token_granularity
        used = sorted(set(decisions))
        if pyramid is None:
            levels = pool_pyramid(tokens, [scales[idx] for idx in used])
        else:
            levels = [pyramid[idx] for idx in used]
        bank = [level.flatten(0, 1) for level in levels]
        if plan.grids is None and len(bank) == 1:
            return bank[0]
        starts = dict(zip(used, torch.tensor([0, *map(len, bank)]).cumsum(0).tolist(), strict=False))
        newline = sum(map(len, bank))
        if self.image_newline is not None:
            bank.append(self.image_newline[None].to(tokens))
        sources = []
        for image_idx, granularity_idx in enumerate(decisions):
            order = self._token_order(plan, image_idx, granularity_idx)
            first = starts[granularity_idx] + plan.first_tile[image_idx] * scales[granularity_idx]
            sources.append(torch.where(order < 0, newline, order + first))
        return torch.cat(bank).index_select(0, torch.cat(sources).to(tokens.device, non_blocking=True))

    def _token_order(self, plan: ImagePlan, image_idx: int, granularity_idx: int) -> torch.Tensor:
        num_tiles = plan.num_tiles[image_idx]
        per_tile = self.config.vis_token_granularity[granularity_idx]
        if plan.grids is None:
            return torch.arange(num_tiles * per_tile)
        if num_tiles == 1:
            return F.pad(torch.arange(per_tile), (0, 1), value=-1)
        return joined_order(
            tuple(plan.grids[image_idx].tolist()),
            self.config.granularity_grids[granularity_idx],
            tuple(plan.kept[granularity_idx][image_idx].tolist()),
        )


def _tiles_of_runs(placeholder_mask: torch.Tensor, total_tiles: int, per_tile: int) -> torch.Tensor:
    """Tiles of each run of placeholders, as many numbers as there are tiles; those beyond the last run are 0."""
    mask = placeholder_mask.long()
    starts = (F.pad(mask, (1, 0)).diff(dim=1) == 1).flatten()
    first = torch.arange(total_tiles, device=mask.device) * per_tile
    positions = torch.searchsorted(mask.flatten().cumsum(0), first, right=True).clamp(max=mask.numel() - 1)
    run_of_tile = (starts.cumsum(0)[positions] - 1).clamp(0, total_tiles - 1)
    return torch.zeros_like(first).index_add(0, run_of_tile, torch.ones_like(first))


def _rows_on_device(placeholder_mask: torch.Tensor, num_reserved: torch.Tensor) -> torch.Tensor:
    """The row of each image `(num_images,)`; nonsense where placeholders do not match, which the host finds out."""
    row_ends = placeholder_mask.sum(1).cumsum(0)
    first = num_reserved.cumsum(0) - num_reserved
    return torch.searchsorted(row_ends, first, right=True).clamp(max=len(row_ends) - 1)


def _check_sizes(image_sizes: torch.Tensor | None, num_tiles: torch.Tensor | None) -> None:
    if image_sizes is not None and num_tiles is not None and image_sizes.shape != (len(num_tiles), 2):
        raise ValueError(
            f"`image_sizes` needs (height, width) for each of the {len(num_tiles)} images of `num_tiles`, got shape "
            f"{tuple(image_sizes.shape)}."
        )


def _checked_decisions(decisions: torch.Tensor, counts: torch.Tensor) -> list[int]:
    num_images, num_granularities = counts.shape
    if decisions.shape != (num_images,) or decisions.is_floating_point() or decisions.dtype == torch.bool:
        raise ValueError(
            f"`router_decisions` needs one granularity index per image, integers of shape ({num_images},), got "
            f"{decisions.dtype} of shape {tuple(decisions.shape)}."
        )
    for image_idx, idx in enumerate(decisions.tolist()):
        if not 0 <= idx < num_granularities:
            raise ValueError(
                f"`router_decisions` must lie in 0 (coarsest) to {num_granularities - 1} (finest), got {idx} for "
                f"image {image_idx}."
            )
        if counts[image_idx, idx] > counts[image_idx, -1]:
            raise ValueError(
                f"`router_decisions` asks for granularity {idx} of image {image_idx}, which needs more tokens "
                f"({counts[image_idx, idx]}) than the finest ({counts[image_idx, -1]}). Choose another one."
            )
    return decisions.tolist()


class AvgLlavaForConditionalGeneration(AvgLlavaInit, VtcForConditionalGeneration):
    """AVG-LLaVA with a language modelling head."""

    config_class = AvgLlavaConfig
    _no_split_modules = AvgLlavaModel._no_split_modules
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: AvgLlavaConfig):
        super().__init__(config, AvgLlavaModel(config))
        self.post_init()
