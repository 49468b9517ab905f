"""AVG-LLaVA: training at all granularities (stage 3), and of the router by ranking them (stage 4, RGLF).

Paper: arXiv 2410.02745. Upstream: DeepLearnXMU/AVG-LLaVA@3685bc8, `llava/model/language_model/llava_llama.py`
(Apache-2.0). Ours: the vision tower runs once per step, and in stage 3 one granularity's graph exists at a time;
losses and gradients are those of the released code.
"""

from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from ..methods import record_of
from ..models.layout_vtc import Layout
from ..models.prompt_vtc import VisionInputs, asked_tokens, supervised_tokens
from ..models.vision_vtc import Features
from .base import VtcTrainer, freeze, train_router_alone
from .losses import (
    best_granularity_loss,
    granularity_ranking_loss,
    mean_per_row,
    router_entropy,
    token_cross_entropy,
)
from .responses import Responses
from .sharding import PIXELS as _PIXELS
from .sharding import black_tile, shows_images

_VISION = VisionInputs.__dataclass_fields__.keys()


def images_in(batch: dict[str, Any]) -> int:
    """Images of a batch from the processor, and frames of its videos, for each of which a router decides."""
    told = (batch.get(name) for name in ("num_tiles", "image_sizes", "image_grid_thw"))
    videos = batch.get("video_grid_thw")
    num_frames = 0 if videos is None else int(videos[:, 0].sum())
    return next((len(sizes) for sizes in told if sizes is not None), 0) + num_frames


def encoded(base: nn.Module, inputs: dict[str, Any]) -> Features:
    """Features of all images of a batch."""
    if base.config.grid_base is None:
        return base.encode(inputs["pixel_values"])
    return base.encode_of(*_shown(base, inputs))


def _shown(base: nn.Module, inputs: dict[str, Any]) -> tuple[VisionInputs, Layout]:
    """Images and videos of a batch without compression, and where they are."""
    undecided = _VISION - {"image_features", "vtc_budget", "router_decisions"}
    vision = VisionInputs(**{name: inputs.get(name) for name in undecided}, vtc_budget="full")
    prompt = inputs.get("input_ids"), inputs.get("inputs_embeds")
    _, mask = base.find_placeholders(*prompt)
    videos = base.find_videos(*prompt) if vision.has_videos else None
    return vision, base.layout_of(mask, inputs.get("attention_mask"), vision, video_mask=videos)


