"""AVG-LLaVA: every tile pooled to several granularities, and a router that chooses one of them per image.

Paper: "AVG-LLaVA: An Efficient Large Multimodal Model with Adaptive Visual Granularity" (arXiv 2410.02745). Upstream:
DeepLearnXMU/AVG-LLaVA@3685bc8, `llava/model/llava_arch.py`, `llava/model/multimodal_router/builder.py` (Apache-2.0).
Weights: `zhibinlan/AVG-LLaVA` (LLaMA-2 community licence).

Ours: batches, padding on either side, several images per row, text-only rows, budgets; one gather of chosen tokens.
Three peculiarities of the released code are kept as options that the converter switches on, see `AvgLlavaConfig`:
attention across tiles, padding measured on the distorted grid of tokens, and no text for the later images of a row.
Where we differ: the text of an image is that of its own row (upstream takes the row whose index is that of the image,
which is the same where each row has one image); padding never fills up the text rows. As upstream, the router reads
the answers of a context, but in training mode, where labels tell, the instructions alone; ours then also leaves out
what a template writes behind the last answer, which nobody has written when a model is asked (`asked_tokens`).

On grids of any size (Qwen's bases) a pyramid is made of windows, and the router, ours, knows no numbered places.

`modeling_router_avg_llava.py` has the router, this file what it needs and what follows from its choice.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_avg_llava import AvgLlavaConfig
from .grids_vtc import mean_places, windows_of_images
from .head_vtc import VtcForConditionalGeneration
from .layout_vtc import Layout
from .modeling_router_avg_llava import GranularityRouter, GridRouter, filter_text, most_similar, similarity_to
from .modeling_vtc import VtcModel
from .ops_vtc import pool_pyramid, segment_mean
from .packing_vtc import first_slots, to_device
from .prompt_vtc import BY_SCORES
from .vision_vtc import Choice, Scores, VisualTokens, VtcVisionHalf


class AvgLlavaSteps:
    """The tokens of each image at one granularity, which a router chooses.

    `router_logits` are `(num_images, E)`, `router_decisions` `(num_images,)`, indices of the configuration's
    `all_granularities`, coarse first.

    With `mm_patch_merge_type="spatial_unpad"`, `image_sizes` and `num_tiles` are needed to join tiles; a single tile
    then gets one newline. Without `image_sizes` or `num_tiles` tiles follow each other as they are.
    """

    config_class = AvgLlavaConfig
    routes_by_text = True
    _no_split_modules = [
        "CLIPEncoderLayer",
        "SiglipEncoderLayer",
        "InternVLVisionLayer",
        "GranularityRouter",
        "GridRouter",
    ]

    def make_parts(self, config: AvgLlavaConfig) -> None:
        super().make_parts(config)
        self.router = GranularityRouter(config) if config.grid_base is None else GridRouter(config)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GranularityRouter | GridRouter):
            nn.init.normal_(module.voter)
            for linear in (module.linear_1, module.linear_2):
                nn.init.kaiming_normal_(linear.weight)

    def score(self, features: torch.Tensor, prompts: torch.Tensor | None, layout: Layout) -> Scores | None:
        """Router logits, one row per image, and the pyramid that they were made from, coarse to fine."""
        if not self.routes(self.router, layout.asks_scores):
            return None
        if self.config.grid_base is not None:
            return self._score_grids(features["tokens"], prompts, layout)
        pyramid = pool_pyramid(self.multi_modal_projector(features), self.config.all_granularities)
        finest, num_tiles = pyramid[-1], layout.sizes.num_tiles
        rows = self._rows_asked(layout)
        ends = num_tiles.cumsum(0)
        base_tile = ends - num_tiles if self.config.base_tile == "first" else ends - 1
        text, length = layout.text, layout.placeholder_mask.shape[1]
        rows, base_tile, image_of_tile, num_tiles, text, text_rows = to_device(
            finest.device, rows, base_tile, torch.repeat_interleave(num_tiles), num_tiles, text, text // length
        )
        text = prompts.flatten(0, 1).index_select(0, text.to(prompts.device)).to(finest.device, finest.dtype)
        choices = pyramid[: len(self.config.vis_token_granularity)]
        with self.graph_of(self.router):
            chosen = filter_text(finest[base_tile], text, text_rows, rows, self.config.filtered_text_num)
            router_logits = self.router(choices, chosen, image_of_tile, num_tiles)
        return Scores((router_logits,), router_logits, pyramid)

    def _rows_asked(self, layout: Layout) -> torch.LongTensor:
        """The row whose text each image is routed by, -1 for none."""
        rows = torch.tensor(layout.rows, dtype=torch.long)
        if self.config.router_text == "first_image":
            rows = rows.masked_fill(F.pad(rows[1:] == rows[:-1], (1, 0), value=False), -1)
        return rows

    def _score_grids(self, tokens: torch.Tensor, prompts: torch.Tensor, layout: Layout) -> Scores:
        """`score` for visual tokens `(V, D)` of images that are grids of any size."""
        grids, choices = layout.sizes.tokens.tolist(), self.config.vis_token_granularity
        pyramid = [
            _pooled(tokens, *windows_of_images(grids, [window] * len(grids)))
            for window in self.config.granularity_windows[: len(choices)]
        ]
        counts = torch.tensor(layout.counts).T.flip(0)[: len(choices)]
        text, length = layout.text, layout.placeholder_mask.shape[1]
        rows, text, text_rows = to_device(tokens.device, self._rows_asked(layout), text, text // length)
        text = prompts.flatten(0, 1).index_select(0, text.to(prompts.device)).to(tokens.device, tokens.dtype)
        whole = layout.sizes.tokens.prod(-1)
        directions = _pooled(F.normalize(tokens, dim=-1, eps=1e-8), torch.arange(len(tokens)), whole)
        with self.graph_of(self.router):
            similarity = similarity_to(directions, text)
            chosen = most_similar(similarity, text, text_rows, rows, self.config.filtered_text_num)
            router_logits = self.router(pyramid, counts, chosen)
        return Scores((router_logits,), router_logits)

    def choose(self, scores: list[torch.Tensor], layout: Layout) -> Choice:
        """The router's granularity for `"auto"` images, else that of the level: i steps below the finest."""
        finest, num_choices = len(self.config.all_granularities) - 1, len(self.config.vis_token_granularity)
        counts = torch.tensor(layout.counts).flip(1)  # (num_images, E), coarse to fine
        if layout.router_decisions is not None:
            decisions = _checked_decisions(layout.router_decisions, layout.counts)
        else:
            levels = torch.tensor(layout.levels)
            decisions = finest - levels
            if layout.asks_scores:
                fits = counts[:, :num_choices] <= counts[:, -1:]
                best = scores[0].masked_fill(~fits, float("-inf")).argmax(1)
                # of a map that newlines make longer at every choice all tokens are the fewest
                best = torch.where(fits.any(1), best, finest)
                decisions = torch.where(levels == BY_SCORES, best, decisions)
        num_kept = counts.gather(1, decisions[:, None])[:, 0]
        return Choice(num_kept, num_kept, decisions)

    def connect(self, features: torch.Tensor, choice: Choice, layout: Layout, scores: Scores | None) -> VisualTokens:
        """Tokens of all images, each at its granularity."""
        if self.config.grid_base is not None:
            return self._connect_grids(super().connect(features, choice, layout, scores), choice, layout)
        decisions, scales = choice.decisions.tolist(), self.config.all_granularities
        used = sorted(set(decisions))
        if scores is None:
            levels = pool_pyramid(self.multi_modal_projector(features), [scales[idx] for idx in used])
        else:
            levels = [scores.reused[idx] for idx in used]
        embeds = self.join_tiles(
            dict(zip(used, levels, strict=True)), decisions, layout, self.config.granularity_grids
        )
        dropped = bool((choice.num_entering < layout.num_reserved).any())
        return VisualTokens(embeds, first_slots(layout.num_reserved, choice.num_entering) if dropped else None)

    def _connect_grids(self, visual: VisualTokens, choice: Choice, layout: Layout) -> VisualTokens:
        """Windows of each image's grid, with the rows beside them; kept tokens stand at their mean places."""
        windows = [self.config.granularity_windows[idx] for idx in choice.decisions.tolist()]
        if set(windows) == {(1, 1)}:
            return visual
        members, widths = windows_of_images(layout.sizes.tokens.tolist(), windows)
        slots, rows, shifts = members[widths.cumsum(0) - widths], visual.layer_rows, None
        if layout.positions is not None and not layout.is_exact:
            places = layout.visual_positions
            shifts = mean_places(places, members, widths) - places[:, slots]
            (shifts,) = to_device(visual.embeds.device, shifts)
        return replace(
            visual,
            embeds=_pooled(visual.embeds, members, widths),
            slots=slots,
            position_shifts=shifts,
            layer_rows=None if rows is None else torch.stack([_pooled(each, members, widths) for each in rows]),
        )


