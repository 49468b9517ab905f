"""CDPruner: of every image the visual tokens that are most diverse, given the question.

Paper: "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs" (arXiv 2506.10967,
NeurIPS 2025), section 3. None of its code (Theia-4869/CDPruner) was taken; there are no weights.

Kernel L of an image: cosines of its projected visual tokens (equation 3). Relevance r of each: its cosine to the
question (5), brought to [0, 1] by the smallest and largest of the image (6). A determinantal point process with the
kernel diag(r) L diag(r) (7) prefers sets that are diverse and relevant; the most probable one of a given size is
approached greedily, by the Cholesky factor that grows by a row with each token (Chen et al. 2018, NeurIPS).

Ours: batches of unequal images, several tiles and images, budgets per call, maps of LLaVA-NeXT and grids of Qwen's
bases, whose tokens keep their coordinates. Where there are more tokens to keep than linearly independent ones, all
further sets are equally improbable, and the most relevant tokens are taken. Where we differ: the question is the mean
embedding of the text of the row, in the vocabulary of the language model, on every base. The paper does so for
InternVL3 and Qwen2.5-VL, but asks CLIP's own text encoder for LLaVA, which no checkpoint of LLaVA has in it: its
numbers for LLaVA are those of another relevance. Chat template and turns are part of that text: whatever is added to a
prompt can change which tokens stay. In training, what labels supervise is not part of it (`asked_tokens`). `generate`
chooses once, for the prompt; to compute it again with its answer, or to go on with its cache, give the
`router_decisions` that `forward` gave for it.
"""

import torch
import torch.nn.functional as F

from .configuration_cdpruner import CdprunerConfig
from .head_vtc import VtcForConditionalGeneration
from .layout_vtc import Layout
from .modeling_vtc import VtcModel
from .ops_vtc import segment_mean
from .packing_vtc import first_slots, to_device
from .vision_vtc import Choice, Features, Scores, VisualTokens, VtcVisionHalf

# what a token must add to a determinant to count as independent of those before it; float32 rounds below
_INDEPENDENT = 1e-5


