"""Seconds and memory of one optimizer step: each trainer, the same next-token step under LoRA, an oracle, and plain.

The oracle of a step has images packed already and runs nothing in vain: the tower once, with gradients where it
trains, the connectors that were needed, the embeddings of text, the stock language model once for each time that the
objective needs it, the head on supervised tokens alone; a reference model with its own tower where the objective has
one; and the matrix products of what the objective demands beside these (`demanded.py`): those of AVG-LLaVA's router
where it chooses, as released, and of VisToG's semantic tokens, whose vectors train. Plain transformers sees all visual
tokens and makes logits of every position, as its `Trainer` lets it. All take the same optimizer step, of SGD, which
has no states and is a small part of the whole.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_vtc.lora import default_lora_config
from hf_vtc.methods.shapes import Shape
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
from hf_vtc.trainers.losses import consistency_kl
from hf_vtc.trainers.schedule import Stage

from .cases import build, inputs_of_plain, labelled, plain_of, prompts, shape_of, takes
from .demanded import semantic_products
from .first_token import released_products, require_equal
from .rounds import Limits, multiplied, peak_bytes, take_turns

NUM_ANSWER_TOKENS = 16
# of losses, which are sums of other order
_TOLERANCE = 1e-4
_CACHE_NAMES = ("past_key_value", "past_key_values", "cache")
_RANK = 16
FULL = {"vtc_budget": "full"}
# or a router would choose otherwise from step to step
_NOTHING_DRAWN = {"vico": {"connector_dropout": 0.0}, "avg_llava": {"router_dropout": 0.0}}


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

    def logits(self, features: Any) -> torch.Tensor:
        """Logits `(B * answers, V)` of the supervised tokens, with their graph."""
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
        return self.model.lm_head(rows)

    def loss(self, features: Any) -> torch.Tensor:
        """The next-token loss, with its graph."""
        return F.cross_entropy(self.logits(features).float(), self.targets)

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
        references (`bool`): whether the loss is the divergence from a frozen model, which sees all visual tokens.
        lora (`bool`): whether adapters train, and the compressor.
        budgets (`tuple`): at which it is measured; `"auto"` is the trainer's own way.
    """

    name: str
    trainer: Callable[[nn.Module, TrainingArguments], Trainer]
    asked: Callable[[PreTrainedModel, dict, Any], list[dict[str, Any]]] = lambda model, batch, budget: [
        {"vtc_budget": budget}
    ]
    references: bool = False
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
    "vico": Step("VicoConsistencyTrainer", _Alternating, _half_of_the_tiles, references=True),
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
    model: PreTrainedModel,
    trained: nn.Module,
    passes: list[OraclePass],
    reference: OraclePass | None = None,
    beside: Callable[[], None] = lambda: None,
) -> Callable[[], None]:
    """One optimizer step of the oracle; its passes share one run of the tower.

    Args:
        model, trained: ours, and ours with adapters where it has any.
        passes (`list[OraclePass]`): with gradients; the loss is their mean.
        reference ([`OraclePass`], *optional*): of the frozen model from which the loss is the divergence.
        beside (`Callable`): what else the objective demands.
    """
    optimizer = optimizer_of(trained)
    tower_trains = any(parameter.requires_grad for parameter in model.model.vision_tower.parameters())

    def step() -> None:
        expected = None
        if reference is not None:
            with torch.no_grad():
                expected = reference.logits(reference.oracle.encode())
        model.train()
        # the plain tower: in training a method may run more beside it, whatever is asked
        model.model.training = False
        with torch.set_grad_enabled(tower_trains):
            features = passes[0].oracle.encode()
        model.model.training = True
        beside()
        # the passes leave their gradients here, and the tower goes back once
        leaf = features.detach().requires_grad_() if tower_trains else features
        for each in passes:
            loss = each.loss(leaf) if expected is None else consistency_kl(expected, each.logits(leaf))
            (loss / len(passes)).backward()
        if tower_trains:
            features.backward(leaf.grad)
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