def _pooled(states: torch.Tensor, members: torch.LongTensor, widths: torch.LongTensor) -> torch.Tensor:
    """Means `(M, D)` of states `(V, D)` over windows, as `windows_of_images` gives them."""
    return segment_mean(states, *to_device(states.device, members, F.pad(widths.cumsum(0), (1, 0))))


def _checked_decisions(decisions: torch.Tensor, counts: list[tuple[int, ...]]) -> torch.LongTensor:
    """Indices of granularities, coarse first, of a caller; `counts` of each image are fine to coarse."""
    num_images = len(counts)
    if decisions.shape != (num_images,) or decisions.is_floating_point() or decisions.dtype == torch.bool:
        raise ValueError(
            f"`router_decisions` needs one granularity index per image, integers of shape ({num_images},), got "
            f"{decisions.dtype} of shape {tuple(decisions.shape)}."
        )
    for image_idx, (idx, image_counts) in enumerate(zip(decisions.tolist(), counts, strict=True)):
        finest = len(image_counts) - 1
        if not 0 <= idx <= finest:
            raise ValueError(
                f"`router_decisions` must lie in 0 (coarsest) to {finest} (finest), got {idx} for image {image_idx}."
            )
        if image_counts[finest - idx] > image_counts[0]:
            raise ValueError(
                f"`router_decisions` asks for granularity {idx} of image {image_idx}, which needs more tokens "
                f"({image_counts[finest - idx]}) than the finest ({image_counts[0]}). Choose another one."
            )
    return decisions.long()


class AvgLlavaVision(AvgLlavaSteps, VtcVisionHalf):
    """Tower, connector and router of AVG-LLaVA."""


class AvgLlavaModel(AvgLlavaSteps, VtcModel):
    """AVG-LLaVA without a head."""


class AvgLlavaForConditionalGeneration(VtcForConditionalGeneration):
    """AVG-LLaVA with a language modelling head."""

    config_class = AvgLlavaConfig
    model_class = AvgLlavaModel
