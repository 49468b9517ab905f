"""VisToG: two-stage training of semantic tokens, grouping layer, projector and language model.

Paper: arXiv 2411.17773. What is known of its training: stage 1 aligns image features with the language model, stage 2
tunes grouping layer, connector and language model. No recipe is public: objective and values are those of LLaVA-1.5,
and every choice here is ours.
"""

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from .base import VtcTrainer, require_method
from .responses import Responses

GROUPING_PARTS = ("model.semantic_tokens", "model.grouping")


def group_usage(group_idx: torch.Tensor, num_groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How evenly tiles use their groups.

    Args:
        group_idx (`torch.LongTensor` of shape `(T, N)`): the group of each patch.
        num_groups (`int`): G.

    Returns:
        Groups with at least one patch `(T,)`, and the entropy of the shares of patches `(T,)` in nats: 0 where one
        group took all, log G where all are equal. Both float32.
    """
    shares = nn.functional.one_hot(group_idx, num_groups).float().mean(1)  # (T, G)
    return (shares > 0).float().sum(1), torch.special.entr(shares).sum(1)


def trainable_parts(stage: int, grouping: bool) -> tuple[str, ...]:
    """Names of the modules that a stage trains; the tower never does.

    Args:
        stage (`int`): 1 or 2.
        grouping (`bool`): whether images are grouped; if not, nothing that groups is trained.
    """
    parts = ("model.multi_modal_projector", *(GROUPING_PARTS if grouping else ()))
    return parts if stage == 1 else (*parts, "model.language_model", "lm_head")


class VistogTrainer(VtcTrainer):
    """Next-token loss on what one of the two stages trains; no auxiliary loss.

    Stage 1 trains the projector, and unless `stage1_grouping` is False the semantic tokens and the grouping layer;
    without grouping the projector sees every patch. Stage 2 trains the language model as well. The vision tower is
    frozen in both and stays in eval mode; the gradient reaches the semantic tokens through its weights. LLaVA-1.5's
    values: 558k captions, learning rate 1e-3, batch 256 in stage 1; 665k conversations, 2e-5, batch 128 in stage 2;
    cosine schedule, 3 % of the steps as warm-up.

    Hard assignment can collapse, against which only the noise works. Hence the metrics: `used_groups` per tile and
    `group_entropy` in nats, see `group_usage`.

    Args:
        model ([`PreTrainedModel`]): a `VistogForConditionalGeneration`. With a `PeftModel` (stage 2 only) the adapter
            decides what trains: give it `modules_to_save` for semantic tokens, grouping layer and projector.
        args (`TrainingArguments`, *optional*): see `VtcTrainer`.
        stage (`int`): 1 or 2.
        grouping (`bool`, *optional*): whether images are grouped. Default: what `stage1_grouping` of the config says
            in stage 1, and True in stage 2. A stage 2 without grouping trains the uncompressed model to compare with.
        kwargs: the other arguments of `transformers.Trainer`.

    Raises:
        ValueError: `stage` is neither 1 nor 2, the model is of another method, or stage 1 is to train a `PeftModel`.
    """

    without_effect = ("use_liger_kernel",)

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: TrainingArguments | None = None,
        *,
        stage: int,
        grouping: bool | None = None,
        **kwargs: Any,
    ):
        if stage not in (1, 2):
            raise ValueError(f"`stage` must be 1 (alignment) or 2 (instruction tuning), got {stage!r}.")
        require_method(type(self), model)
        if grouping is None:
            grouping = stage == 2 or model.config.stage1_grouping
        self.stage = stage
        self.grouping = grouping
        if isinstance(model, PeftModel):
            if stage == 1:
                raise ValueError(
                    "`model` must not be a `PeftModel` in stage 1, which leaves the language model as it is. Add the "
                    "adapter for stage 2."
                )
        else:
            parts = tuple(f"{part}." for part in trainable_parts(stage, self.grouping))
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith(parts))
        super().__init__(model, args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Next-token loss with every image grouped, or with none."""
        # Trainer switches the whole model to training mode before each step
        self.unwrap(model).model.vision_tower.eval()
        inputs = {**inputs, "vtc_budget": "auto" if self.grouping else "full"}
        responses = Responses.from_labels(inputs.pop("labels"))
        loss, outputs = self.next_token_loss(model, responses, inputs, num_items_in_batch)
        self.record_visual_tokens(outputs)
        if self.grouping and outputs.router_decisions is not None:
            self._record_usage(outputs.router_decisions)
        loss = self.across_processes(loss, num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    @torch.no_grad()
    def _record_usage(self, group_idx: torch.Tensor) -> None:
        used, entropy = group_usage(group_idx, self.model.config.num_semantic_tokens)
        self.record("used_groups", used.mean(), len(group_idx))
        self.record("group_entropy", entropy.mean(), len(group_idx))
