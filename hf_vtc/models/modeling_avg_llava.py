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

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_avg_llava import AvgLlavaConfig
from .head_vtc import VtcForConditionalGeneration
from .layout_vtc import Layout
from .modeling_router_avg_llava import GranularityRouter, filter_text
from .modeling_vtc import VtcModel
from .ops_vtc import pool_pyramid
from .packing_vtc import first_slots, to_device
from .prompt_vtc import BY_SCORES
from .tower_vtc import Connector
from .vision_vtc import Choice, Scores, VisualTokens, VtcVisionHalf


class AvgLlavaInit:
    """Initial values of the parameters that are not part of a standard layer, as upstream."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GranularityRouter):
            nn.init.normal_(module.voter)
            for linear in (module.linear_1, module.linear_2):
                nn.init.kaiming_normal_(linear.weight)


class AvgLlavaSteps(AvgLlavaInit):
    """The tokens of each image at one granularity, which a router chooses.

    `router_logits` are `(num_images, E)`, `router_decisions` `(num_images,)`, indices of the configuration's
    `all_granularities`, coarse first.

    With `mm_patch_merge_type="spatial_unpad"`, `image_sizes` and `num_tiles` are needed to join tiles; a single tile
    then gets one newline. Without `image_sizes` or `num_tiles` tiles follow each other as they are.
    """

    config_class = AvgLlavaConfig
    routes_by_text = True
    _no_split_modules = ["CLIPEncoderLayer", "SiglipEncoderLayer", "InternVLVisionLayer", "GranularityRouter"]

    def make_parts(self, config: AvgLlavaConfig) -> None:
        width = config.text_config.hidden_size
        self.multi_modal_projector = Connector(config, [width, width], config.shuffle_factor)
        self.router = GranularityRouter(config)

    def score(self, features: torch.Tensor, prompts: torch.Tensor | None, layout: Layout) -> Scores | None:
        """Router logits, one row per image, and the pyramid that they were made from, coarse to fine."""
        if not self.routes(self.router, layout.asks_scores):
            return None
        pyramid = pool_pyramid(self.multi_modal_projector(features), self.config.all_granularities)
        finest, num_tiles = pyramid[-1], layout.sizes.num_tiles
        rows = torch.tensor(layout.rows, dtype=torch.long)
        if self.config.router_text == "first_image":
            later = F.pad(rows[1:] == rows[:-1], (1, 0), value=False)
            rows = rows.masked_fill(later, -1)
        ends = num_tiles.cumsum(0)
        base_tile = ends - num_tiles if self.config.base_tile == "first" else ends - 1
        text, length = layout.text, layout.placeholder_mask.shape[1]
        rows, base_tile, image_of_tile, num_tiles, text, text_rows = to_device(
            finest.device, rows, base_tile, torch.repeat_interleave(num_tiles), num_tiles, text, text // length
        )
        text = prompts.flatten(0, 1).index_select(0, text.to(prompts.device)).to(finest.device, finest.dtype)
        chosen = filter_text(finest[base_tile], text, text_rows, rows, self.config.filtered_text_num)
        choices = pyramid[: len(self.config.vis_token_granularity)]
        router_logits = self.router(choices, chosen, image_of_tile, num_tiles)
        return Scores((router_logits,), router_logits, pyramid)

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


class AvgLlavaForConditionalGeneration(AvgLlavaInit, VtcForConditionalGeneration):
    """AVG-LLaVA with a language modelling head."""

    config_class = AvgLlavaConfig
    _no_split_modules = AvgLlavaSteps._no_split_modules
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: AvgLlavaConfig):
        super().__init__(config, AvgLlavaModel(config))
        self.post_init()
