"""VisToG: semantic tokens that run beside the vision tower, and patches that are merged into them.

Paper: "Efficient Multi-modal Large Language Models via Visual Token Grouping" (arXiv 2411.17773). No code and no
checkpoint of it is public, and its text is known here in parts only: this is a re-implementation with choices of ours,
VisToG-style, not the paper's model.

From the paper: semantic tokens join after the patch projection and before the encoder, do not disturb the image
tokens, and a grouping layer between encoder and projector merges the patches into them; the language model sees these
alone. Ours: number and start of the tokens, mutual attention, similarity, merge (GroupViT's assignment block, after
the formulas of transformers 4.37.2 `modeling_groupvit.py`, Apache-2.0, without its mixer and cross attention), several
tiles per image, budgets. All of it is config.

`modeling_tower_vistog.py` has the encoder's side, this file what follows: grouping layer, projector, budgets.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_vistog import VistogConfig
from .head_vtc import VtcForConditionalGeneration
from .host_tower_vtc import class_token_of
from .layout_vtc import Layout
from .modeling_tower_vistog import run_tower
from .modeling_vtc import VtcModel
from .ops_vtc import assign_segment_mean, segment_mean_of
from .packing_vtc import first_slots, to_device
from .vision_vtc import Choice, Scores, VisualTokens, VtcVisionHalf, touch

# what `router_decisions` hold for the patches of a tile that stays whole
NOT_GROUPED = -1


def assignment_logits(
    queries: torch.Tensor, keys: torch.Tensor, scale: float | torch.Tensor, normalize: bool = False
) -> torch.Tensor:
    """Similarity of groups `(T, G, C)` and patches `(T, N, C)`, times `scale`: float32 `(T, G, N)`."""
    with torch.autocast(keys.device.type, enabled=False):
        queries, keys = queries.float(), keys.float()
        if normalize:
            queries, keys = F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)
        return queries @ keys.transpose(1, 2) * scale


def gumbel_noise(logits: torch.Tensor) -> torch.Tensor:
    """Independent Gumbel(0, 1) noise of the shape of `logits`, float32, from the default generator."""
    return -torch.empty_like(logits, dtype=torch.float32).exponential_().log()


class NoiseOnLogits(nn.Dropout):
    """Gumbel noise on logits in training, times `p`.

    A kind of dropout to whoever switches that off, since nothing random may stand between a policy and its reference.
    """

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits + self.p * gumbel_noise(logits) if self.training and self.p > 0 else logits


class SemanticTokens(nn.Module):
    """G learned vectors of the tower's width, without position embeddings."""

    def __init__(self, config: VistogConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_semantic_tokens, config.vision_config.hidden_size))

    def forward(self, origin: torch.Tensor | None = None) -> torch.Tensor:
        """`(G, C)`; with an `origin` `(C,)` the learned vectors are offsets from it."""
        return self.weight if origin is None else origin + self.weight


class Grouped(NamedTuple):
    """Grouped tokens `(T, G, C)`, assignment logits without noise `(T, G, N)` and the group of each patch `(T, N)`."""

    tokens: torch.Tensor
    logits: torch.Tensor
    group_idx: torch.Tensor


