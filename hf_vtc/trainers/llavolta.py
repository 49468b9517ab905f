"""LLaVolta: one epoch of instruction tuning that goes from heavy compression to none.

Paper: arXiv 2406.20092, section 3.3; recipe: Beckschen/LLaVolta@31ec151 `scripts/v1_5/train-4stage.sh` (finetuning:
LLM and projector train at 2e-5, cosine, warm-up 0.03, weight decay 0, global batch 128, the tower is frozen).
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..methods import record_of
from .base import VtcTrainer
from .responses import Responses
from .schedule import Stage, check_stages, stage_at, stages_of


class LlavoltaTrainer(VtcTrainer):
    """Next-token training with a compression schedule; nothing but the compression changes between stages.

    The stage is a function of the optimizer step alone, so a resumed run goes on where it was, gradient accumulation
    and evaluation do not move it, and every process has the same one. Evaluation runs at the stage of its moment
    unless it is given a `vtc_budget`. After the last step the config holds the last stage: with the published schemes
    none, a plain LLaVA model. For the released code's own counting, one forward pass late, see
    `schedule.released_stage`.

    Args:
        model ([`PreTrainedModel`]): a `LlavoltaForConditionalGeneration`, or a `PeftModel` around one.
        args (`TrainingArguments`, *optional*): see `VtcTrainer`.
        scheme (`str`, *optional*): a published scheme, one of `schedule.SCHEMES`; `"four_deeper_wider"` has the best
            average. Default if no `stages` are given.
        stages (`Sequence[Stage]`, *optional*): a schedule of your own.
        train_vision_tower (`bool`): the paper freezes the tower.
        kwargs: the other arguments of `transformers.Trainer`.

    Raises:
        ValueError: scheme or stages do not fit the decoder, or both are given.
    """

    without_effect = ("use_liger_kernel",)

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: TrainingArguments | None = None,
        *,
        scheme: str | None = None,
        stages: Sequence[Stage] | None = None,
        train_vision_tower: bool = False,
        **kwargs: Any,
    ):
        if scheme is not None and stages is not None:
            raise ValueError("Give `scheme` or `stages`, not both.")
        own = model.get_base_model() if isinstance(model, PeftModel) else model
        if stages is None:
            stages = stages_of(scheme or "four_deeper_wider", own.config.text_config.num_hidden_layers)
        check_stages(stages)
        before = own.config.compress_layer_idx, own.config.compress_stride
        for stage in stages:
            # fails now rather than in the middle of a training
            own.config.set_compression(stage.layer_idx, stage.stride)
        own.config.set_compression(*before)
        if not train_vision_tower and not isinstance(model, PeftModel):
            own.model.vision_tower.requires_grad_(False)
            for name in record_of(own.config).need("compressor", "training")(own.config):
                # the connector, which is in the tower of some bases
                own.get_submodule(name).requires_grad_(True)
        super().__init__(model, args, **kwargs)
        self.stages = [Stage(*stage) for stage in stages]
        self.add_callback(_StageCallback(self))

    def set_stage(self, step: int, total_steps: int) -> None:
        """Compress as optimizer step `step`, counted from 0, of `total_steps` does."""
        stage = self.stages[stage_at(self.stages, step, total_steps)]
        self.unwrap(self.model).config.set_compression(stage.layer_idx, stage.stride)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict]:
        """Next-token loss over the supervised tokens, as many at every stage."""
        inputs = dict(inputs)
        responses = Responses.from_labels(inputs.pop("labels"))
        loss, outputs = self.next_token_loss(model, responses, inputs, num_items_in_batch)
        self.record_visual_tokens(outputs)
        loss = self.across_processes(loss, num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss


class _StageCallback(TrainerCallback):
    """Sets the stage before every optimizer step; `global_step` comes back with a resumed run."""

    def __init__(self, trainer: LlavoltaTrainer):
        self.trainer = trainer

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.set_stage(state.global_step, state.max_steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # a run that was resumed at its end has had no step of its own
        self.trainer.set_stage(max(state.global_step - 1, 0), state.max_steps)
