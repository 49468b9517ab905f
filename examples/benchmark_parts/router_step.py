"""A step of AVG-LLaVA's router training against the straightforward procedure, which is that of the released code.

That runs the whole model once per granularity and the tower and the router once more, six runs of the tower in all;
`AvgLlavaRouterTrainer` runs the tower once. The head runs on answer tokens alone in both; losses are compared. What
can be gained follows from the products of both, which are counted: the smaller the tower's share, the less.
"""

import tempfile
from dataclasses import replace
from typing import Any

import torch
from transformers import TrainingArguments

from hf_vtc.models.prompt_vtc import VisionInputs
from hf_vtc.trainers import AvgLlavaRouterTrainer, Responses
from hf_vtc.trainers.avg_llava import without_answers
from hf_vtc.trainers.losses import mean_per_row, token_cross_entropy

from .cases import build, labelled, prompts, shape_of
from .first_token import require_equal
from .rounds import Limits, multiplied, peak_bytes, take_turns

# fields of ViT-B, by the size of the rest
_TOWERS = {
    "100m": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "small": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 6},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
}
_TOLERANCE = 1e-5


def straightforward_step(trainer: AvgLlavaRouterTrainer, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """A full forward pass per granularity, then tower, projector and router once more.

    Returns the loss, after its backward pass, and the losses of the samples at each granularity.
    """
    model, inputs = trainer.model, dict(batch)
    labels = inputs.pop("labels")
    responses, losses = Responses.from_labels(labels), []
    for idx in range(len(model.config.vis_token_granularity)):
        decisions = torch.full((len(inputs["num_tiles"]),), idx)
        with torch.no_grad():
            logits, _ = trainer.response_logits(model, responses, {**inputs, "router_decisions": decisions})
            token_losses = token_cross_entropy(logits, responses.targets)
        losses.append(mean_per_row(token_losses, responses.row_idx, responses.num_rows))
    losses = torch.stack(losses, dim=1)
    asked = without_answers(inputs, labels, model.config.placeholder_ids)
    vision = VisionInputs(**{name: inputs[name] for name in ("pixel_values", "num_tiles", "image_sizes")})
    compressed = model.model.compress_prompt(asked["input_ids"], vision, asked["attention_mask"])
    loss = trainer.router_loss(compressed.router_logits, losses)
    loss.backward()
    return loss.detach(), losses


def measure(size: str, batch_size: int, layers: list[int], limits: Limits) -> list[dict[str, Any]]:
    """A row for each number of decoder layers, and so for each share of the tower.

    Raises:
        DifferentOutputs: losses of both procedures differ.
    """
    return [_at_depth(size, batch_size, num_layers, limits) for num_layers in layers]


def _at_depth(size: str, batch_size: int, num_layers: int, limits: Limits) -> dict[str, Any]:
    shape = shape_of("avg_llava", size)
    own = replace(
        shape,
        text={**shape.text, "num_hidden_layers": num_layers},
        vision={**shape.vision, **_TOWERS[size]},
        # what is measured must not depend on what is drawn
        fields={**shape.fields, "router_dropout": 0.0},
    )
    model = build("avg_llava", own, torch.float32, limits.device)
    inputs = prompts(model, own, batch_size)
    batch = labelled(inputs)
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(folder, report_to=[], use_cpu=limits.device.type == "cpu", disable_tqdm=True)
        trainer = AvgLlavaRouterTrainer(model, options)
    trainer.create_optimizer()
    losses, _ = trainer.measure(model, batch["labels"], dict(inputs))
    apart = require_equal("losses", losses, straightforward_step(trainer, batch)[1], _TOLERANCE)
    num_images = torch.tensor(len(batch["num_tiles"]))

    @torch.no_grad()
    def whole() -> None:
        model(**inputs, vtc_budget="full", logits_to_keep=1, use_cache=False)

    @torch.no_grad()
    def tower() -> None:
        model.model.encode(inputs["pixel_values"])

    variants = {
        "ours": lambda: trainer.training_step(model, dict(batch), num_images),
        "straightforward": lambda: straightforward_step(trainer, batch),
        "tower": tower,
        "whole": whole,
    }
    products = {name: multiplied(variants[name]) for name in ("ours", "straightforward")}
    rounds = take_turns(variants, [("straightforward", "ours")], limits)
    return {
        "part": "router step",
        "method": "avg_llava",
        "batch": batch_size,
        "layers": num_layers,
        "rounds": len(rounds.seconds["ours"]),
        "apart": apart,
        "tower_share": rounds.ratio("tower", "whole").median,
        "seconds": vars(rounds.spread("ours")),
        "straightforward_seconds": vars(rounds.spread("straightforward")),
        "over_straightforward": vars(rounds.ratio("straightforward", "ours")),
        "by_products": products["straightforward"] / products["ours"],
        "bytes": peak_bytes(variants["ours"], limits.device),
        "straightforward_bytes": peak_bytes(variants["straightforward"], limits.device),
    }