class GroupAssignment(nn.Module):
    """Assign patches to groups and average the members of each: GroupViT's assign attention, with our options.

    With `similarity="dot"`, `merge="projected"` and both `eps` 1.0 it computes what `GroupViTAssignAttention` does.
    """

    def __init__(self, config: VistogConfig):
        super().__init__()
        width = config.vision_config.hidden_size
        self.hard, self.tau = config.hard, config.tau
        self.eps, self.empty_eps = config.assign_eps, config.empty_assign_eps
        self.noise = NoiseOnLogits(float(config.gumbel_noise))
        self.cosine = config.similarity == "cosine"
        self.projected = config.merge == "projected"
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        if self.cosine:
            self.logit_scale = nn.Parameter(torch.empty(()))
        if self.projected:
            self.v_proj = nn.Linear(width, width)
            self.out_proj = nn.Linear(width, width)

    def forward(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        group_idx: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> Grouped:
        """Merge patches into groups; nothing is added to the groups here.

        Args:
            queries (`torch.Tensor` of shape `(T, G, C)`): what groups are compared by.
            keys (`torch.Tensor` of shape `(T, N, C)`): what patches are compared by.
            values (`torch.Tensor` of shape `(T, N, C)`): what is averaged.
            group_idx (`torch.LongTensor` of shape `(T, N)`, *optional*): the group of each patch, in place of the
                best one.
            noise (`torch.Tensor` of shape `(T, G, N)`, *optional*): added to the logits. Default: Gumbel noise in
                training, none in evaluation.
        """
        scale = self.logit_scale.float().exp() if self.cosine else queries.shape[-1] ** -0.5
        logits = assignment_logits(self.q_proj(queries), self.k_proj(keys), scale, self.cosine)
        values = self.v_proj(values) if self.projected else values
        noisy = self.noise(logits) if noise is None else logits + noise
        if self.hard:
            means, group_idx = assign_segment_mean(noisy, values, self.eps, self.empty_eps, self.tau, group_idx)
        else:
            shares = (noisy / self.tau).softmax(1)
            if group_idx is None:
                group_idx = noisy.argmax(1)
            else:
                shares = F.one_hot(group_idx, logits.shape[1]).transpose(1, 2).float() + 0 * shares
            means = segment_mean_of(shares, values, self.eps, self.empty_eps)
        return Grouped(self.out_proj(means) if self.projected else means, logits, group_idx)


class GroupingMlp(nn.Module):
    """The residual branch after the merge: `(T, G, C)` to `(T, G, C)`."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.act = nn.GELU()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(self.norm(states))))


class GroupingLayer(nn.Module):
    """Patches merged into semantic tokens, between tower and projector."""

    def __init__(self, config: VistogConfig):
        super().__init__()
        width = config.vision_config.hidden_size
        self.norm_semantic = nn.LayerNorm(width, eps=1e-5)
        self.norm_image = nn.LayerNorm(width, eps=1e-5)
        self.assign = GroupAssignment(config)
        self.mlp = GroupingMlp(width) if config.mlp else None

    def forward(self, patches: torch.Tensor, semantic: torch.Tensor, group_idx: torch.Tensor | None = None) -> Grouped:
        """Patch states `(T, N, C)` and semantic states `(T, G, C)` to grouped tokens.

        Args:
            group_idx (`torch.LongTensor` of shape `(T, N)`, *optional*): the group of each patch, given.
        """
        keys = self.norm_image(patches)
        projected = self.assign.projected
        merged, logits, group_idx = self.assign(
            self.norm_semantic(semantic), keys, keys if projected else patches, group_idx
        )
        if projected:
            tokens = semantic + merged
        else:
            members = F.one_hot(group_idx, semantic.shape[1]).any(1)[..., None]  # (T, G, 1)
            # with shares there is something in every group
            tokens = torch.where(members, merged, semantic) if self.assign.hard else merged
        if self.mlp is not None:
            tokens = tokens + self.mlp(tokens)
        return Grouped(tokens, logits, group_idx)


class VistogSteps:
    """Tower with semantic tokens beside it, grouping layer and projector.

    Features are a dict: `patches` `(T, N, C)`, and `semantic` `(T, G, C)` unless a call wants no compression at all.
    `router_logits` are the similarities `(T, G, N)`, 0 for a tile that stays whole, or None if all do;
    `router_decisions` `(T, N)` the group of each patch, -1 in a tile that stays whole.
    """

    config_class = VistogConfig
    _no_split_modules = [
        "CLIPEncoderLayer",
        "SiglipEncoderLayer",
        "InternVLVisionLayer",
        "GroupingLayer",
        "Connector",
    ]

    def make_parts(self, config: VistogConfig) -> None:
        self.semantic_tokens = SemanticTokens(config)
        self.grouping = GroupingLayer(config)
        super().make_parts(config)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SemanticTokens):
            # the encoder treats equal tokens alike: constants would stay one token for ever
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, GroupAssignment) and module.cosine:
            # CLIP's temperature of 0.07
            nn.init.constant_(module.logit_scale, 2.6593)

    def encode(self, pixel_values: torch.Tensor, layout: Layout | None = None) -> dict[str, torch.Tensor]:
        """Patch states and semantic states of each tile; the latter in training in any case."""
        config, tokens = self.config, None
        if self.training or layout is None or not layout.wants_all:
            tower_type = config.vision_config.model_type
            origin = class_token_of(self.vision_tower, tower_type) if config.semantic_init == "cls" else None
            tokens = self.semantic_tokens(origin)
        states, semantic = run_tower(
            self.vision_tower,
            config.vision_feature_layer,
            pixel_values.to(self.dtype),
            tokens,
            config.semantic_self_attention,
        )
        patches = states[:, 1:] if config.vision_feature_select_strategy == "default" else states
        return {"patches": patches} if semantic is None else {"patches": patches, "semantic": semantic}

    def choose(self, scores: list[torch.Tensor], layout: Layout) -> Choice:
        """Which tiles are grouped, `(T,)`: all of an image, or those to which the caller gives groups."""
        num_tiles, patches = layout.sizes.num_tiles, self.config.image_seq_length
        decisions = layout.router_decisions
        if decisions is None:
            grouped = torch.repeat_interleave(torch.tensor(layout.levels, dtype=torch.bool), num_tiles)
            return Choice(layout.num_leaving, layout.num_leaving, grouped)
        grouped = self._tiles_of_decisions(decisions, int(num_tiles.sum()))
        num_kept = torch.where(grouped, self.config.num_semantic_tokens, patches)
        per_image = torch.zeros_like(num_tiles).index_add(0, torch.repeat_interleave(num_tiles), num_kept)
        return Choice(per_image, per_image, grouped)

    def _tiles_of_decisions(self, decisions: torch.Tensor, num_tiles: int) -> torch.Tensor:
        """Which tiles are grouped, `(T,)`, by `decisions` `(T, N)` of the caller, which are checked."""
        expected, groups = (num_tiles, self.config.image_seq_length), self.config.num_semantic_tokens
        if tuple(decisions.shape) != expected or decisions.is_floating_point() or decisions.dtype == torch.bool:
            raise ValueError(
                f"`router_decisions` needs the group of each patch, whole numbers of shape {expected}, got "
                f"{decisions.dtype} of shape {tuple(decisions.shape)}."
            )
        whole = decisions == NOT_GROUPED
        if bool((whole.any(1) & ~whole.all(1)).any()) or bool(((decisions < 0) | (decisions >= groups))[~whole].any()):
            raise ValueError(
                f"`router_decisions` must be groups from 0 to {groups - 1}, or {NOT_GROUPED} for every patch of a "
                f"tile that stays whole, got values from {int(decisions.min())} to {int(decisions.max())}."
            )
        return ~whole.all(1)

    def connect(
        self, features: dict[str, torch.Tensor], choice: Choice, layout: Layout, scores: Scores | None
    ) -> VisualTokens:
        """Group the tiles that shrink, and project what is left of each, in tile order."""
        patches, semantic, grouped = features["patches"], features.get("semantic"), choice.decisions
        device, given = patches.device, layout.router_decisions
        decisions = torch.full(patches.shape[:2], NOT_GROUPED, dtype=torch.long, device=device)
        if not bool(grouped.any()):
            embeds = self.multi_modal_projector(patches).flatten(0, 1)
            if self.training:
                embeds = touch(embeds, self.grouping(patches[:1], semantic[:1]).tokens)
            return VisualTokens(embeds, router_decisions=decisions)
        if semantic is None:
            raise ValueError(
                "`image_features` hold patch states and no semantic states, as `encode` gives them for "
                "`vtc_budget='full'`. Encode without that budget, or ask for it here too."
            )
        num_kept = torch.where(grouped, self.config.num_semantic_tokens, patches.shape[1])
        slots = first_slots(torch.full_like(num_kept, patches.shape[1]), num_kept)
        tiles, others = grouped.nonzero().flatten(), (~grouped).nonzero().flatten()
        given = None if given is None else given[tiles].long()
        if len(others) == 0:
            tokens, logits, group_idx = self.grouping(patches, semantic, *to_device(device, given))
            return VisualTokens(self.multi_modal_projector(tokens).flatten(0, 1), slots, None, group_idx, logits)

        starts = num_kept.cumsum(0) - num_kept
        places = [starts[each][:, None] + torch.arange(int(num_kept[each[0]])) for each in (tiles, others)]
        order = torch.argsort(torch.cat([place.flatten() for place in places]))
        index, others, order, given = to_device(device, tiles, others, order, given)
        tokens, own_logits, group_idx = self.grouping(patches[index], semantic[index], given)
        logits = own_logits.new_zeros(len(grouped), *own_logits.shape[1:]).index_copy(0, index, own_logits)
        decisions = decisions.index_copy(0, index, group_idx)
        states = torch.cat([tokens.flatten(0, 1), patches[others].flatten(0, 1)]).index_select(0, order)
        return VisualTokens(self.multi_modal_projector(states), slots, None, decisions, logits)


class VistogVision(VistogSteps, VtcVisionHalf):
    """Tower with semantic tokens beside it, grouping layer and projector."""


class VistogModel(VistogSteps, VtcModel):
    """VisToG without a head."""


class VistogForConditionalGeneration(VtcForConditionalGeneration):
    """VisToG with a language modelling head."""

    config_class = VistogConfig
    model_class = VistogModel
