"""AVG-LLaVA's router: the text that concerns an image, and logits over granularities from both.

Paper: arXiv 2410.02745. Upstream: DeepLearnXMU/AVG-LLaVA@3685bc8, `llava/model/llava_arch.py` (`TextFilterCosine`) and
`llava/model/multimodal_router/builder.py` (Apache-2.0). The text filter never builds patches x text similarities; one
pass serves all images of a batch; votes are summed and normalised in float32.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_avg_llava import AvgLlavaConfig
from .ops_vtc import segment_mean


def text_similarity(base_features: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Mean cosine similarity of each text row to the patches of each image.

    The mean over patches is taken first, of the normalised patches: no tensor of patches x rows is built.

    Args:
        base_features (`torch.Tensor` of shape `(num_images, N, D)`): projected tokens of the whole views.
        text (`torch.Tensor` of shape `(R, D)`).

    Returns:
        `(num_images, R)`.

    Source: `TextFilterCosine`.
    """
    return similarity_to(F.normalize(base_features, dim=-1, eps=1e-8).mean(1), text)


def similarity_to(directions: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """`text_similarity` for means `(num_images, D)` of the normalised patches."""
    return directions @ text.T / text.norm(dim=-1).clamp(min=1e-8)


def filter_text(
    base_features: torch.Tensor,
    text: torch.Tensor,
    text_rows: torch.Tensor,
    rows: torch.Tensor,
    num_rows: int,
) -> torch.Tensor:
    """The text that is most similar to each image, most similar first.

    Args:
        base_features (`torch.Tensor` of shape `(num_images, N, D)`): projected tokens of the whole views.
        text (`torch.Tensor` of shape `(R, D)`): embeddings of all text of all prompts.
        text_rows (`torch.LongTensor` of shape `(R,)`): the prompt that each is from.
        rows (`torch.LongTensor` of shape `(num_images,)`): the prompt of each image, -1 for none.
        num_rows (`int`): K, text rows that are kept.

    Returns:
        `(num_images, K, D)`, zero where a prompt has less text.
    """
    return most_similar(text_similarity(base_features, text), text, text_rows, rows, num_rows)


def most_similar(
    similarity: torch.Tensor, text: torch.Tensor, text_rows: torch.Tensor, rows: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """`filter_text` by a similarity `(num_images, R)`."""
    similarity = similarity.masked_fill(text_rows != rows[:, None], float("-inf"))
    values, indices = similarity.topk(min(num_rows, len(text)), dim=-1)
    chosen = text[indices].masked_fill(values.isneginf()[..., None], 0)
    return F.pad(chosen, (0, 0, 0, num_rows - chosen.shape[1]))


class RouterLayer(nn.Module):
    """`torch.nn.TransformerEncoderLayer` with ReLU and LayerNorm after each branch, for tokens of tiles.

    Attention runs over the tokens of each tile, or, as released, over the tiles of each image, every place of the
    sequence for itself. Where images are grids of any size, it runs over the tokens of each image.
    """

    def __init__(self, width: int, num_heads: int, dropout: float, across_tiles: bool):
        super().__init__()
        self.num_heads = num_heads
        self.across_tiles = across_tiles
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, width)
        self.norm_1 = nn.LayerNorm(width, eps=1e-5)
        self.norm_2 = nn.LayerNorm(width, eps=1e-5)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: torch.Tensor, members: torch.Tensor | list[int]) -> torch.Tensor:
        """`(T, L, D)` states of all tiles, of which tile `t` belongs to image `members[t]`, or `(N, D)` states of all
        images, one after the other, of which image `i` has `members[i]`."""
        attend = self.attend if states.ndim == 3 else self.attend_in_images
        states = self.norm_1(states + self.dropout(attend(states, members)))
        inner = self.dropout(self.linear_1(states).relu())
        return self.norm_2(states + self.dropout(self.linear_2(inner)))

    def attend(self, states: torch.Tensor, image_of_tile: torch.Tensor) -> torch.Tensor:
        """Multi-head self-attention along one axis of `(T, L, D)`."""
        mask = image_of_tile[:, None] == image_of_tile if self.across_tiles else None
        # projected as states lie in memory; attention takes any axes of what comes out
        heads = (
            project(states).unflatten(-1, (self.num_heads, -1))  # (T, L, heads, D / heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        axes = (1, 2, 0, 3) if self.across_tiles else (0, 2, 1, 3)
        queries, keys, values = (each.permute(axes) for each in heads)
        dropout = self.dropout.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout)
        # back by the inverse of either permutation
        attended = attended.permute((2, 0, 1, 3) if self.across_tiles else axes)
        return self.out_proj(attended.flatten(2))

    def attend_in_images(self, states: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Multi-head self-attention within each image of `(N, D)` states; images of one length in one call."""
        are_alike = len(set(lengths)) == 1
        num_images, num_rows = (len(lengths), [len(states)]) if are_alike else (1, lengths)
        heads = (
            project(states).unflatten(-1, (self.num_heads, -1)).split(num_rows)  # (rows, heads, D / heads) each
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout, attended = self.dropout.p if self.training else 0.0, []
        # none of these has parameters, so that every process makes the same calls of modules
        for rows in zip(*heads, strict=True):
            # four axes, since torch fuses no attention of three
            rows = (each.unflatten(0, (num_images, -1)).transpose(1, 2) for each in rows)
            mixed = F.scaled_dot_product_attention(*rows, dropout_p=dropout).transpose(1, 2)
            attended.append(mixed.flatten(2).flatten(0, 1))
        return self.out_proj(attended[0] if are_alike else torch.cat(attended))


class WideLayerNorm(nn.LayerNorm):
    """LayerNorm in float32, whatever the dtype of its weights."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(states.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class GranularityRouter(nn.Module):
    """Logits over granularities, one row per image, from all granularities and the filtered text.

    Each token of each tile casts a vote per granularity, which a learnt weight of its place in the sequence scales;
    votes are summed over tokens, averaged over tiles and normalised over granularities.

    Source: `multimodal_router/builder.py`.
    """

    def __init__(self, config: AvgLlavaConfig):
        super().__init__()
        width, num_granularities = config.text_config.hidden_size, len(config.vis_token_granularity)
        length = sum(config.vis_token_granularity) + config.filtered_text_num
        self.merger = RouterLayer(
            width, config.router_num_heads, config.router_dropout, config.router_attention == "tiles"
        )
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, num_granularities)
        self.act = nn.GELU()
        self.voter = nn.Parameter(torch.empty(length, 1))
        self.norm = WideLayerNorm(num_granularities, eps=1e-5)

    def forward(
        self, pyramid: list[torch.Tensor], text: torch.Tensor, image_of_tile: torch.Tensor, num_tiles: torch.Tensor
    ) -> torch.Tensor:
        """Route images.

        Args:
            pyramid (`list[torch.Tensor]`): `(T, g, D)` tokens of every tile at each granularity, coarse to fine.
            text (`torch.Tensor` of shape `(num_images, K, D)`): from `filter_text`.
            image_of_tile (`torch.LongTensor` of shape `(T,)`): the image of each tile.
            num_tiles (`torch.LongTensor` of shape `(num_images,)`): tiles of each image.

        Returns:
            `(num_images, E)`, float32.
        """
        votes = self.votes(pyramid, text[image_of_tile], image_of_tile)
        # a product and no scattered sum, whose order a GPU leaves open
        images = torch.arange(len(num_tiles), device=num_tiles.device)
        members = (images[:, None] == image_of_tile).to(votes.dtype)
        mean_votes = members @ votes / num_tiles.clamp(min=1)[:, None]
        return self.norm(mean_votes)

    def token_logits(
        self, pyramid: list[torch.Tensor], text: torch.Tensor, image_of_tile: torch.Tensor
    ) -> torch.Tensor:
        """Logits `(T, L, E)` of each token of each tile; `text` is `(T, K, D)`."""
        states = torch.cat([*pyramid, text], dim=1).to(self.voter.dtype)
        states = self.merger(states, image_of_tile)
        return self.linear_2(self.act(self.linear_1(states)))

    def votes(self, pyramid: list[torch.Tensor], text: torch.Tensor, image_of_tile: torch.Tensor) -> torch.Tensor:
        """Weighted votes `(T, E)` of each tile, float32."""
        logits = self.token_logits(pyramid, text, image_of_tile)
        return torch.einsum("tle,l->te", logits.float(), self.voter[:, 0].float())


