"""Seconds and memory of one optimizer step: each trainer, the same next-token step under LoRA, an oracle, and plain.

The oracle of a step has images packed already and runs nothing in vain: the tower once, without gradients, the
connectors that were needed, the embeddings of text, the stock language model once for each time that the objective
needs it, the head on supervised tokens alone. Plain transformers sees all visual tokens and makes logits of every
position, as its `Trainer` lets it. All take the same optimizer step, of SGD, which has no states and is a small part
of the whole.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_vtc.lora import default_lora_config
from hf_vtc.report.measured import Oracle
from hf_vtc.trainers import (
    AvgLlavaGranularityTrainer,
    ConvllavaTrainer,
    LlavoltaTrainer,
    Responses,
    VicoConsistencyTrainer,
    VistogTrainer,
    VtcTrainer,
)
from hf_vtc.trainers.schedule import Stage

from .cases import build, inputs_of_plain, labelled, plain_of, prompts, shape_of, takes
from .first_token import require_equal
from .rounds import Limits, peak_bytes, take_turns

NUM_ANSWER_TOKENS = 16
# of losses, which are sums of other order
_TOLERANCE = 1e-4
_CACHE_NAMES = ("past_key_value", "past_key_values", "cache")
_RANK = 16


class NextTokenTrainer(VtcTrainer):
    """The next-token loss of supervised tokens at a budget, as in `examples/finetune_lora.py`."""

    budget: Any = "auto"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs, "vtc_budget": self.budget}
        responses = Responses.from_labels(inputs.pop("labels"))
        loss, outputs = self.next_token_loss(model, responses, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class _Handed(torch.autograd.Function):
    """`given` in place of `states`, as if made of them for nothing; so is their gradient."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, given: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.gradient = gradient
        return given.view_as(given)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.gradient, None, None


