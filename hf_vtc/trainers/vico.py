"""ViCO: visual consistency training and router training for InternVL3.5-Flash-type models.

Papers: ViCO, arXiv 2510.12793; InternVL3.5, arXiv 2508.18265, section 2.3. The authors released no training code: the
objectives are theirs, and each choice that they do not publish is called ours where it is made.
"""

import copy
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .base import VtcTrainer, freeze, train_router_alone
from .losses import (
    IGNORE_INDEX,
    SlidingWindowPercentile,
    compression_labels,
    consistency_kl,
    loss_ratio,
    mean_over_items,
    mean_per_row,
    router_cross_entropy,
    router_entropy,
    token_cross_entropy,
    token_kl,
)
from .responses import Responses
from .sharding import black_tile


def tile_rows(input_ids: torch.Tensor, image_token_id: int, image_seq_length: int) -> list[int]:
    """The sample of each tile, in prompt order.

    Args:
        input_ids (`torch.Tensor` of shape `(B, L)`): with `image_seq_length` placeholders per tile.
        image_token_id (`int`): the placeholder.
        image_seq_length (`int`): reserved placeholders per tile.
    """
    tiles_per_row = (input_ids == image_token_id).sum(1) // image_seq_length
    return [row for row, tiles in enumerate(tiles_per_row.tolist()) for _ in range(tiles)]


