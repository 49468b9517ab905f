"""Training objectives as pure functions on tensors, and the running percentile that ViCO's router labels need.

Nothing here knows a model or a trainer. Logits come in already gathered at the supervised positions, so that no tensor
of sequence length times vocabulary has to exist.

Source: ViCO, arXiv 2510.12793, and InternVL3.5, arXiv 2508.18265, section 2.3, whose training code was not published:
what is ours is said at each function. AVG-LLaVA, arXiv 2410.02745, and its released code.
"""

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import functional as F

IGNORE_INDEX = -100


def token_kl(reference_logits: torch.Tensor, policy_logits: torch.Tensor) -> torch.Tensor:
    """Forward divergence KL(reference || policy) of every token, over the full vocabulary.

    Args:
        reference_logits (`torch.Tensor` of shape `(N, V)`): of the frozen model that sees all visual tokens.
        policy_logits (`torch.Tensor` of shape `(N, V)`): of the model in training, same tokens in the same order.

    Returns:
        `torch.Tensor` of shape `(N,)`, float32, in nats, never negative up to rounding.

    Raises:
        ValueError: the shapes differ.
    """
    if reference_logits.shape != policy_logits.shape:
        raise ValueError(
            "`reference_logits` and `policy_logits` must describe the same tokens and the same vocabulary, got "
            f"{tuple(reference_logits.shape)} and {tuple(policy_logits.shape)}. Gather both at the same positions."
        )
    reference = F.log_softmax(reference_logits.float(), dim=-1)
    policy = F.log_softmax(policy_logits.float(), dim=-1)
    return F.kl_div(policy, reference, reduction="none", log_target=True).sum(dim=-1)


def token_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy of every token.

    Args:
        logits (`torch.Tensor` of shape `(N, V)`): row `n` predicts `targets[n]`; the shift is the caller's.
        targets (`torch.Tensor` of shape `(N,)`): token ids.
        label_smoothing (`float`): share of the target that is spread evenly over the vocabulary, in [0, 1].

    Returns:
        `torch.Tensor` of shape `(N,)`, float32, in nats.
    """
    return F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=label_smoothing)


def next_token_loss(
    outputs: Any,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Next-token loss of a model's output, as a `compute_loss_func` of `transformers.Trainer` or one of TRL.

    The stock `Trainer` smooths labels without shifting them, unless it knows a model's class by name: with these
    models `label_smoothing_factor` would teach them to repeat the token that they are given. In its place pass
    `compute_loss_func=functools.partial(next_token_loss, label_smoothing=0.1)`. Logits are then made at full length.

    Args:
        outputs: with `logits` `(B, L, V)`.
        labels (`torch.Tensor` of shape `(B, L)`): -100 where nothing is supervised.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): see `mean_over_items`.
        label_smoothing (`float`): see `token_cross_entropy`.
    """
    mask = labels[:, 1:] != IGNORE_INDEX
    values = token_cross_entropy(outputs.logits[:, :-1][mask], labels[:, 1:][mask], label_smoothing)
    return mean_over_items(values, num_items_in_batch)


def mean_over_items(values: torch.Tensor, num_items: torch.Tensor | int | None = None) -> torch.Tensor:
    """Mean of `values`, or their sum over a count that spans several micro-batches.

    Args:
        values (`torch.Tensor` of shape `(N,)`): may be empty; the result is then 0 and still part of the graph.
        num_items (`torch.Tensor` or `int`, *optional*): the count over the whole accumulated batch. Summing the
            results of its micro-batches then gives the mean over all of it, as if it had been one batch.

    Returns:
        Scalar `torch.Tensor`.
    """
    if num_items is None:
        return values.sum() / max(values.numel(), 1)
    return values.sum() / torch.as_tensor(num_items, device=values.device).clamp(min=1)