class AvgLlavaGranularityTrainer(VtcTrainer):
    """AVG-LLaVA stage 3: the same answers from every granularity.

    The loss is the mean over granularities of the next-token loss with all images at that granularity. One after the
    other runs forward and backward, so that memory is that of one granularity; gradients are those of the mean. The
    router is frozen and does not run; `config.router_select` is off until `AvgLlavaRouterTrainer` switches it on.

    Args:
        model ([`PreTrainedModel`]): an `AvgLlavaForConditionalGeneration`, or a `PeftModel` around one.
        args (`TrainingArguments`, *optional*): see `VtcTrainer`.
        train_vision_tower (`bool`): whether the tower learns too, as the paper says. The released code runs it without
            gradients, whatever its flags say, so the default is False. A tower that has its connectors in it learns
            in these alone then, and not beside adapters.
        kwargs: the other arguments of `transformers.Trainer`.

    Raises:
        ValueError: `train_vision_tower` under DeepSpeed.
    """

    without_effect = ("use_liger_kernel",)

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: TrainingArguments | None = None,
        *,
        train_vision_tower: bool = False,
        **kwargs: Any,
    ):
        freeze(model, "router", *(() if train_vision_tower else ("vision_tower",)))
        if model.config.grid_base is not None and not isinstance(model, PeftModel):
            for name in connectors_taught(model.config):
                model.get_submodule(name).requires_grad_(True)
        # a PeftModel hands it on
        model.config.router_select = False
        super().__init__(model, args, **kwargs)
        self.train_vision_tower = train_vision_tower or model.config.grid_base is not None
        if self.train_vision_tower and self.is_deepspeed_enabled:
            raise ValueError(
                "`train_vision_tower`, or connectors in the tower, do not work under DeepSpeed, which loses part of "
                "the gradients of the tower. Use FSDP2 (examples/accelerate/fsdp2.yaml) or DDP, or leave it frozen."
            )

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One forward and one backward pass per granularity, on features of one run of the tower."""
        inputs = self._prepare_inputs(inputs)
        num_passes = len(self.unwrap(model).config.vis_token_granularity)
        if not shows_images(inputs) and self.args.world_size == 1:
            # all granularities of text are one; several processes must make the same passes
            return super().training_step(model, inputs, num_items_in_batch)
        features = self._encode(model, inputs)
        # the tower's backward pass belongs to the last granularity, with what the others have left at the features
        detached = None if features is None else _detached(features)
        inputs = {name: value for name, value in inputs.items() if name not in _PIXELS}
        sync, total = self.accelerator.sync_gradients, 0
        for idx in range(num_passes):
            is_last = idx == num_passes - 1
            if features is not None:
                inputs["image_features"] = features if is_last else detached
            # as Trainer does between micro-batches
            self.accelerator.gradient_state._set_sync_gradients(sync and is_last)
            alone = not is_last and self.accelerator.distributed_type != DistributedType.DEEPSPEED
            with self.accelerator.no_sync(model) if alone else nullcontext():
                total = total + super().training_step(model, {**inputs, "granularity_idx": idx}, num_items_in_batch)
        return total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict]:
        """Mean over granularities of the next-token loss; with `granularity_idx`, the share of that one."""
        inputs = dict(inputs)
        responses = Responses.from_labels(inputs.pop("labels"))
        scales = self.unwrap(model).config.vis_token_granularity
        # Trainer switches the whole model to training mode before each step, in which the router would speak
        self.unwrap(model).model.router.eval()
        idx, num_images = inputs.pop("granularity_idx", None), images_in(inputs)
        if shows_images(inputs):
            inputs["image_features"] = self._encode(model, inputs)
            for name in _PIXELS:
                inputs.pop(name, None)
        if idx is None and num_images == 0:
            loss, _ = self.next_token_loss(model, responses, inputs, num_items_in_batch)
        else:
            chosen = range(len(scales)) if idx is None else [idx]
            losses = []
            for each in chosen:
                override = {"router_decisions": torch.full((num_images,), each)} if num_images else {}
                losses.append(self.next_token_loss(model, responses, inputs | override, num_items_in_batch)[0])
                self._record_loss(f"loss_{scales[each]}", losses[-1], responses, num_items_in_batch)
            loss = torch.stack(losses).sum() / len(scales)
        loss = self.across_processes(loss, num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def _encode(self, model: nn.Module, inputs: dict[str, Any]) -> Features | None:
        """Features of all tiles of a batch, None for text."""
        if not shows_images(inputs):
            return None
        with_gradients = self.train_vision_tower and torch.is_grad_enabled()
        base = self.unwrap(model).model
        with torch.set_grad_enabled(with_gradients), self.compute_loss_context_manager():
            return self.in_forward(model, lambda: encoded(base, inputs))

    def _record_loss(
        self,
        name: str,
        loss: torch.Tensor,
        responses: Responses,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> None:
        num_tokens = len(responses.targets)
        if num_tokens:
            num_items = num_tokens if num_items_in_batch is None else num_items_in_batch
            self.record(name, loss.detach() * num_items / num_tokens, num_tokens)


def connectors_taught(config: Any) -> list[str]:
    """Names of the connectors of a model: those of its compressor that the loss of the language model reaches."""
    record = record_of(config)
    return [name for name in record.compressor(config) if name not in record.untaught]


def _detached(features: Features) -> Features:
    """The same values without their graph, whose gradients are added to those that reach `features` themselves."""
    if isinstance(features, dict):
        return {name: _detached(each) for name, each in features.items()}
    copy = features.detach().requires_grad_(features.requires_grad)
    if features.requires_grad:
        features.register_hook(lambda gradient: gradient + copy.grad)
    return copy


class AvgLlavaRouterTrainer(VtcTrainer):
    """AVG-LLaVA stage 4, RGLF: the router learns to rank granularities as the losses of their answers rank.

    For each granularity, the loss of the answers is measured without gradients, as a mean over the tokens of a sample.
    The router learns the best one by cross-entropy and the order of all by a ranking loss whose margins grow with the
    differences between the losses. It reads the instructions, never the answers. Nothing else trains, and everything
    else stays in eval mode. `config.router_select` is switched on.

    Per step the tower runs once and the language model once per granularity. Where a wrapper or shards need a forward
    pass of the model, it runs a last time, at the coarsest, on the instructions, behind the router.

    All images of a sample get the ranking of that sample. Samples without an image or without an answer teach nothing;
    upstream gives text a black image, whose equal losses push the router towards the coarsest granularity.

    Args:
        model ([`PreTrainedModel`]): an `AvgLlavaForConditionalGeneration` after stage 3, with any adapter merged.
        args (`TrainingArguments`, *optional*): see `VtcTrainer`.
        margin (`float`): of the ranking loss, times the difference of two losses. Released: 1.
        ce_loss_weight (`float`): weight of the cross-entropy. Released: 0.1.
        rank_loss_weight (`float`): weight of the ranking loss. Released: 1.
        ranking (`str`): `"released"` or `"paper"`, see `granularity_ranking_loss`.
        loss_tolerance (`float`): nats per token by which a granularity may be worse than the best and still count as
            equal to it; of equal ones the coarsest comes first. Ours: without it, as released (0), noise ranks the
            granularities of a question that all of them answer, and nothing asks for fewer tokens.
        kwargs: the other arguments of `transformers.Trainer`.

    Raises:
        ValueError: a number is negative, `ranking` is unknown, or `model` is a `PeftModel`.
    """

    # noise is for decoders that train
    without_effect = (*VtcTrainer.without_effect, "neftune_noise_alpha")

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments | None = None,
        *,
        margin: float = 1.0,
        ce_loss_weight: float = 0.1,
        rank_loss_weight: float = 1.0,
        ranking: str = "released",
        loss_tolerance: float = 0.0,
        **kwargs: Any,
    ):
        for name, value in (
            ("margin", margin),
            ("ce_loss_weight", ce_loss_weight),
            ("rank_loss_weight", rank_loss_weight),
            ("loss_tolerance", loss_tolerance),
        ):
            if value < 0:
                raise ValueError(f"`{name}` must not be negative, got {value}.")
        if ranking not in ("released", "paper"):
            raise ValueError(f"`ranking` must be 'released' or 'paper', got {ranking!r}.")
        train_router_alone(model)
        model.config.router_select = True
        super().__init__(model, args, **kwargs)
        self.margin = margin
        self.ce_loss_weight = ce_loss_weight
        self.rank_loss_weight = rank_loss_weight
        self.ranking = ranking
        self.loss_tolerance = loss_tolerance

    def count_items(self, batches: list[dict[str, Any]]) -> int:
        """Images."""
        return sum(images_in(batch) for batch in batches)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict]:
        """Cross-entropy and ranking loss of the router on losses measured in this batch; see the class."""
        training = model.training
        # evaluation counts tokens, not images
        num_images = num_items_in_batch if training else None
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        # Trainer switches the whole model to training mode before each step
        model.eval()
        if shows_images(inputs):
            losses, image_rows = self.measure(self.unwrap(model), labels, inputs)
            router_logits = self.route(model, labels, inputs, training)
            loss = self.router_loss(router_logits, losses[image_rows], num_images)
        else:
            # text has nothing to teach, but the router takes part with weight zero, as on every other process
            loss = 0 * self._run_router(model, black_tile(self.unwrap(model)), training).sum()
        loss = self.across_processes(loss, num_images)
        return (loss, {}) if return_outputs else loss

    @torch.no_grad()
    def measure(
        self, model: PreTrainedModel, labels: torch.Tensor, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, list[int]]:
        """The loss of each sample at each granularity.

        Args:
            model ([`PreTrainedModel`]): our own model, not a wrapper, in eval mode: nothing here has a gradient.
            labels (`torch.Tensor` of shape `(B, L)`): -100 where nothing is supervised.
            inputs (`dict`): arguments of `forward`; `image_features` replace its `pixel_values`.

        Returns:
            `(B, E)`, means over the supervised tokens, NaN for a sample without; and the sample of each image.
        """
        responses = Responses.from_labels(labels)
        images = dict(inputs)
        for name in _PIXELS:
            inputs.pop(name, None)
        inputs["image_features"] = self.in_forward(model, lambda: encoded(model.model, images))
        losses = []
        for idx in range(len(model.config.vis_token_granularity)):
            decisions = torch.full((images_in(inputs),), idx)
            logits, _ = self.response_logits(model, responses, {**inputs, "router_decisions": decisions})
            token_losses = token_cross_entropy(logits, responses.targets)
            losses.append(mean_per_row(token_losses, responses.row_idx, responses.num_rows))
        return torch.stack(losses, dim=1), _shown(model.model, images)[1].rows

    def route(self, model: nn.Module, labels: torch.Tensor, inputs: dict[str, Any], training: bool) -> torch.Tensor:
        """Router logits `(num_images, E)` with their graph, from a prompt without its answers."""
        return self._run_router(
            model, without_answers(inputs, labels, self.unwrap(model).config.placeholder_ids), training
        )

    def _run_router(self, model: nn.Module, inputs: dict[str, Any], training: bool) -> torch.Tensor:
        own = self.unwrap(model)
        # in training mode it speaks although its decision is not asked for, and drops out as it should
        own.model.router.train(training)
        if training:
            inputs = {**inputs, "router_decisions": torch.zeros(images_in(inputs), dtype=torch.long)}
        if model is own and not self.is_sharded:
            # what stands before the language model is enough where nobody waits for a forward pass
            vision = VisionInputs(**{name: inputs[name] for name in _VISION & inputs.keys()})
            with self.accelerator.autocast():
                found = own.model.compress_prompt(inputs["input_ids"], vision, inputs.get("attention_mask"))
        else:
            found = model(**inputs, logits_to_keep=1, use_cache=False)
        own.model.router.eval()
        return found.router_logits

    def router_loss(
        self, router_logits: torch.Tensor, losses: torch.Tensor, num_images: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """From router logits `(num_images, E)` and the losses of each image's sample `(num_images, E)` to the loss."""
        known = ~losses.isnan().any(1)
        if not bool(known.any()):
            return 0 * router_logits.sum()
        router_logits, losses = router_logits[known], losses[known]
        losses = torch.maximum(losses - self.loss_tolerance, losses.min(1, keepdim=True).values)
        cross_entropy = best_granularity_loss(router_logits, losses, num_images)
        ranking = granularity_ranking_loss(router_logits, losses, self.margin, self.ranking, num_images)
        self._record_routing(router_logits.detach(), losses)
        return self.ce_loss_weight * cross_entropy + self.rank_loss_weight * ranking

    def _record_routing(self, router_logits: torch.Tensor, losses: torch.Tensor) -> None:
        num_images, chosen = len(losses), router_logits.argmax(1)
        config = self.unwrap(self.model).config
        scales = torch.tensor(config.vis_token_granularity, device=chosen.device)
        self.record("router_entropy", router_entropy(router_logits), num_images)
        self.record("router_accuracy", (chosen == losses.argmin(1)).float().mean(), num_images)
        # how much worse the chosen granularity is than the best, in nats per token
        regret = losses.gather(1, chosen[:, None])[:, 0] - losses.min(1).values
        self.record("router_regret", regret.mean(), num_images)
        self.record("kept_tokens", (scales[chosen] / config.finest_granularity).mean(), num_images)
        for idx, scale in enumerate(scales.tolist()):
            self.record(f"chosen_{scale}", (chosen == idx).float().mean(), num_images)


def without_answers(inputs: dict[str, Any], labels: torch.Tensor, placeholder_ids: tuple[int, ...]) -> dict[str, Any]:
    """The prompts of a batch as a model is asked, by `asked_tokens` for `labels` `(B, L)`, padded on the right."""
    mask = inputs.get("attention_mask")
    real = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool()
    is_placeholder = torch.isin(inputs["input_ids"], torch.tensor(placeholder_ids, device=labels.device))
    # images stay, wherever they stand
    asked = asked_tokens(supervised_tokens(labels) & ~is_placeholder, real) | is_placeholder
    rows = [ids[kept] for ids, kept in zip(inputs["input_ids"], asked, strict=True)]
    # padding must not look like an image
    padding = next(token_id for token_id in range(3) if token_id not in placeholder_ids)
    lengths = torch.tensor([len(row) for row in rows], device=labels.device)
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
    mask = torch.arange(input_ids.shape[1], device=labels.device) < lengths[:, None]
    return {**inputs, "input_ids": input_ids, "attention_mask": mask.long()}