def demanded(model: PreTrainedModel, inputs: dict, asked: list[dict[str, Any]]) -> Callable[[], None]:
    """What an objective demands beside tower, connectors and language model; see the file."""
    budgets = [each["vtc_budget"] for each in asked if each.get("vtc_budget", "full") != "full"]
    if "auto" in budgets and model.model.routes_by_text:
        was_training = model.training
        model.eval()
        with torch.no_grad():
            run = torch.no_grad()(released_products(model, inputs))
        model.train(was_training)
        return run
    if budgets and hasattr(model.model, "semantic_tokens"):
        return semantic_products(model, len(inputs["pixel_values"]))
    return lambda: None


class Prepared:
    """A step of one kind, its oracle and plain transformers, float32.

    `variants`: what takes turns, by name; `oracle BUDGET` beside `BUDGET`. `kept`: visual tokens at each budget that
    the model can meet, the mean over passes.

    Raises:
        DifferentOutputs: model and oracle do not have the same loss.
    """

    def __init__(self, kind: Step, method: str, shape: Shape, batch_size: int, device: torch.device):
        # what is measured must not depend on what is drawn
        shape = replace(shape, fields={**shape.fields, **_NOTHING_DRAWN.get(method, {})})
        self.model = model = build(method, shape, torch.float32, device)
        self.inputs = inputs = prompts(model, shape, batch_size)
        batch = labelled(inputs, NUM_ANSWER_TOKENS)
        plain = plain_of(model)
        own = {**inputs_of_plain(plain, inputs, model), "labels": batch["labels"]}
        config = default_lora_config(model, r=_RANK, lora_dropout=0.0) if kind.lora else None
        trained = get_peft_model(model, config) if kind.lora else model
        self.variants, self.kept = {"plain": plain_step(plain, own, kind.lora)}, {}
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(folder, report_to=[], use_cpu=device.type == "cpu", disable_tqdm=True)
            trainer = kind.trainer(trained, arguments)
        (reference,) = passes_of(trainer.reference_model, batch, [FULL]) if kind.references else (None,)
        for budget in kind.budgets:
            if not takes(model, inputs, budget):
                continue
            asked = kind.asked(model, batch, budget)
            passes = passes_of(model, batch, asked)
            if reference is not None:
                _require_equal_divergence(trainer, trained, batch, reference, passes[0])
            beside = demanded(model, inputs, asked)
            self.kept[budget] = sum(each.num_kept for each in passes) // len(passes)
            self.variants[f"oracle {budget}"] = oracle_step(model, trained, passes, reference, beside)
            self.variants[str(budget)] = _at(budget, trainer, step_by(trainer, trained, batch))


@torch.no_grad()
def _require_equal_divergence(
    trainer: Trainer, trained: nn.Module, batch: dict, reference: OraclePass, policy: OraclePass
) -> None:
    trained.eval()
    found = trainer.compute_loss(trained, dict(batch))
    expected = consistency_kl(reference.logits(reference.features), policy.logits(policy.features))
    require_equal("divergence and oracle", found, expected, _TOLERANCE)


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
    rows = []
    for kind in steps_of(method, lora, budgets):
        made = Prepared(kind, method, shape_of(method, size, vocab_size), batch_size, limits.device)
        pairs = [(f"oracle {budget}", str(budget)) for budget in made.kept]
        rounds = take_turns(made.variants, pairs, limits)
        memory = {name: peak_bytes(step, limits.device) for name, step in made.variants.items()}
        # what a budget saves of the step without compression, in products
        against = [str(budget) for budget in made.kept if "full" in made.kept]
        products = {name: multiplied(made.variants[name]) for name in against}
        for budget, kept in made.kept.items():
            name, oracle = str(budget), f"oracle {budget}"
            rows.append(
                {
                    "part": "training",
                    "method": method,
                    "step": kind.name,
                    "budget": budget,
                    "batch": batch_size,
                    "vocabulary": vocab_size,
                    "reserved": int((made.inputs["input_ids"] == made.model.config.image_token_id).sum()),
                    "kept": kept,
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
            if name in products and name != "full":
                by_products = products["full"] / products[name]
                rows[-1]["by_products"] = by_products
                rows[-1]["of_products"] = vars(rounds.ratio("full", name).over(by_products))
    return rows


def _at(budget: Any, trainer: Trainer, step: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> None:
        trainer.budget = budget
        step()

    return run