class VicoConsistencyTrainer(VtcTrainer):
    """ViCO stage 1: learn to answer from compressed tiles as the uncompressed model does.

    Per step, tiles are compressed at random. The loss is KL(reference || policy) over the response tokens,
    where the reference is a frozen copy of the initial model that always sees all visual tokens. All weights train but
    those of the router, which is stage 2's. With a `PeftModel` the adapter decides what trains, again without router.

    Args:
        model ([`PreTrainedModel`]): the policy, a `VicoForConditionalGeneration`.
        args (`TrainingArguments`, *optional*): see `VtcTrainer`.
        reference_model ([`PreTrainedModel`], *optional*): the frozen model; by default a copy of `model` as it is now.
            To resume a run, build the trainer from the initial model again, so that the copy is the same one.
        compress_probability (`float`, `tuple[float, float]` or `"auto"`): chance in [0, 1] that a tile is compressed,
            independently of all others, or the range from which every sample draws its own chance. The report samples
            uniformly from the two lengths, 0.5; independence per tile and the range are ours. With one chance for all,
            samples of which nearly everything is compressed hardly occur. `"auto"`, ours too, compresses what the
            router chooses: a last round after stage 2, in which the rest gets used to the images it will see.
        cross_entropy_weight (`float`): weight of the usual next-token loss beside the KL. The papers mention none: 0.
        kwargs: the other arguments of `transformers.Trainer`.

    Raises:
        ValueError: `compress_probability` is none of these, or `cross_entropy_weight` is negative.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: TrainingArguments | None = None,
        *,
        reference_model: PreTrainedModel | None = None,
        compress_probability: float | tuple[float, float] | str = 0.5,
        cross_entropy_weight: float = 0.0,
        **kwargs: Any,
    ):
        routed = isinstance(compress_probability, str) and compress_probability == "auto"
        single = isinstance(compress_probability, (int, float))
        chances = (compress_probability, compress_probability) if single else compress_probability
        if not routed and (isinstance(chances, str) or not 0.0 <= chances[0] <= chances[1] <= 1.0):
            raise ValueError(
                "`compress_probability` must lie in [0, 1], be a range (lowest, highest) of such chances, or 'auto', "
                f"got {compress_probability!r}."
            )
        if cross_entropy_weight < 0.0:
            raise ValueError(f"`cross_entropy_weight` must not be negative, got {cross_entropy_weight}.")
        reference_model = copy.deepcopy(model) if reference_model is None else reference_model
        if not isinstance(model, PeftModel):
            model.requires_grad_(True)
        freeze(model, "router")
        super().__init__(model, args, **kwargs)
        self.reference_model = self.place_reference(reference_model)
        self.compress_probabilities = None if routed else chances
        self.cross_entropy_weight = cross_entropy_weight

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict]:
        """KL over response tokens with some tiles compressed; see the class."""
        inputs = dict(inputs)
        responses = Responses.from_labels(inputs.pop("labels"))
        with torch.no_grad():
            reference_logits, _ = self.response_logits(
                self.reference_model, responses, {**inputs, "vtc_budget": "full"}
            )
        if "pixel_values" in inputs and self.compress_probabilities is not None:
            inputs["router_decisions"] = self.draw_decisions(inputs["input_ids"], model.training)
        policy_logits, outputs = self.response_logits(model, responses, inputs)

        loss = consistency_kl(reference_logits, policy_logits, num_items_in_batch)
        num_tokens = len(responses.targets)
        if num_tokens:
            num_items = num_tokens if num_items_in_batch is None else num_items_in_batch
            self.record("kl", loss.detach() * num_items / num_tokens, num_tokens)
        if self.cross_entropy_weight > 0:
            cross_entropy = token_cross_entropy(policy_logits, responses.targets)
            loss = loss + self.cross_entropy_weight * mean_over_items(cross_entropy, num_items_in_batch)
            if num_tokens:
                self.record("cross_entropy", cross_entropy.mean(), num_tokens)
        if "pixel_values" in inputs:
            compress = outputs.router_decisions
            num_reserved = len(compress) * self.unwrap(model).config.image_seq_length
            self.record("compressed_tiles", compress.float().mean(), len(compress))
            self.record("kept_tokens", float(outputs.num_visual_tokens.sum()) / num_reserved, num_reserved)
        loss = self.across_processes(loss, num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def draw_decisions(self, input_ids: torch.Tensor, training: bool) -> torch.Tensor:
        """Which tiles this step compresses, `(T,)` bool, for prompts `(B, L)`."""
        config, (lowest, highest) = self.unwrap(self.model).config, self.compress_probabilities
        rows = torch.tensor(tile_rows(input_ids, config.image_token_id, config.image_seq_length), dtype=torch.long)
        samples, sample = rows.unique(return_inverse=True)
        # one number for a sample with images, then one for each of its tiles: smaller micro-batches draw the same
        order = torch.cat([samples, rows]).argsort(stable=True)
        numbers = torch.empty(len(order))
        numbers[order] = self.draw(len(order), training)
        chances = lowest + (highest - lowest) * numbers[: len(samples)]
        return numbers[len(samples) :] < chances[sample]


class RatioWindow(TrainerCallback, ExportableState):
    """Carries the window of loss ratios through checkpoints, in `trainer_state.json`.

    Trainer writes the state of every `ExportableState`; reading it back here, and not by
    `restore_callback_states_from_checkpoint`, makes an ordinary `train(resume_from_checkpoint=...)` exact.
    """

    def __init__(self, window_length: int, percentile: float):
        self.window = SlidingWindowPercentile(window_length, percentile)

    @property
    def window_state(self) -> dict[str, Any]:
        return self.window.state_dict()

    @window_state.setter
    def window_state(self, state: dict[str, Any]) -> None:
        self.window.load_state_dict(state)

    def state(self) -> dict[str, Any]:
        """What Trainer saves: arguments of a new callback, and attributes to set on it."""
        arguments = {"window_length": self.window.window_length, "percentile": self.window.percentile}
        return {"args": arguments, "attributes": {"window_state": self.window_state}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            return
        if "RatioWindow" not in state.stateful_callbacks:
            raise ValueError(
                "The checkpoint holds no window of loss ratios, so `VicoRouterTrainer` did not write it. Load its "
                "weights with `from_pretrained` and start stage 2 without `resume_from_checkpoint`."
            )
        self.window_state = state.stateful_callbacks["RatioWindow"]["attributes"]["window_state"]


class VicoRouterTrainer(VtcTrainer):
    """ViCO stage 2: teach the router which tiles can be compressed without harm.

    For each tile, the ratio between the loss with the tile compressed and the loss with nothing compressed is measured
    without gradients. Ratios below a percentile of the recent past are labelled "compress", and the router learns the
    labels by cross-entropy. Nothing but the router trains; everything else stays in eval mode.

    The threshold of an optimizer step comes from the ratios of the steps before it, so that it does not depend on how
    the step is cut into micro-batches. The first step has no past and teaches nothing.

    Args:
        model ([`PreTrainedModel`]): a `VicoForConditionalGeneration` after stage 1, with any adapter merged.
        args (`TrainingArguments`, *optional*): see `VtcTrainer`.
        reference_model ([`PreTrainedModel`], *optional*): the frozen model of stage 1, for `ratio_loss="kl"`.
        ratio_loss (`str`): `"kl"`, the published choice, is KL(reference || model) over the response tokens.
            `"cross_entropy"` is the loss of the answers and needs no reference; ours, for a model that is its own
            reference: its KL without compression would be 0 and the ratio without meaning.
        probe (`str`): `"one_tile"` compresses one tile at a time, all others being full. `"all_tiles"` compresses all
            tiles of a sample at once and gives them the same ratio: one pass, coarser labels. The papers do not say
            which they use. The passes of `"one_tile"` depend on the number of tiles; where parameters are sharded
            across processes, which must make the same passes, only `"all_tiles"` works.
        probe_batch_size (`int`, *optional*): samples per pass of `"one_tile"`; by default as many as the batch has.
        window_length (`int`): ratios that the percentile looks back on, over all processes. Unpublished, ours.
        percentile (`float` in [0, 100]): k, in the long run the share of tiles labelled "compress", in percent.
            Unpublished, ours.
        ratio_eps (`float`): see `loss_ratio`.
        kwargs: the other arguments of `transformers.Trainer`.

    Raises:
        ValueError: an option is none of those above, the reference is missing, `model` is a `PeftModel`, or
            `"one_tile"` meets sharded parameters.
    """

    # noise is for decoders that train
    without_effect = (*VtcTrainer.without_effect, "neftune_noise_alpha")

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments | None = None,
        *,
        reference_model: PreTrainedModel | None = None,
        ratio_loss: str = "kl",
        probe: str = "one_tile",
        probe_batch_size: int | None = None,
        window_length: int = 1000,
        percentile: float = 50.0,
        ratio_eps: float = 1e-6,
        **kwargs: Any,
    ):
        if ratio_loss not in ("kl", "cross_entropy"):
            raise ValueError(f"`ratio_loss` must be 'kl' or 'cross_entropy', got {ratio_loss!r}.")
        if probe not in ("one_tile", "all_tiles"):
            raise ValueError(f"`probe` must be 'one_tile' or 'all_tiles', got {probe!r}.")
        if probe_batch_size is not None and probe_batch_size < 1:
            raise ValueError(f"`probe_batch_size` must be at least 1 sample, got {probe_batch_size}.")
        if ratio_loss == "kl" and reference_model is None:
            raise ValueError(
                "`ratio_loss='kl'` compares with a frozen model, but `reference_model` is None. Pass the model that "
                "stage 1 started from, or use `ratio_loss='cross_entropy'`."
            )
        train_router_alone(model)
        super().__init__(model, args, **kwargs)
        if probe == "one_tile" and self.is_sharded:
            raise ValueError(
                "`probe='one_tile'` makes as many passes as a process has tiles, but where parameters are sharded all "
                "processes must make the same. Use `probe='all_tiles'`, or DDP."
            )
        self.reference_model = None if ratio_loss == "cross_entropy" else self.place_reference(reference_model)
        self.ratio_loss = ratio_loss
        self.probe = probe
        self.probe_batch_size = probe_batch_size
        self.ratio_eps = ratio_eps
        self.add_callback(RatioWindow(window_length, percentile))
        # ratios of the optimizer step under way, micro-batch by micro-batch
        self._new_ratios: list[torch.Tensor] = []

    @property
    def ratio_window(self) -> SlidingWindowPercentile:
        """The window; `RatioWindow` may be replaced on resume, so it is looked up."""
        callbacks = self.callback_handler.callbacks
        return next(callback for callback in callbacks if isinstance(callback, RatioWindow)).window

    def count_items(self, batches: list[dict[str, Any]]) -> int:
        """Tiles."""
        return sum(len(batch["pixel_values"]) for batch in batches if "pixel_values" in batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict]:
        """Cross-entropy of the router on labels measured in this batch; see the class."""
        training = model.training
        # evaluation counts tokens, not tiles
        num_tiles = num_items_in_batch if training else None
        inputs = dict(inputs)
        responses = Responses.from_labels(inputs.pop("labels"))
        own = self.unwrap(model)
        # Trainer switches the whole model to training mode before each step
        model.eval()
        own.model.router.train(training)

        if "pixel_values" not in inputs:
            # text has nothing to teach, but the router takes part with weight zero, as on every other process
            outputs = model(**black_tile(own), vtc_budget=1.0, logits_to_keep=1, use_cache=False)
            loss = 0 * outputs.router_logits.sum()
        else:
            router_logits, ratios = self.route_and_probe(model, responses, inputs)
            loss = self.router_loss(router_logits, ratios, num_tiles, training)
        if training and self.accelerator.sync_gradients:
            self._close_step()
        loss = self.across_processes(loss, num_tiles)
        return (loss, {}) if return_outputs else loss

    def router_loss(
        self, router_logits: torch.Tensor, ratios: torch.Tensor, num_tiles: torch.Tensor | None, training: bool
    ) -> torch.Tensor:
        """From logits `(T, 2)` and ratios `(T,)` to the loss; notes the ratios of training batches for later steps."""
        threshold = self.ratio_window.threshold()
        labels = torch.full_like(ratios, IGNORE_INDEX, dtype=torch.long)
        if threshold is not None:
            labels = compression_labels(ratios, threshold)
            self.record("tau", threshold)
        if training:
            self._new_ratios.append(ratios)
        self._record_routing(router_logits.detach(), labels)
        return router_cross_entropy(router_logits, labels, num_tiles)

    @torch.no_grad()
    def _record_routing(self, router_logits: torch.Tensor, labels: torch.Tensor) -> None:
        num_tiles = len(labels)
        compress = router_logits.argmax(-1) == 0
        config = self.unwrap(self.model).config
        saved = 1 - config.compressed_seq_length / config.image_seq_length
        self.record("router_entropy", router_entropy(router_logits), num_tiles)
        self.record("compressed_tiles", compress.float().mean(), num_tiles)
        self.record("kept_tokens", 1 - saved * compress.float().mean(), num_tiles)
        labelled = labels != IGNORE_INDEX
        num_labelled = int(labelled.sum())
        if num_labelled:
            self.record("compress_labels", (labels[labelled] == 0).float().mean(), num_labelled)
            self.record("router_accuracy", (compress == (labels == 0))[labelled].float().mean(), num_labelled)

    def _close_step(self) -> None:
        """Move the ratios of the optimizer step into the window, in the same order on every process."""
        new_ratios = torch.cat(self._new_ratios).cpu() if self._new_ratios else torch.zeros(0)
        self._new_ratios = []
        values = new_ratios[~new_ratios.isnan()].tolist()
        if self.args.world_size > 1:
            values = gather_object(values)
        self.ratio_window.update(values)

    def route_and_probe(
        self, model: nn.Module, responses: Responses, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Router logits `(T, 2)` with their graph, and ratios `(T,)`, from one run of the tower."""
        own = self.unwrap(model)
        reference_logits = None
        with torch.no_grad():
            if self.reference_model is not None:
                reference_inputs = {**inputs, "vtc_budget": "full"}
                reference_logits, _ = self.response_logits(self.reference_model, responses, reference_inputs)
            pixel_values = inputs.pop("pixel_values")
            features = self.in_forward(model, lambda: own.model.encode(pixel_values))
        inputs["image_features"] = features
        # a budget of 1.0 compresses nothing, like "full", but lets the router speak; the rest of the model is frozen,
        # so only the router keeps a graph
        full_logits, outputs = self.response_logits(model, responses, {**inputs, "vtc_budget": 1.0})
        with torch.no_grad():
            full_losses = self.row_losses(full_logits.detach(), responses, reference_logits)
            ratios = self.tile_ratios(own, responses, inputs, full_losses, reference_logits)
        return outputs.router_logits, ratios

    def row_losses(
        self, logits: torch.Tensor, responses: Responses, reference_logits: torch.Tensor | None
    ) -> torch.Tensor:
        """The loss of each sample, `(B,)`: mean over its response tokens, NaN where it has none."""
        if self.ratio_loss == "kl":
            values = token_kl(reference_logits, logits)
        else:
            values = token_cross_entropy(logits, responses.targets)
        return mean_per_row(values, responses.row_idx, responses.num_rows)

    def tile_ratios(
        self,
        model: PreTrainedModel,
        responses: Responses,
        inputs: dict[str, Any],
        full_losses: torch.Tensor,
        reference_logits: torch.Tensor | None,
    ) -> torch.Tensor:
        """Measure the ratio of every tile.

        Args:
            model ([`PreTrainedModel`]): our own model, not a wrapper: nothing here has a gradient.
            responses (`Responses`): supervised tokens of the batch.
            inputs (`dict`): arguments of `forward` without labels, with `image_features` `(T, N, C)`.
            full_losses (`torch.Tensor` of shape `(B,)`): loss per sample with nothing compressed.
            reference_logits (`torch.Tensor` of shape `(N, V)`, *optional*): of the reference, for `ratio_loss="kl"`.

        Returns:
            `torch.Tensor` of shape `(T,)`, float32; NaN for the tiles of a sample without response tokens.
        """
        rows = tile_rows(inputs["input_ids"], model.config.image_token_id, model.config.image_seq_length)
        if self.probe == "all_tiles":
            everything = {**inputs, "router_decisions": torch.ones(len(rows), dtype=torch.bool)}
            logits, _ = self.response_logits(model, responses, everything)
            compressed_losses = self.row_losses(logits, responses, reference_logits)[rows]
        else:
            size = self.probe_batch_size or responses.num_rows
            losses = []
            for tiles in torch.arange(len(rows)).split(size):
                losses.append(self.probe_tiles(model, responses, inputs, rows, tiles.tolist(), reference_logits))
            compressed_losses = torch.cat(losses)
        return loss_ratio(compressed_losses, full_losses[rows], self.ratio_eps)

    def probe_tiles(
        self,
        model: PreTrainedModel,
        responses: Responses,
        inputs: dict[str, Any],
        rows: list[int],
        tiles: list[int],
        reference_logits: torch.Tensor | None,
    ) -> torch.Tensor:
        """Losses `(len(tiles),)` of the samples of `tiles`, each with that one tile compressed and all others full."""
        probed_rows = [rows[tile] for tile in tiles]
        tiles_of_row = {row: [tile for tile, owner in enumerate(rows) if owner == row] for row in set(probed_rows)}
        decisions = [other == tile for tile, row in zip(tiles, probed_rows) for other in tiles_of_row[row]]
        sources = [other for row in probed_rows for other in tiles_of_row[row]]
        # without `num_tiles` a run of placeholders counts as one image, which is all that a forced decision needs
        probe_inputs = {
            "input_ids": inputs["input_ids"][probed_rows],
            "attention_mask": inputs["attention_mask"][probed_rows],
            "image_features": inputs["image_features"][sources],
            "router_decisions": torch.tensor(decisions),
        }
        probed = responses.select(probed_rows)
        logits, _ = self.response_logits(model, probed, probe_inputs)
        if reference_logits is not None:
            reference_logits = reference_logits[responses.tokens_of(probed_rows)]
        return self.row_losses(logits, probed, reference_logits)