def question_of_rows(prompts: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The mean embedding of the text of each row, `(B, L, D)` to `(B, D)` in float32; 0 for a row without text."""
    num_rows, length = prompts.shape[:2]
    counts = torch.bincount(layout.text // length, minlength=num_rows)
    places, offsets = torch.arange(len(layout.text)), F.pad(counts.cumsum(0), (1, 0))
    text, places, offsets = to_device(prompts.device, layout.text, places, offsets)
    return segment_mean(prompts.flatten(0, 1).index_select(0, text).float(), places, offsets)


def min_max(scores: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Scores `(M, N)` brought to [0, 1] by the extremes of the real ones of each row; 1 where all are equal."""
    smallest = scores.masked_fill(~real, float("inf")).amin(1, keepdim=True)
    extent = scores.masked_fill(~real, float("-inf")).amax(1, keepdim=True) - smallest
    return torch.where(extent > 0, (scores - smallest) / extent, 1.0).masked_fill(~real, 0.0)


def most_diverse(
    tokens: torch.Tensor, relevance: torch.Tensor, real: torch.Tensor, num_kept: torch.LongTensor
) -> torch.Tensor:
    """The tokens of each image that a greedy search finds for the largest determinant of their conditional kernel.

    Args:
        tokens (`torch.Tensor` of shape `(M, N, D)`): of M images, in float32.
        relevance (`torch.Tensor` of shape `(M, N)`): in [0, 1].
        real (`torch.BoolTensor` of shape `(M, N)`): False behind the last token of an image.
        num_kept (`torch.LongTensor` of shape `(M,)`): on the CPU, at most as many as are real.

    Returns:
        `(M, N)` bool, True at the tokens that stay.
    """
    scaled = relevance[..., None] * F.normalize(tokens, dim=-1)
    kernel = scaled @ scaled.transpose(1, 2)
    num_steps, images = int(num_kept.max()), torch.arange(len(tokens), device=tokens.device)
    factor = kernel.new_zeros(len(tokens), num_steps, tokens.shape[1])
    # what each token would multiply the determinant by
    gains, free = kernel.diagonal(dim1=1, dim2=2).clone(), real.clone()
    ranks = torch.full_like(real, num_steps, dtype=torch.long)
    for step in range(num_steps):
        # all gains that count are larger than any that does not, whose place relevance takes
        worth = torch.where(gains > _INDEPENDENT, gains, _INDEPENDENT * relevance)
        best = worth.masked_fill(~free, -1.0).argmax(1)
        gain = gains[images, best][:, None]
        row = kernel[images, best] - (factor[images, :step, best][:, None] @ factor[:, :step])[:, 0]
        row = torch.where(gain > _INDEPENDENT, row * gain.clamp(min=_INDEPENDENT).rsqrt(), 0.0)
        factor[:, step] = row
        gains = gains - row.square()
        # an image without free tokens names one again
        ranks[images, best] = torch.where(free[images, best], step, ranks[images, best])
        free[images, best] = False
    (counts,) = to_device(tokens.device, num_kept)
    return ranks < counts[:, None]


class CdprunerSteps:
    """Tower and projector, and a choice among the visual tokens that they give.

    `router_logits` `(V,)` are the cosines of all visual tokens to the question, None where all of them stay;
    `router_decisions` `(V,)` are True at those that stay.
    """

    config_class = CdprunerConfig
    routes_by_text = True
    budgets_settle = False

    def score(self, features: Features, prompts: torch.Tensor | None, layout: Layout) -> Scores | None:
        """Which visual tokens stay, and all of them as `connect` needs them."""
        if layout.router_decisions is not None or not any(layout.levels):
            return None
        if prompts is None:
            raise ValueError(
                "CDPruner needs the question, by which it chooses. Give `vtc_budget='full'`, or call `forward` or "
                "`generate` with the whole prompt."
            )
        visual = super().connect(features, Choice(layout.num_reserved, layout.num_reserved), layout, None)
        device, tokens = visual.embeds.device, visual.embeds.detach().float()
        counts = layout.num_reserved
        rows = torch.repeat_interleave(torch.tensor(layout.rows), counts)
        # images that stay whole need no search
        shrinks = torch.tensor(layout.levels) > 0
        own, most = counts[shrinks], int(counts[shrinks].max())
        firsts = (counts.cumsum(0) - counts)[shrinks]
        places = firsts[:, None] + torch.arange(most)
        real = torch.arange(most) < own[:, None]
        # of another image behind the last token of one, which is not read
        places = places.clamp(max=len(tokens) - 1)
        mine = first_slots(torch.full_like(own, most), own)
        rows, places, real, mine, whole = to_device(
            device, rows, places, real, mine, torch.repeat_interleave(~shrinks, counts)
        )
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            questions = question_of_rows(prompts, layout).to(device)
            cosines = F.cosine_similarity(tokens, questions[rows], dim=-1)
            relevance = min_max(cosines[places], real)
            chosen = most_diverse(tokens[places], relevance, real, layout.num_leaving[shrinks])
            stays = whole.clone()
            stays[places.flatten()[mine]] = chosen.flatten()[mine]
        return Scores((stays,), cosines, visual)

    def choose(self, scores: list[torch.Tensor], layout: Layout) -> Choice:
        """What was found, as the host knows how many it is."""
        if layout.router_decisions is not None:
            stays = _checked_decisions(layout.router_decisions, layout.num_reserved)
            num_kept = torch.stack([own.sum() for own in stays.split(layout.num_reserved.tolist())])
            return Choice(num_kept, num_kept, stays)
        stays = scores[0] if scores else torch.ones(int(layout.num_reserved.sum()), dtype=torch.bool)
        return Choice(layout.num_leaving, layout.num_leaving, stays)

    def connect(self, features: Features, choice: Choice, layout: Layout, scores: Scores | None) -> VisualTokens:
        """The visual tokens that stay, at their own placeholders."""
        visual = super().connect(features, choice, layout, None) if scores is None else scores.reused
        if bool(choice.decisions.all()):
            return visual
        slots = choice.decisions.nonzero().flatten()
        (kept,) = to_device(visual.embeds.device, slots)
        rows = None if visual.layer_rows is None else visual.layer_rows.index_select(1, kept)
        return VisualTokens(visual.embeds.index_select(0, kept), slots, layer_rows=rows)


def _checked_decisions(decisions: torch.Tensor, num_reserved: torch.LongTensor) -> torch.BoolTensor:
    total = int(num_reserved.sum())
    if decisions.shape != (total,) or decisions.dtype != torch.bool:
        raise ValueError(
            f"`router_decisions` needs a truth value per visual token, True = stays, shape ({total},), got "
            f"{decisions.dtype} of shape {tuple(decisions.shape)}."
        )
    for image_idx, own in enumerate(decisions.split(num_reserved.tolist())):
        if not bool(own.any()):
            raise ValueError(f"`router_decisions` must keep a visual token of every image, of image {image_idx} none.")
    return decisions


class CdprunerVision(CdprunerSteps, VtcVisionHalf):
    """Tower and projector; without the question nothing can be chosen."""


class CdprunerModel(CdprunerSteps, VtcModel):
    """CDPruner without a head."""

    # of a tower with deeper rows the decoder's layers run one by one
    reads_padding_mask = True


class CdprunerForConditionalGeneration(VtcForConditionalGeneration):
    """CDPruner with a language modelling head."""

    config_class = CdprunerConfig
    model_class = CdprunerModel
