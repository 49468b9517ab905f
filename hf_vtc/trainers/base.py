"""What the trainers of all methods share: the next-token loss, scaling, metrics, and draws that survive resume."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from ..methods import RECORDS, record_of
from .losses import mean_over_items, token_cross_entropy
from .responses import Responses
from .sharding import ShardedTrainer

# arguments of `Trainer` whose place is taken, and what takes it
_TAKEN = {
    "compute_loss_func": "the loss is that of the trainer",
    "compute_metrics": "evaluation makes no logits, which would be as long as all prompts. Read `eval_loss`",
    "preprocess_logits_for_metrics": "evaluation makes no logits, which would be as long as all prompts",
}


def freeze(model: nn.Module, *parts: str) -> None:
    """Freeze every parameter that has one of `parts` in its dotted name, inside of a `PeftModel` too."""
    for name, parameter in model.named_parameters():
        if set(parts) & set(name.split(".")):
            parameter.requires_grad_(False)


def train_router_alone(model: PreTrainedModel) -> None:
    """Say by `requires_grad` that the router of a model trains, and nothing else.

    Raises:
        ValueError: `model` is a `PeftModel`.
    """
    if isinstance(model, PeftModel):
        raise ValueError(
            "`model` must not be a `PeftModel`, since the router trains as it is. Call `model.merge_and_unload()`."
        )
    model.requires_grad_(False)
    model.model.router.requires_grad_(True)


def require_method(trainer: type, model: PreTrainedModel | PeftModel) -> None:
    """Refuse to train a model by the objective of another method; subclasses of such a trainer included.

    Raises:
        ValueError: records name the trainer, but not that of the model's method.
    """
    names = {each.__name__ for each in trainer.__mro__}
    owners = [record.name for record in RECORDS.values() if names & set(record.trainers or ())]
    if owners and record_of(model.config).name not in owners:
        raise ValueError(
            f"`model` of a {trainer.__name__} must be of the method {' or '.join(owners)}, got `model_type` "
            f"{model.config.model_type!r}. Make one by `hf_vtc.convert.from_base(base, {owners[0]!r})`, or add the "
            "trainer to the record of its method."
        )


class VtcTrainer(ShardedTrainer):
    """Base of our trainers. Abstract: `compute_loss` is the objective.

    One process per device, as with `accelerate launch` or `torchrun`; `torch.nn.DataParallel` is not supported. Losses
    come back divided by the number of supervised items of the whole accumulated batch, over all processes. Metrics
    that an objective hands to `record` are logged beside the loss, as means since the last log, of this process.

    A checkpoint counts when it was written to its end: a run that was killed while it wrote one resumes from the one
    before, see `train`. Under FSDP and ZeRO a batch of text gets a row with a black tile, see `with_black_tile`: every
    process must ask for the same parameters in the same order, whatever its batch holds.

    Data may be a stream (`IterableDataset`): each process reads all of it and keeps its own share, since accelerate's
    other way, to read in one process and cut batches, would cut images from their prompts.

    Args:
        model ([`PreTrainedModel`]): a model of hf_vtc with a language modelling head, or a `PeftModel` around one.
        args (`TrainingArguments`, *optional*): `remove_unused_columns` is switched off: collators need all columns.
        kwargs: the other arguments of `transformers.Trainer`.

    Raises:
        ValueError: an argument would have no effect on this objective, or the model is of another method.
    """

    # fields of `TrainingArguments` that do nothing here; an objective on other tokens than the next has more
    without_effect: tuple[str, ...] = ("label_smoothing_factor", "use_liger_kernel")

    def __init__(self, model: PreTrainedModel | PeftModel, args: TrainingArguments | None = None, **kwargs: Any):
        for name in _TAKEN.keys() & kwargs.keys():
            if kwargs[name] is not None:
                raise ValueError(f"`{name}` has no effect in {type(self).__name__}: {_TAKEN[name]}. Leave it out.")
        require_method(type(self), model)
        if args is not None:
            self._prepare_arguments(args)
        super().__init__(model=model, args=args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process per device is needed, but this one would spread over {self.args.n_gpu} devices. "
                "Start the script with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one device."
            )
        self.args.remove_unused_columns = False
        # our losses are sums over a count that spans the accumulated batch: Trainer must supply it, and not average
        self.model_accepts_loss_kwargs = True
        # (sum, weight) of each metric since the last log
        self._metrics: dict[str, tuple[torch.Tensor | float, float]] = {}
        self._num_drawn = 0

    def _prepare_arguments(self, args: TrainingArguments) -> None:
        for name in self.without_effect:
            if getattr(args, name):
                raise ValueError(
                    f"`{name}` has no effect in {type(self).__name__}, got {getattr(args, name)}. Leave it out."
                )
        if args.ddp_broadcast_buffers is None:
            # no buffer of ours changes, and those of ViCO's router are megabytes
            args.ddp_broadcast_buffers = False
        if args.accelerator_config.dispatch_batches:
            raise ValueError(
                "`dispatch_batches` must not be True: accelerate would cut every tensor of a batch at the number of "
                "its rows, also those of images. Leave it out."
            )
        args.accelerator_config.dispatch_batches = False

    def next_token_loss(
        self,
        model: nn.Module,
        responses: Responses,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """The next-token loss of supervised tokens, smoothed by `label_smoothing_factor`, and the model's output.

        Args:
            model (`nn.Module`): wrapped or not.
            responses (`Responses`): the tokens.
            inputs (`dict`): arguments of the model's `forward`, without labels.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): see `losses.mean_over_items`.
        """
        logits, outputs = self.response_logits(model, responses, inputs)
        values = token_cross_entropy(logits, responses.targets, self.args.label_smoothing_factor)
        return mean_over_items(values, num_items_in_batch), outputs

    def response_logits(
        self, model: nn.Module, responses: Responses, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, Any]:
        """Run a model whose head projects only the states that predict supervised tokens, and chooses by no answer.

        Args:
            model (`nn.Module`): wrapped or not. The wrapper's own `forward` runs, as distributed training requires.
            responses (`Responses`): which states.
            inputs (`dict`): arguments of the model's `forward`, without labels.

        Returns:
            Logits `(N, V)`, row by row, and the model's output.
        """
        own = self.unwrap(model)
        captured = {}

        def keep_states(module: nn.Module, args: tuple, output: Any) -> None:
            captured["states"] = output.last_hidden_state

        def choose_states(module: nn.Module, args: tuple) -> tuple[torch.Tensor]:
            return (captured["states"][:, :-1][responses.mask],)

        # inside of the forward pass, where sharded weights are whole; `forward` itself takes one set of positions for
        # all rows
        head = own.get_output_embeddings()
        handles = own.model.register_forward_hook(keep_states), head.register_forward_pre_hook(choose_states)
        try:
            outputs = model(**inputs, supervised=responses.supervised, logits_to_keep=1, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return outputs.logits, outputs

    def across_processes(self, loss: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
        """Undo the mean over processes that gradient synchronisation takes, where `num_items` counts all of theirs."""
        if num_items is None or not self.args.average_tokens_across_devices:
            return loss
        return loss * self.accelerator.num_processes

    def draw(self, count: int, training: bool) -> torch.Tensor:
        """Uniform numbers in [0, 1) for the next `count` tiles, on the CPU.

        The n-th number of an optimizer step depends on the seed, the step, the process and n alone: a resumed run
        draws what the uninterrupted one would have, and four micro-batches of one sample what one of four would have.
        Every evaluation draws the same numbers.
        """
        moment = (0, self.state.global_step) if training else (1, 0)
        generator = np.random.default_rng((self.args.seed, self.args.process_index, *moment))
        numbers = generator.random(self._num_drawn + count, dtype=np.float32)[self._num_drawn :]
        self._num_drawn += count
        return torch.from_numpy(numbers)

    def count_items(self, batches: list[dict[str, Any]]) -> int | None:
        """Hook: the items in the micro-batches of one optimizer step of this process that its loss is the mean of.

        None for supervised tokens, which Trainer counts.
        """
        return None

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The micro-batches of one optimizer step, and their items over all processes; draws start anew."""
        self._num_drawn = 0
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counted = self.count_items(batches)
        if counted is None:
            return batches, num_items
        num_items = torch.tensor(counted).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            num_items = self.accelerator.gather(num_items).sum()
        return batches, num_items

    def record(self, name: str, value: torch.Tensor | float, weight: float = 1.0) -> None:
        """Add to a metric; its mean since the last log, weighted, is logged under `name`."""
        if weight == 0:
            return
        value = value.detach() if isinstance(value, torch.Tensor) else value
        total, weights = self._metrics.get(name, (0.0, 0.0))
        self._metrics[name] = (total + value * weight, weights + weight)

    def record_visual_tokens(self, outputs: Any) -> None:
        """Log `visual_tokens`, what the language model sees of an image in the mean; text has none."""
        counts = outputs.num_visual_tokens
        if counts is not None:
            self.record("visual_tokens", counts.float().mean(), len(counts))

    def _pop_metrics(self) -> dict[str, float]:
        means = {name: float(total) / weight for name, (total, weight) in self._metrics.items()}
        self._metrics = {}
        return means

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """`Trainer.log`, with the recorded metrics beside the training loss."""
        if "loss" in logs:
            logs = {**logs, **self._pop_metrics()}
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """`Trainer.evaluation_loop`, with the recorded metrics under the prefix."""
        in_training, self._metrics = self._metrics, {}
        self._num_drawn = 0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self._pop_metrics().items()})
        self._metrics = in_training
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, None, None]:
        """The objective on an evaluation batch; full-length logits are never built."""
        return super().prediction_step(model, inputs, prediction_loss_only=True, ignore_keys=ignore_keys)