def mean_per_row(values: torch.Tensor, row_idx: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Mean of token values per sample.

    Args:
        values (`torch.Tensor` of shape `(N,)`): one value per supervised token.
        row_idx (`torch.Tensor` of shape `(N,)`): the sample that each token belongs to, in [0, num_rows).
        num_rows (`int`): samples.

    Returns:
        `torch.Tensor` of shape `(num_rows,)`, in the dtype of `values`; NaN for a sample without supervised tokens.
    """
    total = values.new_zeros(num_rows).index_add(0, row_idx, values)
    count = torch.bincount(row_idx, minlength=num_rows)
    return total / count


def consistency_kl(
    reference_logits: torch.Tensor, policy_logits: torch.Tensor, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """The objective of ViCO stage 1: mean over response tokens of KL(reference || policy).

    Args:
        reference_logits (`torch.Tensor` of shape `(N, V)`): frozen model, all visual tokens.
        policy_logits (`torch.Tensor` of shape `(N, V)`): model in training, some tiles compressed.
        num_items (`torch.Tensor` or `int`, *optional*): response tokens of the whole accumulated batch; see
            `mean_over_items`.

    Returns:
        Scalar `torch.Tensor`, float32. No gradient reaches `reference_logits`.

    Raises:
        ValueError: the shapes differ.

    Source: InternVL3.5 model card, "Visual Consistency Learning": the reference comes first, the sum runs over the
    whole vocabulary, the mean over the N response tokens. No temperature is mentioned and none is used.
    """
    return mean_over_items(token_kl(reference_logits.detach(), policy_logits), num_items)


def loss_ratio(compressed_loss: torch.Tensor, full_loss: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """How many times larger the loss becomes when a tile is compressed.

    Args:
        compressed_loss (`torch.Tensor`): loss of the sample with the tile compressed, any shape.
        full_loss (`torch.Tensor`): loss of the same sample with no tile compressed, same shape.
        eps (`float`): added to the denominator, which may vanish where the answer is certain. Ours.

    Returns:
        `torch.Tensor` of the same shape, `compressed_loss / (full_loss + eps)`.

    Source: InternVL3.5 model card, `r_i = L(y | I with 1/16) / L(y | I with 1/4)`.
    """
    return compressed_loss / (full_loss + eps)


def compression_labels(ratios: torch.Tensor, threshold: float) -> torch.Tensor:
    """Targets of the router: 0 where compression costs little, 1 where the tile must stay at full length.

    Args:
        ratios (`torch.Tensor` of shape `(T,)`): from `loss_ratio`; NaN where a tile has no ratio.
        threshold (`float`): tau. A ratio equal to it keeps the tile.

    Returns:
        `torch.Tensor` of shape `(T,)`, int64: 0 (compress) where `ratios < threshold`, else 1; -100 where NaN.

    Source: InternVL3.5 model card. Class 0 is the router's first column, so its softmax is P(compress).
    """
    labels = (ratios >= threshold).long()
    return labels.masked_fill(ratios.isnan(), IGNORE_INDEX)


def router_cross_entropy(
    router_logits: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """The objective of ViCO stage 2: cross-entropy of the router's two logits, mean over labelled tiles.

    Args:
        router_logits (`torch.Tensor` of shape `(T, 2)`): column 0 is "compress".
        labels (`torch.Tensor` of shape `(T,)`): 0, 1, or -100 for a tile that has no label.
        num_items (`torch.Tensor` or `int`, *optional*): tiles of the whole accumulated batch; see `mean_over_items`.

    Returns:
        Scalar `torch.Tensor`, float32. Without any labelled tile it is 0 and its gradient is 0, not absent.
    """
    total = F.cross_entropy(router_logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    if num_items is None:
        num_items = (labels != IGNORE_INDEX).sum()
    return total / torch.as_tensor(num_items, device=total.device).clamp(min=1)


def router_entropy(router_logits: torch.Tensor) -> torch.Tensor:
    """Mean entropy of the router's choice, in nats: ln E when undecided between E, 0 when certain.

    Args:
        router_logits (`torch.Tensor` of shape `(T, E)`): one row per decision, one column per choice.

    Returns:
        Scalar `torch.Tensor`, float32; NaN if there is no row.
    """
    log_probs = F.log_softmax(router_logits.float(), dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1).mean()


def best_granularity_loss(
    router_logits: torch.Tensor, losses: torch.Tensor, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """RGLF, first part: cross-entropy of the router with the granularity of the smallest loss.

    Args:
        router_logits (`torch.Tensor` of shape `(num_images, E)`): of the E granularities, coarse first.
        losses (`torch.Tensor` of shape `(num_images, E)`): of the answers at each granularity, mean over their tokens.
            Of equal ones the first, which is the coarsest, is the best.
        num_items (`torch.Tensor` or `int`, *optional*): images of the whole accumulated batch; see `mean_over_items`.

    Returns:
        Scalar `torch.Tensor`, float32.

    Source: DeepLearnXMU/AVG-LLaVA@3685bc8 `llava_llama.py`.
    """
    best = losses.sort(dim=1, stable=True).indices[:, 0]
    return mean_over_items(token_cross_entropy(router_logits, best), num_items)


def granularity_ranking_loss(
    router_logits: torch.Tensor,
    losses: torch.Tensor,
    margin: float = 1.0,
    rule: str = "released",
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """RGLF, second part: hinge losses on all pairs of granularities, whose margins grow with the loss difference.

    With granularities sorted by rising loss `l`, and the router's log-probabilities `s` in the same order, a pair
    `i < j` costs `max(0, s_j - s_i + lambda_ij)`.

    Args:
        router_logits (`torch.Tensor` of shape `(num_images, E)`): of the E granularities, coarse first.
        losses (`torch.Tensor` of shape `(num_images, E)`): as above; no gradient reaches them.
        margin (`float`): m.
        rule (`str`): `"released"`: `lambda_ij = m (j - i) (l_j - l_i)`, and for each gap `j - i` the mean over its
            pairs and images; these means are added. `"paper"`: `lambda_ij = m (l_j - l_i)`, the sum over all pairs,
            the mean over images, after a published summary of the paper's formula.
        num_items (`torch.Tensor` or `int`, *optional*): images of the whole accumulated batch; see `mean_over_items`.

    Returns:
        Scalar `torch.Tensor`, float32.

    Source: DeepLearnXMU/AVG-LLaVA@3685bc8 `llava_llama.py`; arXiv 2410.02745.
    """
    ranked_losses, order = losses.detach().float().sort(dim=1, stable=True)
    scores = F.log_softmax(router_logits.float(), dim=-1).gather(1, order)
    num_granularities = losses.shape[1]
    total = scores.new_zeros(len(losses))
    for gap in range(1, num_granularities):
        difference = ranked_losses[:, gap:] - ranked_losses[:, :-gap]
        scale = margin * gap if rule == "released" else margin
        costs = F.relu(scores[:, gap:] - scores[:, :-gap] + scale * difference)
        total = total + (costs.mean(1) if rule == "released" else costs.sum(1))
    return mean_over_items(total, num_items)


class SlidingWindowPercentile:
    """The k-th percentile of the latest values, linearly interpolated.

    The same values in the same order give the same threshold, on any machine: the state is a list of floats.

    Args:
        window_length (`int`): how many of the latest values count, at least 1.
        percentile (`float`): k, in [0, 100]. It is also the share of tiles, in percent, that will be labelled
            "compress" once the ratios are stationary.

    Raises:
        ValueError: an argument is out of its range.

    Source: ViCO, the dynamic threshold of router training. Neither k nor the length of the window is published: the
    defaults are ours.
    """

    def __init__(self, window_length: int = 1000, percentile: float = 50.0):
        if window_length < 1:
            raise ValueError(f"`window_length` must be at least 1 value, got {window_length}.")
        if not 0.0 <= percentile <= 100.0:
            raise ValueError(f"`percentile` must lie in [0, 100], got {percentile}. For the median pass 50.")
        self.percentile = percentile
        self.values: deque[float] = deque(maxlen=window_length)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def window_length(self) -> int:
        return self.values.maxlen

    def update(self, values: Iterable[float]) -> None:
        """Append values, oldest first; the oldest ones beyond the window are forgotten."""
        self.values.extend(float(value) for value in values)

    def threshold(self) -> float | None:
        """The percentile of the window, or None while it is empty."""
        if not self.values:
            return None
        # torch.quantile refuses more than 2**24 values; a sorted list has no limit
        ordered = sorted(self.values)
        position = self.percentile / 100.0 * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (position - below) * (ordered[above] - ordered[below])

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as plain numbers that survive JSON exactly."""
        return {"percentile": self.percentile, "window_length": self.window_length, "values": list(self.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the values of `state_dict`.

        Raises:
            ValueError: the state belongs to another percentile or window length; going on would change the labels.
        """
        for name in ("percentile", "window_length"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"`{name}` of the saved window is {state[name]}, but this run was given {getattr(self, name)}. "
                    "Resume with the value of the saved run, or start a new one."
                )
        self.values = deque(state["values"], maxlen=self.window_length)