class OraclePass:
    """One pass of the language model over packed prompts of a batch, and the connectors before it.

    Args:
        model ([`PreTrainedModel`]): ours, adapters in it or not.
        inputs (`dict`): without labels.
        asked (`dict`): `vtc_budget` or `router_decisions`.
        labels (`torch.Tensor` of shape `(B, L)`): the last tokens of each row.
    """

    def __init__(self, model: PreTrainedModel, inputs: dict, asked: Mapping[str, Any], labels: torch.Tensor):
        was_training = model.training
        model.eval()
        with torch.no_grad():
            given = {**inputs, **{name: value for name, value in asked.items() if name != "vtc_budget"}}
            self.oracle = Oracle(model, given, asked.get("vtc_budget"))
            self.features = self.oracle.encode()
        model.train(was_training)
        self.num_kept = sum(self.oracle.num_kept)
        self.model, self.targets = model, labels[:, -NUM_ANSWER_TOKENS:].flatten()
        self.ids = self._packed_ids(inputs["input_ids"])
        # what reaches the decoder's first layer, or one in the middle, is there already; so are its gradients
        self.gradients: dict[Any, torch.Tensor] = {}

    def _packed_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`(B, K)`: the rows of the embeddings that get gradients, the first one in place of images and padding."""
        ids = input_ids.masked_fill(self.oracle.placeholders.to(input_ids.device), 0)
        length = self.oracle.embeds.shape[1]
        rows = [row[kept.to(row.device)] for row, kept in zip(ids, self.oracle.kept_mask, strict=True)]
        return torch.stack([F.pad(row, (length - len(row), 0)) for row in rows])

    def _handed(self, key: Any, states: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        if not states.requires_grad:
            return given
        if key not in self.gradients:
            self.gradients[key] = 1e-3 * torch.randn_like(states)
        return _Handed.apply(states, given, self.gradients[key])

    def loss(self, features: Any) -> torch.Tensor:
        """The next-token loss, with its graph."""
        oracle, connected = self.oracle, self.oracle.connect(features)
        pieces = connected if isinstance(connected, list) else [connected]
        # whoever trains embeddings looks them up and makes their gradients
        embeds = self._handed("text", self.model.get_input_embeddings()(self.ids), oracle.embeds)
        for idx, piece in enumerate(pieces):
            embeds = self._handed(idx, piece, embeds)
        if oracle.replay is None:
            padded = {"attention_mask": oracle.attention_mask, "position_ids": oracle.position_ids}
            states = self.model.model.language_model(
                inputs_embeds=embeds, use_cache=False, **(padded if oracle.padded else {})
            ).last_hidden_state
        else:
            states = self._replayed(embeds)
        rows = states[:, -NUM_ANSWER_TOKENS - 1 : -1].flatten(0, 1)
        return F.cross_entropy(self.model.lm_head(rows).float(), self.targets)

    def _replayed(self, embeds: torch.Tensor) -> torch.Tensor:
        decoder, replay, states = self.model.model.language_model, self.oracle.replay, embeds
        for layer_idx, layer in enumerate(decoder.layers):
            if layer_idx in replay.given:
                states = self._handed(("layer", layer_idx), states, replay.given[layer_idx])
            # a replay for the first token fills a cache, whose name is another from 5.24 on
            arguments = {
                name: value for name, value in replay.arguments[layer_idx].items() if name not in _CACHE_NAMES
            }
            states = layer(states, **{**arguments, "use_cache": False})
        return decoder.norm(states)


@dataclass
class Step:
    """One kind of optimizer step.

    Args:
        name (`str`): of the trainer.
        trainer (`(model, arguments) -> Trainer`): which also says what trains.
        asked (`(model, batch, budget) -> list`): what each pass of the language model with gradients is asked for.
        references (`int`): passes at full length without gradients before it.
        lora (`bool`): whether adapters train, and the compressor.
        budgets (`tuple`): at which it is measured; `"auto"` is the trainer's own way.
    """

    name: str
    trainer: Callable[[nn.Module, TrainingArguments], Trainer]
    asked: Callable[[PreTrainedModel, dict, Any], list[dict[str, Any]]] = lambda model, batch, budget: [
        {"vtc_budget": budget}
    ]
    references: int = 0
    lora: bool = False
    budgets: tuple = ("auto",)


def _every_granularity(model: PreTrainedModel, batch: dict, budget: Any) -> list[dict[str, Any]]:
    count = len(batch["num_tiles"])
    return [{"router_decisions": torch.full((count,), idx)} for idx in range(len(model.config.vis_token_granularity))]


def _half_of_the_tiles(model: PreTrainedModel, batch: dict, budget: Any) -> list[dict[str, Any]]:
    return [{"router_decisions": torch.arange(len(batch["pixel_values"])) % 2 == 1}]


class _Alternating(VicoConsistencyTrainer):
    """Every second tile compressed, so that steps are alike."""

    def draw_decisions(self, input_ids: torch.Tensor, training: bool) -> torch.Tensor:
        per_tile = self.unwrap(self.model).config.image_seq_length
        num_tiles = int((input_ids == self.unwrap(self.model).config.image_token_id).sum()) // per_tile
        return torch.arange(num_tiles) % 2 == 1


def _next_token(model: nn.Module, arguments: TrainingArguments) -> Trainer:
    own = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    if own is model:
        # the tower stays as it is, as in every recipe; the loss does not reach a router
        model.requires_grad_(True)
        own.model.vision_tower.requires_grad_(False)
        for name, parameter in own.named_parameters():
            if ".router." in name:
                parameter.requires_grad_(False)
    return NextTokenTrainer(model, arguments)


_TRAINERS = {
    "vico": Step("VicoConsistencyTrainer", _Alternating, _half_of_the_tiles, references=1),
    "avg_llava": Step("AvgLlavaGranularityTrainer", AvgLlavaGranularityTrainer, _every_granularity),
    "vistog": Step("VistogTrainer, stage 2", lambda model, given: VistogTrainer(model, given, stage=2)),
    "llavolta": Step("LlavoltaTrainer", lambda model, given: LlavoltaTrainer(model, given, stages=[Stage(2, 8, 1.0)])),
    "convllava": Step("ConvllavaTrainer, stage 3", lambda model, given: ConvllavaTrainer(model, given, stage=3)),
}


def steps_of(method: str, lora: bool, budgets: Sequence[Any]) -> list[Step]:
    """The kinds of steps of a method."""
    if lora:
        return [Step("next token, LoRA", _next_token, lora=True, budgets=tuple(budgets))]
    return [Step("next token", _next_token, budgets=tuple(budgets)), _TRAINERS[method]]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, lr=1e-6)


def step_by(trainer: Trainer, model: nn.Module, batch: dict) -> Callable[[], torch.Tensor]:
    """One optimizer step by a trainer's own `training_step`."""
    optimizer = optimizer_of(model)
    trainer.optimizer = optimizer
    num_items = (batch["labels"] != -100).sum()

    def step() -> torch.Tensor:
        loss = trainer.training_step(model, dict(batch), num_items)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def oracle_step(
    model: PreTrainedModel, trained: nn.Module, passes: list[OraclePass], references: list[OraclePass]
) -> Callable[[], None]:
    """One optimizer step of the oracle; its passes share one run of the tower."""
    optimizer = optimizer_of(trained)

    def step() -> None:
        model.train()
        with torch.no_grad():
            # the plain tower: in training a method may run more beside it, whatever is asked
            model.model.training = False
            features = passes[0].oracle.encode()
            model.model.training = True
            for each in references:
                each.loss(features)
        for each in passes:
            (each.loss(features) / len(passes)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_step(plain: nn.Module, batch: dict, lora: bool) -> Callable[[], Any]:
    """One optimizer step of the uncompressed model of transformers in a bare loop, tower frozen."""
    if lora:
        layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        pattern = rf".*language_model.*\.(?:{'|'.join(layers)})"
        names = {name.rpartition(".")[2] for name, _ in plain.named_modules()}
        connector = sorted(names & {"multi_modal_projector", "projector"})
        plain = get_peft_model(plain, LoraConfig(r=_RANK, target_modules=pattern, modules_to_save=connector))
    else:
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_("vision_tower" not in name and not name.startswith("tower."))
    plain.train()
    optimizer, given = optimizer_of(plain), {name: value for name, value in batch.items() if name != "labels"}
    targets = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].flatten()

    def step() -> torch.Tensor:
        loss = F.cross_entropy(plain(**given).logits.float().flatten(0, 1), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def passes_of(model: PreTrainedModel, batch: dict, asked: list[dict[str, Any]]) -> list[OraclePass]:
    """The oracle's passes for what is asked.

    Raises:
        DifferentOutputs: model and oracle do not have the same loss.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    passes = []
    for each in asked:
        one = OraclePass(model, inputs, each, batch["labels"])
        was_training = model.training
        model.eval()
        with torch.no_grad():
            require_equal(f"loss and oracle, {each}", model(**batch, **each).loss, one.loss(one.features), _TOLERANCE)
        model.train(was_training)
        passes.append(one)
    return passes


def measure(
    method: str,
    size: str,
    batch_size: int,
    vocab_size: int,
    lora: bool,
    budgets: Sequence[Any],
    limits: Limits,
) -> list[dict[str, Any]]:
    """Rows of the steps of one method at one vocabulary, in full or under LoRA, float32."""
    shape = shape_of(method, size, vocab_size)
    rows = []
    for kind in steps_of(method, lora, budgets):
        model = build(method, shape, torch.float32, limits.device)
        inputs = prompts(model, shape, batch_size)
        batch = labelled(inputs, NUM_ANSWER_TOKENS)
        plain = plain_of(model)
        own = {**inputs_of_plain(plain, inputs, model), "labels": batch["labels"]}
        config = default_lora_config(model, r=_RANK, lora_dropout=0.0) if lora else None
        trained = get_peft_model(model, config) if lora else model
        variants, kept = {"plain": plain_step(plain, own, lora)}, {}
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(folder, report_to=[], use_cpu=limits.device.type == "cpu", disable_tqdm=True)
            trainer = kind.trainer(trained, arguments)
            references = passes_of(model, batch, [{"vtc_budget": "full"}] * kind.references)
            budgets_met = [budget for budget in kind.budgets if takes(model, inputs, budget)]
            for budget in budgets_met:
                passes = passes_of(model, batch, kind.asked(model, batch, budget))
                kept[budget] = sum(each.num_kept for each in passes) // len(passes)
                variants[f"oracle {budget}"] = oracle_step(model, trained, passes, references)
                variants[str(budget)] = _at(budget, trainer, step_by(trainer, trained, batch))
            pairs = [(f"oracle {budget}", str(budget)) for budget in budgets_met]
            rounds = take_turns(variants, pairs, limits)
            memory = {name: peak_bytes(variants[name], limits.device) for name in variants}
        for budget in budgets_met:
            name, oracle = str(budget), f"oracle {budget}"
            rows.append(
                {
                    "part": "training",
                    "method": method,
                    "step": kind.name,
                    "budget": budget,
                    "batch": batch_size,
                    "vocabulary": vocab_size,
                    "reserved": int((inputs["input_ids"] == model.config.image_token_id).sum()),
                    "kept": kept[budget],
                    "rounds": len(rounds.seconds[name]),
                    "seconds": vars(rounds.spread(name)),
                    "oracle_seconds": vars(rounds.spread(oracle)),
                    "plain_seconds": vars(rounds.spread("plain")),
                    "eta": vars(rounds.ratio(oracle, name)),
                    "over_plain": vars(rounds.ratio("plain", name)),
                    "bytes": memory[name],
                    "oracle_bytes": memory[oracle],
                    "plain_bytes": memory["plain"],
                }
            )
    return rows


def _at(budget: Any, trainer: Trainer, step: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> None:
        trainer.budget = budget
        step()

    return run