class GridRouter(nn.Module):
    """`GranularityRouter` for images that are grids of any size; ours.

    Tokens have no numbered place there: the votes of the tokens of a granularity are averaged, and a learnt weight of
    the granularity scales them. Texts keep a weight for each place.
    """

    def __init__(self, config: AvgLlavaConfig):
        super().__init__()
        width, num_granularities = config.text_config.hidden_size, len(config.vis_token_granularity)
        self.num_parts = num_granularities + config.filtered_text_num
        self.merger = RouterLayer(width, config.router_num_heads, config.router_dropout, across_tiles=False)
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, num_granularities)
        self.act = nn.GELU()
        self.voter = nn.Parameter(torch.empty(self.num_parts, 1))
        self.norm = WideLayerNorm(num_granularities, eps=1e-5)

    def forward(self, pyramid: list[torch.Tensor], counts: torch.LongTensor, text: torch.Tensor) -> torch.Tensor:
        """Route images.

        Args:
            pyramid (`list[torch.Tensor]`): `(N, D)` tokens of all images, one after the other, at each granularity,
                coarse to fine.
            counts (`torch.LongTensor` of shape `(E, num_images)`): tokens of each image there, on the CPU.
            text (`torch.Tensor` of shape `(num_images, K, D)`): from `filter_text`.

        Returns:
            `(num_images, E)`, float32.
        """
        # the parts of an image follow each other: its granularities, then its texts one by one
        texts = torch.ones(text.shape[1], text.shape[0], dtype=torch.long)
        widths = torch.cat([counts, texts]).T.flatten()  # (num_images * parts,)
        starts = F.pad(counts.sum(1).cumsum(0), (1, 0))
        firsts = torch.cat([counts.cumsum(1) - counts + starts[:-1, None], _rows_from(starts[-1], texts)]).T.flatten()
        ends = widths.cumsum(0)
        source = torch.arange(int(ends[-1])) + torch.repeat_interleave(firsts - ends + widths, widths)
        source, offsets = (each.to(text.device, non_blocking=True) for each in (source, F.pad(ends, (1, 0))))
        states = torch.cat([*pyramid, text.flatten(0, 1)]).index_select(0, source).to(self.voter.dtype)
        states = self.merger(states, widths.unflatten(0, (-1, self.num_parts)).sum(1).tolist())
        logits = self.linear_2(self.act(self.linear_1(states))).float()
        means = segment_mean(logits, torch.arange(len(logits), device=logits.device), offsets)
        votes = torch.einsum("nle,l->ne", means.unflatten(0, (-1, self.num_parts)), self.voter[:, 0].float())
        return self.norm(votes)


def _rows_from(start: torch.Tensor, texts: torch.Tensor) -> torch.LongTensor:
    """Where each text `(K, num_images)` stands if those of an image follow each other from `start` on."""
    num_texts, num_images = texts.shape
    return start + torch.arange(num_texts)[:, None] + torch.arange(num_images) * num_texts
