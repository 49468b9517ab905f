"""What the trainers of all methods share: supervised positions, metrics, scaling, and draws that survive resume."""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from .losses import IGNORE_INDEX

# written into a checkpoint when all else is there
COMPLETE = "complete"

T = TypeVar("T")


@dataclass
class Responses:
    """The supervised tokens of one batch; the state at position t predicts label t + 1.

    Outputs of our models are full-length whatever was compressed, so one position means the same token to the policy
    and to the reference.

    Args:
        mask (`torch.BoolTensor` of shape `(B, L - 1)`): True where the state predicts a supervised token.
        targets (`torch.LongTensor` of shape `(N,)`): the supervised tokens, row by row.
        row_idx (`torch.LongTensor` of shape `(N,)`): the sample of each.
    """

    mask: torch.Tensor
    targets: torch.Tensor
    row_idx: torch.Tensor

    @classmethod
    def from_labels(cls, labels: torch.Tensor) -> "Responses":
        """Read `labels` `(B, L)`, -100 where nothing is supervised."""
        shifted = labels[:, 1:]
        mask = shifted != IGNORE_INDEX
        return cls(mask, shifted[mask], mask.nonzero()[:, 0])

    @property
    def num_rows(self) -> int:
        return self.mask.shape[0]

    def tokens_of(self, rows: list[int]) -> torch.Tensor:
        """Indices into the N tokens that give the tokens of `rows`, one row after the other, repeats allowed."""
        return torch.cat([(self.row_idx == row).nonzero()[:, 0] for row in rows])

    def select(self, rows: list[int]) -> "Responses":
        """The responses of a batch that consists of `rows` of this one."""
        mask = self.mask[rows]
        return Responses(mask, self.targets[self.tokens_of(rows)], mask.nonzero()[:, 0])


