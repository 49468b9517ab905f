"""ViCO / ViR: two connectors per tile, and a router that chooses between them (InternVL3.5-Flash).

Papers: "ViCO: A Training Strategy towards Semantic Aware Dynamic High-Resolution" (arXiv 2510.12793), InternVL3.5
report (arXiv 2508.18265, sections 2.3 and 3.15). Upstream: OpenGVLab/InternVL@2410d1d (base model, MIT licence),
InternLM/lmdeploy@1263d5c `lmdeploy/pytorch/models/internvl.py` (router and rule, Apache-2.0), and the remote code of
the InternVL3.5-Flash checkpoints (weights: Apache-2.0).

Ours: batches, padding, several images and text-only rows; budgets; the `"absolute"` rule; only the connector that a
tile needs is computed. Where we differ: the quantile covers the tiles of one sample, which equals the original at
batch 1 and does not depend on the batch; `forward` routes too. As in the released code, `attn2` and `norm2` serve
three of the four pooling steps; `attn3`, `attn4`, `norm3`, `norm4` exist in checkpoints and are never used: here they
are buffers, which nothing trains.
"""

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import nn

from .configuration_vico import VicoConfig
from .head_vtc import VtcForConditionalGeneration
from .layout_vtc import Layout
from .modeling_vtc import VtcModel
from .packing_vtc import first_slots, to_device
from .prompt_vtc import BY_SCORES
from .tower_vtc import Connector
from .vision_vtc import Choice, Scores, VisualTokens, VtcVisionHalf, touch

# a power of two: scaling by it is exact
_UNIT_LENGTH = 256.0


def route_tiles(
    p_compress: torch.Tensor,
    tiles_per_sample: list[int],
    relative_threshold: float,
    absolute_threshold: float,
    rule: str = "relative+absolute",
) -> torch.Tensor:
    """Which tiles the router compresses.

    A tile is compressed if its P(compress) exceeds the quantile over the tiles of its sample (strictly: the least
    compressible tile never is, nor is a single tile) and reaches the absolute threshold. Rule `"absolute"` leaves the
    first condition out.

    Args:
        p_compress (`torch.Tensor` of shape `(T,)`): in the router's dtype; thresholds are rounded to it, as upstream.
        tiles_per_sample (`list[int]`): how the T tiles are shared out among samples.
        relative_threshold (`float`): quantile in [0, 1].
        absolute_threshold (`float`): probability.
        rule (`str`): `"relative+absolute"` or `"absolute"`.

    Returns:
        `torch.BoolTensor` of shape `(T,)`, True = compress.

    Source: InternLM/lmdeploy@1263d5c `extract_feature_flash`, there over all tiles of a forward pass.
    """
    compress = p_compress >= torch.tensor(absolute_threshold, dtype=p_compress.dtype)
    if rule == "absolute":
        return compress
    for tiles in torch.arange(len(p_compress)).split(tiles_per_sample):
        if len(tiles) > 0:
            threshold = torch.quantile(p_compress[tiles].float(), relative_threshold).to(p_compress.dtype)
            compress[tiles] &= p_compress[tiles] > threshold
    return compress


def most_compressible(
    p_compress: torch.Tensor, num_tiles: torch.LongTensor, num_compressed: torch.LongTensor
) -> torch.Tensor:
    """Mark the tiles of each image with the highest P(compress); ties go to the earlier tile.

    Args:
        p_compress (`torch.Tensor` of shape `(T,)`).
        num_tiles, num_compressed (`torch.LongTensor` of shape `(num_images,)`): of each image, and how many to mark.

    Returns:
        `torch.BoolTensor` of shape `(T,)`, True = compress.
    """
    image_of_tile = torch.repeat_interleave(num_tiles)
    order = torch.argsort(p_compress, descending=True, stable=True)
    # tiles image by image, in each by falling P(compress)
    order = order[torch.argsort(image_of_tile[order], stable=True)]
    starts = num_tiles.cumsum(0) - num_tiles
    first = torch.arange(len(order)) < (starts + num_compressed)[image_of_tile]
    return torch.empty_like(first).index_copy_(0, order, first)


