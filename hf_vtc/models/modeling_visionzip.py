"""VisionZip: the tokens that the tower attends to most, and means of the others.

Paper: "VisionZip: Longer is Better but Not Necessary in Vision Language Models" (arXiv 2412.04467, CVPR 2025), section
2.3 and algorithms 1 and 2, which were known here by what others report of them and not from its own text. None of its
code (JIA-Lab-research/VisionZip) was taken; there are no weights.

Of each tile the dominant tokens are those to which the class token attends most in the layer whose output is read,
mean over heads; of a tower without one (SigLIP) those to which all tokens attend most. Of the others some at equal
distances are targets, to which the rest is added by the largest product of keys of the same layer; each becomes the
mean of itself and what joined it. Nothing of it depends on the question.

Ours: batches, several tiles and images, budgets per call, any number of tokens, no attention map of the whole tower:
queries and keys of one layer are read while it runs, with whatever attention it runs by. Behind a pixel shuffle
(InternVL, of which the paper says nothing) a token is what the connector makes one of: attention and keys are means
over its patches, and the patches themselves are what is merged. Where we differ: visual tokens keep the order of the
grid, merged ones at the places of their targets; the class token is no visual token, as in the stock models.
"""

import torch
import torch.nn.functional as F

from .configuration_visionzip import VisionzipConfig
from .head_vtc import VtcForConditionalGeneration
from .host_tower_vtc import parts_of_layer
from .layout_vtc import Layout
from .modeling_vtc import VtcModel
from .ops_vtc import pixel_unshuffle, segment_mean_of
from .packing_vtc import first_slots, to_device
from .tower_vtc import outputs_of, tower_path
from .vision_vtc import Choice, Scores, VisualTokens, VtcVisionHalf