def black_tile(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Inputs of the smallest prompt with an image: the placeholders of one black tile."""
    config = model.config
    size = config.vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    ids = torch.full((1, config.image_seq_length), config.image_token_id, device=model.device)
    channels = config.vision_config.num_channels
    pixel_values = torch.zeros(1, channels, height, width, device=model.device, dtype=model.dtype)
    return {"input_ids": ids, "pixel_values": pixel_values, "num_tiles": torch.ones(1, dtype=torch.long)}


def with_black_tile(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch of text with one more row, a black tile without labels: losses are those of the text.

    Args:
        model ([`PreTrainedModel`]): our own model, not a wrapper.
        inputs (`dict`): a batch without images, `input_ids` `(B, L)` and what belongs to them.
    """
    tile = black_tile(model)
    placeholders, ids = tile.pop("input_ids"), inputs["input_ids"]
    length = max(placeholders.shape[1], ids.shape[1])

    def stacked(text: torch.Tensor, row: torch.Tensor, value: int) -> torch.Tensor:
        padded = [nn.functional.pad(each, (length - each.shape[1], 0), value=value) for each in (text, row)]
        return torch.cat(padded)

    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    rows = {
        "input_ids": stacked(ids, placeholders, 0),
        "attention_mask": stacked(mask, torch.ones_like(placeholders), 0),
    }
    if "labels" in inputs:
        nothing = torch.full_like(placeholders, IGNORE_INDEX)
        rows["labels"] = stacked(inputs["labels"], nothing, IGNORE_INDEX)
    return {**inputs, **rows, **tile}


def sharded_units(model: PreTrainedModel) -> list[str]:
    """Classes of the modules that FSDP gathers one by one; the rest of a model is gathered once for a forward pass.

    Every process must run modules of these classes in the same order.

    Args:
        model ([`PreTrainedModel`]): our own model, not a wrapper.
    """
    names = set(model._no_split_modules)
    if model.config.model_type == "vtc_vistog":
        # semantic tokens run through parts of the tower's layers, which are gathered as a whole only when called so
        names -= {type(module).__name__ for module in model.model.vision_tower.modules()}
    if model.config.model_type == "vtc_vico":
        # in evaluation a connector runs only if a tile needs it
        names.discard("Connector")
    return sorted(names)


def complete_checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoints in a folder that were written to their end, in the order of their steps."""
    found = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if step and (path / COMPLETE).is_file():
            found[int(step[1])] = path
    return [found[step] for step in sorted(found)]


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


class VtcTrainer(Trainer):
    """Base of our trainers. Abstract: `compute_loss` is the objective.

    One process per device, as with `accelerate launch` or `torchrun`; `torch.nn.DataParallel` is not supported. Losses
    come back divided by the number of supervised items of the whole accumulated batch, over all processes. Metrics
    that an objective hands to `record` are logged beside the loss, as means since the last log, of this process.

    A checkpoint counts when it was written to its end: a run that was killed while it wrote one resumes from the one
    before, see `train`. Under FSDP and ZeRO a batch of text gets a row with a black tile, see `with_black_tile`: every
    process must ask for the same parameters in the same order, whatever its batch holds.

    Args:
        model ([`PreTrainedModel`]): a model of hf_vtc with a language modelling head, or a `PeftModel` around one.
        args (`TrainingArguments`, *optional*): `remove_unused_columns` is switched off: collators need all columns.
        kwargs: the other arguments of `transformers.Trainer`.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, args: TrainingArguments | None = None, **kwargs: Any):
        if args is not None and args.ddp_broadcast_buffers is None:
            # no buffer of ours changes, and those of ViCO's router are megabytes
            args.ddp_broadcast_buffers = False
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
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap is None:
            units = sharded_units(self.unwrap(self.model))
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = units
        sharded_by_zero = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        if sharded_by_zero and self.model.config.model_type == "vtc_convllava":
            # it gathers the parts of a stage each time they run, which is once per image size
            raise ValueError(
                "ConvLLaVA cannot train under ZeRO-3, where processes whose images differ in size would wait for each "
                "other for ever. Use FSDP2 (examples/accelerate/fsdp2.yaml), DDP, or `zero_stage: 2`."
            )

    @property
    def is_sharded(self) -> bool:
        """Whether the parameters of the model are spread over processes."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def unwrap(self, model: nn.Module) -> PreTrainedModel:
        """Our own model inside the wrappers of accelerate and PEFT."""
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def place_reference(self, reference_model: PreTrainedModel) -> PreTrainedModel:
        """Freeze a reference model, switch its dropout off and put it on this process's device, whole."""
        reference_model = reference_model.requires_grad_(False).eval()
        # accelerate would leave it where it is if the policy is sharded
        return self.accelerator.prepare_model(reference_model, device_placement=True, evaluation_mode=True)

    def in_forward(self, model: nn.Module, function: Callable[[], T]) -> T:
        """Call a function that uses parts of a model, in place of the model's `forward` if it is sharded.

        Sharded parameters are whole only while the wrapper's own forward pass runs.

        Args:
            model (`nn.Module`): wrapped or not.
            function (`Callable`): without arguments; what it returns is returned.
        """
        if not self.is_sharded:
            return function()
        own = self.unwrap(model)
        replaced = vars(own).get("forward")
        own.forward = lambda: function()
        try:
            return model()
        finally:
            del own.forward
            if replaced is not None:
                own.forward = replaced

    def response_logits(
        self, model: nn.Module, responses: Responses, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, Any]:
        """Run a model whose head projects only the states that predict supervised tokens.

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
            outputs = model(**inputs, logits_to_keep=1, use_cache=False)
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

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if self.is_sharded and not {"pixel_values", "image_features"} & inputs.keys():
            inputs = with_black_tile(self.unwrap(self.model), inputs)
        return inputs

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """`Trainer.train`, which resumes from a complete checkpoint only; `True` is the last one of `output_dir`.

        Raises:
            ValueError: there is none, or the given one was not written to its end.
        """
        if isinstance(resume_from_checkpoint, bool):
            found = complete_checkpoints(self.args.output_dir) if resume_from_checkpoint else []
            if resume_from_checkpoint and not found:
                raise ValueError(
                    f"`resume_from_checkpoint` is True, but no checkpoint in {self.args.output_dir} is complete. "
                    "Start without it."
                )
            resume_from_checkpoint = str(found[-1]) if found else None
        elif resume_from_checkpoint is not None and not (Path(resume_from_checkpoint) / COMPLETE).is_file():
            raise ValueError(
                f"`resume_from_checkpoint` must be a checkpoint that was written to its end, but {COMPLETE!r} is not "
                f"among the files of {resume_from_checkpoint}. Take an earlier one, or if you know that another "
                "trainer wrote it to its end, put an empty file of this name into it."
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`Trainer.save_model`, which under FSDP writes the model even where checkpoints are sharded."""
        if not self.is_fsdp_enabled or _internal_call:
            return super().save_model(output_dir, _internal_call)
        plugin = self.accelerator.state.fsdp_plugin
        of_checkpoints = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            super().save_model(output_dir)
        finally:
            plugin.set_state_dict_type(of_checkpoints)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint of all processes, marked when it is whole; only then older ones go."""
        folder = Path(self._get_output_dir(trial=trial))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            # of an earlier run into the same folder
            (checkpoint / COMPLETE).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (checkpoint / COMPLETE).touch()
            self._remove_old_checkpoints(folder, checkpoint)

    def _remove_old_checkpoints(self, folder: Path, newest: Path) -> None:
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if limit is None or limit <= 0:
            return
        kept = {newest.resolve()} | ({Path(best).resolve()} if best else set())
        others = [path for path in complete_checkpoints(folder) if path.resolve() not in kept]
        for path in others[: max(0, len(others) + len(kept) - max(limit, len(kept)))]:
            # first, so that what is left of a deletion that was interrupted does not count
            (path / COMPLETE).unlink()
            shutil.rmtree(path, ignore_errors=True)

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