class SingleQueryAttention(nn.Module):
    """Multi-head attention of one query per tile over the tile's features, biases everywhere, no mask.

    Equal to `torch.nn.MultiheadAttention` up to rounding. Since there is one query only, the key projection is folded
    into it and the value projection runs after pooling: no projection of all N features.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def key_projection(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `k_proj` does: a matrix `(heads, C, C / heads)` and a bias `(heads, C / heads)`; queries share it.

        Found by calling the layer with unit vectors, since an adapter, a quantiser or a disk may stand between a layer
        and its weight. They are long, so that the bias, which is taken off again, costs no digits.

        Args:
            like (`torch.Tensor`): dtype and device of what the layer takes.
        """
        width = like.shape[-1]
        units = torch.eye(width + 1, width, dtype=like.dtype, device=like.device) * _UNIT_LENGTH
        answers = self.k_proj(units)
        bias = answers[-1]
        weights = (answers[:-1] - bias) / _UNIT_LENGTH  # (C, C)
        return weights.unflatten(-1, (self.num_heads, -1)).transpose(0, 1), bias.unflatten(0, (self.num_heads, -1))

    def forward(
        self,
        query: torch.Tensor,
        features: torch.Tensor,
        key_projection: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attend with `query` `(T, C)` over `features` `(T, N, C)`; returns `(T, C)`.

        Args:
            key_projection (`tuple` of `torch.Tensor`, *optional*): of this layer, where it is called more than once.
        """
        weights, bias = self.key_projection(query) if key_projection is None else key_projection
        queries = self.q_proj(query).unflatten(-1, (self.num_heads, -1))  # (T, heads, C / heads)
        folded = torch.einsum("thd,hcd->thc", queries, weights)
        constant = (queries * bias).sum(-1, keepdim=True)
        scores = (folded @ features.transpose(1, 2) + constant) * queries.shape[-1] ** -0.5  # (T, heads, N)
        pooled = scores.softmax(-1) @ features  # (T, heads, C)
        # the weights of a head add up to one, and so do its shares of the bias
        values = self.v_proj(pooled).unflatten(-1, (self.num_heads, -1))  # (T, heads, heads, C / heads)
        return self.out_proj(values.diagonal(dim1=1, dim2=2).transpose(1, 2).flatten(1))


class RouterBlock(nn.Module):
    """Residual feed-forward block whose LayerNorm ends the branch."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.linear_1 = nn.Linear(width, 4 * width)
        self.linear_2 = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.act = nn.GELU()
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        branch = self.linear_2(self.dropout(self.act(self.linear_1(states))))
        return states + self.norm(self.dropout(branch))


class UnusedWeights(nn.Module):
    """Tensors that checkpoints hold and no output depends on.

    Buffers, so that they load and save under their names, follow the model's dtype and device, and are no parameters
    for which an optimizer, an adapter or distributed training would wait. A name may have a dot: then there is no
    module `q_proj`, which adapters and quantisers would take for a layer, but who loads weights finds one to put them
    in.

    Args:
        shapes (`dict[str, tuple[int, ...]]`): of each tensor.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        super().__init__()
        for name, shape in shapes.items():
            self._buffers[name] = torch.zeros(shape)

    def __getattr__(self, name: str) -> Any:
        buffers = self.__dict__.get("_buffers", {})
        if any(each.startswith(f"{name}.") for each in buffers):
            return _PartOfUnusedWeights(buffers, f"{name}.")
        return super().__getattr__(name)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, metadata: dict, strict: bool, *found: list) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *found)
        # torch takes what stands before a dot for a module
        _, unexpected, _ = found
        own = {prefix + name for name in self._buffers}
        unexpected[:] = [name for name in unexpected if name not in own]


class _PartOfUnusedWeights(nn.Module):
    """Those of `UnusedWeights` whose names begin with a prefix, without it; for those who load them one by one."""

    def __init__(self, whole: dict[str, torch.Tensor], prefix: str):
        super().__init__()
        self._buffers = _Prefixed(whole, prefix)


class _Prefixed(MutableMapping):
    """The entries of a dictionary whose names begin with a prefix, without it."""

    def __init__(self, whole: dict[str, torch.Tensor], prefix: str):
        self.whole = whole
        self.prefix = prefix

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.whole[self.prefix + name]

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        self.whole[self.prefix + name] = value

    def __delitem__(self, name: str) -> None:
        del self.whole[self.prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for name in list(self.whole) if name.startswith(self.prefix))

    def __len__(self) -> int:
        return len(list(iter(self)))


def _affine_shapes(*shape: int) -> dict[str, tuple[int, ...]]:
    return {"weight": shape, "bias": shape[:1]}


def _attention_shapes(width: int) -> dict[str, tuple[int, ...]]:
    projections, affine = ("q_proj", "k_proj", "v_proj", "out_proj"), _affine_shapes(width, width)
    return {f"{projection}.{name}": shape for projection in projections for name, shape in affine.items()}


class VisionResolutionRouter(nn.Module):
    """ViR: logits of (compress, keep) for each tile from the tower's raw features.

    Source: `pooling_before_gating` and `gating` of the official checkpoints.
    """

    def __init__(self, config: VicoConfig):
        super().__init__()
        width = config.vision_config.hidden_size
        self.query_token = nn.Parameter(torch.zeros(1, width))
        for idx in range(1, 5):
            if idx <= 2:
                attention, norm = SingleQueryAttention(width, config.router_num_heads), nn.LayerNorm(width, eps=1e-5)
            else:
                attention, norm = UnusedWeights(_attention_shapes(width)), UnusedWeights(_affine_shapes(width))
            self.add_module(f"attn{idx}", attention)
            self.add_module(f"norm{idx}", norm)
            self.add_module(f"block{idx}", RouterBlock(width, config.connector_dropout))
        self.gate_norm = nn.LayerNorm(width, eps=1e-5)
        self.gate = nn.Linear(width, 2)

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """Pool `(T, N, C)` to `(T, C)` by four cross attentions, the second of which runs three times."""
        query = self.query_token.expand(features.shape[0], -1)
        query = self.norm1(self.attn1(query, features))
        projection = self.attn2.key_projection(query)
        for _ in range(3):
            query = self.norm2(self.attn2(query, features, projection))
        return query

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(T, N, C)` features to `(T, 2)` logits; softmax column 0 is P(compress)."""
        states = self.pool(features.to(self.query_token.dtype))
        for block in (self.block1, self.block2, self.block3, self.block4):
            states = block(states)
        return self.gate(self.gate_norm(states))


class VicoSteps:
    """Each tile runs through one of two connectors, which a router chooses.

    `router_logits` are `(T, 2)`, `router_decisions` `(T,)` with True = compress.
    """

    config_class = VicoConfig
    # not the connectors: which of them a process runs depends on its tiles, and FSDP would wait for the others
    _no_split_modules = ["InternVLVisionLayer", "VisionResolutionRouter"]

    def make_parts(self, config: VicoConfig) -> None:
        super().make_parts(config)
        width = config.text_config.hidden_size
        self.compressed_projector = Connector(
            config, [2 * width, 2 * width, width], config.shuffle_factor**2, config.connector_dropout
        )
        self.router = VisionResolutionRouter(config)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VisionResolutionRouter):
            nn.init.normal_(module.query_token, std=0.02)
        elif isinstance(module, UnusedWeights):
            for tensor in module.buffers(recurse=False):
                nn.init.zeros_(tensor)
                if tensor.ndim == 2:
                    # drawn for the layer that it stands for, or a seed would give the layers behind it other values
                    # than in the published trainings
                    torch.empty_like(tensor).normal_()

    def score(self, features: torch.Tensor, prompts: torch.Tensor | None, layout: Layout) -> Scores | None:
        """P(compress) of every tile, unless no image needs it."""
        if not self.routes(self.router, layout.router_decisions is None and not layout.wants_all):
            return None
        with self.graph_of(self.router):
            router_logits = self.router(features)
        return Scores((router_logits.softmax(-1)[:, 0],), router_logits)

    def choose(self, scores: list[torch.Tensor], layout: Layout) -> Choice:
        """The rule for `"auto"` images, tiles in order of P(compress) for the others."""
        config, num_tiles = self.config, layout.sizes.num_tiles
        total = int(num_tiles.sum())
        if layout.router_decisions is not None:
            decisions = _checked_decisions(layout.router_decisions, total)
        else:
            decisions = torch.zeros(total, dtype=torch.bool)
            if layout.asks_scores:
                tiles_per_sample = torch.zeros(len(layout.placeholder_mask), dtype=torch.long)
                tiles_per_sample.index_add_(0, torch.tensor(layout.rows, dtype=torch.long), num_tiles)
                decisions = route_tiles(
                    scores[0],
                    tiles_per_sample.tolist(),
                    config.flash_relative_threshold,
                    config.flash_absolute_threshold,
                    config.routing_rule,
                )
            levels = torch.tensor(layout.levels)
            decisions &= torch.repeat_interleave(levels == BY_SCORES, num_tiles)
            if bool((levels > 0).any()):
                # at level i, i tiles are compressed
                decisions |= most_compressible(scores[0], num_tiles, levels.clamp(min=0))
        num_kept = torch.where(decisions, config.compressed_seq_length, config.image_seq_length)
        image_of_tile = torch.repeat_interleave(num_tiles)
        per_image = torch.zeros_like(num_tiles).index_add(0, image_of_tile, num_kept)
        return Choice(per_image, per_image, decisions)

    def connect(self, features: torch.Tensor, choice: Choice, layout: Layout, scores: Scores | None) -> VisualTokens:
        """Visual tokens in tile order, each tile through the connector that it needs."""
        decisions = choice.decisions
        num_kept = torch.where(decisions, self.config.compressed_seq_length, self.config.image_seq_length)
        starts = num_kept.cumsum(0) - num_kept
        pieces, positions, unused = [], [], []
        for connector, chosen in ((self.multi_modal_projector, ~decisions), (self.compressed_projector, decisions)):
            tiles = chosen.nonzero().flatten()
            if len(tiles) > 0:
                some = to_device(features.device, tiles)[0] if len(tiles) < len(decisions) else None
                tokens = connector(features, some)
                pieces.append(tokens.flatten(0, 1))
                positions.append((starts[tiles][:, None] + torch.arange(tokens.shape[1])).flatten())
            elif self.training:
                unused.append(connector(features[:1]))
        embeds = pieces[0]
        if len(pieces) > 1:
            positions = torch.cat(positions)
            order = torch.empty_like(positions).index_copy_(0, positions, torch.arange(len(positions)))
            (order,) = to_device(features.device, order)
            embeds = torch.cat(pieces).index_select(0, order)
        slots = None
        if bool(decisions.any()):
            slots = first_slots(torch.full_like(num_kept, self.config.image_seq_length), num_kept)
        return VisualTokens(touch(embeds, *unused), slots)


def _checked_decisions(decisions: torch.Tensor, num_tiles: int) -> torch.Tensor:
    if decisions.shape != (num_tiles,):
        raise ValueError(
            f"`router_decisions` needs one entry per tile, shape ({num_tiles},), got {tuple(decisions.shape)}."
        )
    if decisions.is_floating_point() or bool(((decisions != 0) & (decisions != 1)).any()):
        raise ValueError(
            "`router_decisions` must be True (compress) or False for each tile, got "
            f"{decisions.dtype} with values from {decisions.min().item()} to {decisions.max().item()}."
        )
    return decisions.bool()


class VicoVision(VicoSteps, VtcVisionHalf):
    """Tower, connectors and router of InternVL3.5-Flash."""


class VicoModel(VicoSteps, VtcModel):
    """InternVL3.5-Flash without a head."""


class VicoForConditionalGeneration(VtcForConditionalGeneration):
    """InternVL3.5-Flash with a language modelling head."""

    config_class = VicoConfig
    model_class = VicoModel