def received_attention(queries: torch.Tensor, keys: torch.Tensor, num_heads: int, class_token: bool) -> torch.Tensor:
    """How much is attended to each token of a grid, mean over heads.

    Args:
        queries, keys (`torch.Tensor` of shape `(T, M, C)`): of class token, if there is one, and grid.
        num_heads (`int`): divides C.
        class_token (`bool`): whether the first row is a class token, whose attention it is then; else the mean of all
            tokens'.

    Returns:
        `(T, N)` in float32, without the class token.
    """
    rows = queries[:, :1] if class_token else queries
    received, scale = 0.0, (keys.shape[-1] // num_heads) ** -0.5
    with torch.autocast(keys.device.type, enabled=False):
        # a head at a time, whose map of a large grid is memory enough
        for own, others in zip(rows.chunk(num_heads, -1), keys.chunk(num_heads, -1), strict=True):
            logits = scale * own.float() @ others.float().transpose(1, 2)
            received = received + logits.softmax(-1).mean(1) / num_heads
    return received[:, 1:] if class_token else received


def zipped_groups(
    attention: torch.Tensor, keys: torch.Tensor, num_kept: torch.LongTensor, num_contextual: torch.LongTensor
) -> torch.LongTensor:
    """The visual token of its tile that each token of the grid becomes, counted in the order of the grid.

    Args:
        attention (`torch.Tensor` of shape `(T, N)`): how much is attended to each.
        keys (`torch.Tensor` of shape `(T, N, C)`): by which tokens are compared.
        num_kept, num_contextual (`torch.LongTensor` of shape `(T,)`): visual tokens of each tile, and those of them
            that are contextual.

    Returns:
        `(T, N)`, -1 for a token that is dropped, where there is no contextual one to join.
    """
    num_kept, num_contextual = num_kept[:, None], num_contextual[:, None]
    order = attention.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    dominant = torch.empty_like(order).scatter_(1, order, places) < num_kept - num_contextual
    # of R others the one at floor(j * R / targets) for each j is a target
    others = (~dominant).long()
    num_others, behind = others.sum(1, keepdim=True).clamp(min=1), others.cumsum(1)
    reached = (behind * num_contextual + num_others - 1) // num_others
    before = ((behind - others) * num_contextual + num_others - 1) // num_others
    target = reached > before
    stays = dominant | target

    with torch.autocast(keys.device.type, enabled=False):
        similarity = keys.float() @ keys.float().transpose(1, 2)
    joined = similarity.masked_fill(~target[:, None], float("-inf")).argmax(-1)
    groups = stays.cumsum(1) - 1
    merged = groups.gather(1, joined).masked_fill(num_contextual == 0, -1)
    return torch.where(stays, groups, merged)


class VisionzipSteps:
    """Tower whose last attention is read, and projector of what is left of each tile.

    Features are a dict: `features` `(T, N, C)`, and unless a call wants no compression at all `attention` `(T, n)` and
    `keys` `(T, n, C)`, n visual tokens of a tile. `router_decisions` are `(T, n)`: the visual token of its tile that
    each of them becomes, -1 for none.
    """

    config_class = VisionzipConfig

    def encode(self, pixel_values: torch.Tensor, layout: Layout | None = None) -> dict[str, torch.Tensor]:
        """Features of each tile, and what the layer that gave them attended to."""
        if layout is not None and layout.wants_all:
            return {"features": super().encode(pixel_values, layout)}
        config = self.config
        layer = tower_path(self.vision_tower, config.vision_feature_layer).layers[-1]
        parts = parts_of_layer(layer, config.vision_config.model_type)
        with outputs_of(parts.to_query[-1], parts.to_key[-1]) as seen:
            features = super().encode(pixel_values, layout)
        # what stays is chosen, and no gradient says by how much
        queries, keys = (seen[idx].detach() for idx in range(2))
        attention = received_attention(queries, keys, parts.num_heads, config.has_class_token)
        keys = keys[:, 1:] if config.has_class_token else keys
        return {
            "features": features,
            "attention": self.folded(attention[..., None]).mean((-2, -1)),
            "keys": self.folded(keys).mean(-2),
        }

    def folded(self, grid: torch.Tensor) -> torch.Tensor:
        """What the connector makes one visual token of: `(T, N, C)` to `(T, n, N / n, C)`."""
        factor = self.config.shuffle_factor
        return pixel_unshuffle(grid, factor, self.config.ps_version).unflatten(-1, (factor**2, -1))

    def choose(self, scores: list[torch.Tensor], layout: Layout) -> Choice:
        """As many tokens as each image is allowed, or those of the caller's groups, which are checked."""
        if layout.router_decisions is None:
            return Choice(layout.num_leaving, layout.num_leaving)
        num_tiles = layout.sizes.num_tiles
        num_kept = _tokens_of_groups(layout.router_decisions, (int(num_tiles.sum()), self.config.image_seq_length))
        per_image = torch.zeros_like(num_tiles).index_add(0, torch.repeat_interleave(num_tiles), num_kept)
        return Choice(per_image, per_image)

    def connect(
        self, features: dict[str, torch.Tensor], choice: Choice, layout: Layout, scores: Scores | None
    ) -> VisualTokens:
        """Zip the tiles of images that shrink, and project what is left of each, in tile order."""
        patches, config, given = features["features"], self.config, layout.router_decisions
        if given is None and not any(layout.levels):
            visual = super().connect(patches, choice, layout, scores)
            own = torch.arange(config.image_seq_length, device=patches.device)
            visual.router_decisions = own.expand(len(patches), -1)
            return visual
        if given is None and "attention" not in features:
            raise ValueError(
                "`image_features` hold no attention, as `encode` gives them for `vtc_budget='full'`. Encode without "
                "that budget, or ask for it here too."
            )
        num_kept = shared_out(layout.num_leaving, layout.sizes.num_tiles) if given is None else given.amax(1) + 1
        num_contextual = (config.contextual_share * num_kept + 0.5).long()
        most = int(num_kept.max())
        kept = first_slots(torch.full_like(num_kept, most), num_kept)
        slots = first_slots(torch.full_like(num_kept, config.image_seq_length), num_kept)
        kept, groups, *counts = to_device(patches.device, kept, given, num_kept, num_contextual)
        if groups is None:
            groups = zipped_groups(features["attention"], features["keys"], *counts)
        members = F.one_hot(groups + 1, most + 1)[..., 1:].transpose(1, 2)
        # a mean of one token is the token itself, and what lies behind a tile's last one is not read
        means = segment_mean_of(members, self.folded(patches).flatten(2), eps=0.0, empty_eps=1.0)
        states = means.flatten(0, 1).index_select(0, kept)
        embeds = self.multi_modal_projector(states.unflatten(-1, (config.shuffle_factor**2, -1)))
        return VisualTokens(embeds.flatten(0, 1), slots, router_decisions=groups)


def _tokens_of_groups(groups: torch.Tensor, expected: tuple[int, int]) -> torch.LongTensor:
    """Visual tokens of each tile `(T,)` by the caller's groups, which are checked."""
    if tuple(groups.shape) != expected or groups.dtype != torch.long:
        raise ValueError(
            "`router_decisions` needs the visual token of its tile that each token becomes, -1 for none, whole "
            f"numbers of shape {expected}, got {groups.dtype} of shape {tuple(groups.shape)}."
        )
    num_kept = groups.amax(1) + 1
    for tile, (own, count) in enumerate(zip(groups, num_kept.tolist(), strict=True)):
        if int(own.min()) < -1 or count == 0 or len(own[own >= 0].unique()) != count:
            raise ValueError(
                "`router_decisions` must count the visual tokens of each tile from 0 on, none of them without a "
                f"token, -1 for tokens that are dropped, got {own.tolist()} for tile {tile}."
            )
    return num_kept


def shared_out(num_kept: torch.LongTensor, num_tiles: torch.LongTensor) -> torch.LongTensor:
    """Visual tokens of each tile `(T,)` of images that keep `num_kept` and have `num_tiles` `(num_images,)`."""
    image_of_tile = torch.repeat_interleave(num_tiles)
    own, tiles = num_kept[image_of_tile], num_tiles[image_of_tile]
    place = torch.arange(len(tiles)) - (num_tiles.cumsum(0) - num_tiles)[image_of_tile]
    return own // tiles + (place < own % tiles)


class VisionzipVision(VisionzipSteps, VtcVisionHalf):
    """Tower whose last attention is read, and projector."""


class VisionzipModel(VisionzipSteps, VtcModel):
    """VisionZip without a head."""


class VisionzipForConditionalGeneration(VtcForConditionalGeneration):
    """VisionZip with a language modelling head."""

    config_class = VisionzipConfig
    model_class = VisionzipModel
