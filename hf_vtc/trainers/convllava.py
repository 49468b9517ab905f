"""ConvLLaVA: next-token training in three stages, each of which trains other parts of tower and language model.

Paper: arXiv 2405.15738, section 4.1 and tables 14 and 15. Scripts: alibaba/conv-llava@3e7ae57 `scripts/stage_*.sh`.
All stages run one epoch of AdamW at the target resolution, cosine schedule, warm-up 0.03, no weight decay, sequences
of 2048 tokens, one learning rate for all parts; what differs is in `RECIPES`.
"""

from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from .base import VtcTrainer
from .responses import Responses


class Recipe(NamedTuple):
    """Published values of a stage.

    Args:
        learning_rate (`float`): peak; table 14. `stage_2.sh` says 1e-3, against the paper and its own README.
        batch_size (`int`): samples of one optimizer step, over all processes; table 14.
        tower_stages (`int`): stages of the tower that train, counted from the end; table 15.
        language_model (`bool`): whether the language model trains, head and embeddings included; table 15.
    """

    learning_rate: float
    batch_size: int
    tower_stages: int
    language_model: bool


RECIPES = {
    # projector initialisation: the new stage and the projector, on captions
    1: Recipe(3e-4, 256, tower_stages=1, language_model=False),
    # vision-language pretraining
    2: Recipe(2e-5, 256, tower_stages=3, language_model=True),
    # instruction tuning, the tower frozen
    3: Recipe(2e-5, 128, tower_stages=0, language_model=True),
}


def add_stage(model: PreTrainedModel, num_blocks: int = 6, width: int = 3072) -> None:
    """Append a stage to the tower of a ConvLLaVA model in place, with a new projector behind it: where stage 1 starts.

    Values as in the original, which leaves PyTorch's own: uniform in +-1/sqrt(fan_in) for convolutions, linear layers
    and their biases. The layer scale is `layer_scale_init_value`, so that the new blocks start close to the identity.

    Args:
        model ([`PreTrainedModel`]): a `ConvllavaForConditionalGeneration`, with four stages in the paper.
        num_blocks (`int`): blocks of the new stage.
        width (`int`): channels of the new stage.

    Source: alibaba/conv-llava@3e7ae57 `add_stage` of `convnext_encoder.py`.
    """
    config, tower = model.config, model.model.vision_tower
    vision = config.vision_config.to_dict()
    for name in ("num_stages", "stage_names", "out_features", "out_indices", "hidden_size"):
        vision.pop(name, None)
    vision |= {"depths": [*vision["depths"], num_blocks], "hidden_sizes": [*vision["hidden_sizes"], width]}
    grown = type(config)(vision, config.text_config, projector_hidden_act=config.projector_hidden_act)

    # the classes of this model, which are not the installed ones if it was loaded by remote code
    stages, projector = tower.encoder.stages, model.model.multi_modal_projector
    stage = type(stages[-1])(grown.vision_config, config.vision_config.hidden_size, width, [0.0] * num_blocks)
    projector = type(projector)(grown, [config.text_config.hidden_size] * 2)
    stages.append(stage.to(model.device, model.dtype))
    model.model.multi_modal_projector = projector.to(model.device, model.dtype)
    tower.config = grown.vision_config
    for owner in (config, model.model.config):
        owner.vision_config = grown.vision_config
        owner.image_seq_length = grown.image_seq_length


def set_trainable(
    model: PreTrainedModel,
    recipe: Recipe,
    first_block: int = 0,
    freeze_lm_head: bool = True,
) -> None:
    """Say which parameters of a model train, by their `requires_grad`.

    Args:
        model ([`PreTrainedModel`]): a `ConvllavaForConditionalGeneration`.
        recipe (`Recipe`): which parts; the projector trains in every stage.
        first_block (`int`): of the first stage that trains, the first block that does. Above 0 the downsampling layer
            of that stage stays frozen (`tune_vit_from_layer` and `layer_index` upstream).
        freeze_lm_head (`bool`): whether the head stays as it is where the language model does, as table 15 says. The
            released scripts freeze the decoder only, and train the head: `False`.

    Raises:
        ValueError: the tower has no such stage or block.
    """
    stages = model.model.vision_tower.encoder.stages
    if not 0 <= recipe.tower_stages <= len(stages):
        raise ValueError(f"`tower_stages` must be 0 to {len(stages)}, the stages of the tower: {recipe.tower_stages}.")
    trained = stages[len(stages) - recipe.tower_stages :]
    depth = len(trained[0].layers) if len(trained) > 0 else 1
    if not 0 <= first_block < depth:
        raise ValueError(f"`first_block` must be 0 to {depth - 1}, a block of the first trained stage: {first_block}.")
    model.requires_grad_(False)
    trained.requires_grad_(True)
    if first_block > 0:
        trained[0].downsampling_layer.requires_grad_(False)
        trained[0].layers[:first_block].requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if not freeze_lm_head:
        model.get_output_embeddings().requires_grad_(True)
    if recipe.language_model:
        model.get_decoder().requires_grad_(True)
        model.get_output_embeddings().requires_grad_(True)


class ConvllavaTrainer(VtcTrainer):
    """Next-token loss on what one of the three stages trains.

    | stage | tower | projector | language model |
    |---|---|---|---|
    | 1 | last stage, the new one | trains | frozen, head included |
    | 2 | last three stages | trains | trains |
    | 3 | frozen | trains | trains |

    Stem and earlier stages never train. Learning rate, batch size and the rest are those of `args`; `RECIPES` holds
    the published ones. With `gradient_checkpointing=True` the tower keeps the maps between its stages only, which the
    original could not.

    Args:
        model ([`PreTrainedModel`]): a `ConvllavaForConditionalGeneration`; before stage 1 see `add_stage`. With a
            `PeftModel` the adapter decides what trains.
        args (`TrainingArguments`, *optional*): see `VtcTrainer`.
        stage (`int`): 1, 2 or 3.
        tower_stages (`int`, *optional*): stages of the tower that train, counted from the end, in place of those of
            the table. The paper's ablations train the last one to four.
        first_block (`int`): of the first stage that trains, the first block that does, see `set_trainable`.
        freeze_lm_head (`bool`): in stage 1, see `set_trainable`.
        kwargs: the other arguments of `transformers.Trainer`.

    Raises:
        ValueError: `stage` is none of these, or the tower has no such stages or blocks.
    """

    without_effect = ("use_liger_kernel",)

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: TrainingArguments | None = None,
        *,
        stage: int,
        tower_stages: int | None = None,
        first_block: int = 0,
        freeze_lm_head: bool = True,
        **kwargs: Any,
    ):
        if stage not in RECIPES:
            raise ValueError(f"`stage` must be 1, 2 or 3, got {stage!r}.")
        recipe = RECIPES[stage]
        if tower_stages is not None:
            recipe = recipe._replace(tower_stages=tower_stages)
        if not isinstance(model, PeftModel):
            set_trainable(model, recipe, first_block, freeze_lm_head)
        super().__init__(model, args, **kwargs)
        self.stage = stage

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict]:
        """Next-token loss over the supervised tokens."""
        inputs = dict(inputs)
        responses = Responses.from_labels(inputs.pop("labels"))
        loss, outputs = self.next_token_loss(model, responses, inputs, num_items_in_batch)
        self.record_visual_tokens(outputs)
        loss = self.across_processes(loss, num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss
