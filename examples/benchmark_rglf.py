"""What a step of AVG-LLaVA's router training costs, against the straightforward procedure.

    python examples/benchmark_rglf.py

The straightforward step runs the whole model once per granularity and the tower and the router once more, six runs of
the tower in all; `AvgLlavaRouterTrainer` runs the tower once. Both are measured in turns, on a randomly initialised
model of LLaVA-NeXT's shape (what weights say does not change the time), backward pass of the router included, and the
head runs on answer tokens only in both. Losses of both are compared. A few minutes on 2 CPU cores.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainingArguments

from hf_vtc.models.configuration_avg_llava import AvgLlavaConfig
from hf_vtc.models.modeling_avg_llava import AvgLlavaForConditionalGeneration
from hf_vtc.models.processing_vtc import COUNT_RULES
from hf_vtc.models.prompt_vtc import VisionInputs
from hf_vtc.models.tiling_vtc import anyres_layout
from hf_vtc.trainers import AvgLlavaRouterTrainer, Responses
from hf_vtc.trainers.avg_llava import without_answers
from hf_vtc.trainers.losses import mean_per_row, token_cross_entropy

GOAL, GOAL_TOWER_SHARE = 2.0, 1 / 3
VOCAB_SIZE = 8000
IMAGE_TOKEN_ID = VOCAB_SIZE - 1
TILE = 168
# ViT-B on tiles of 144 patches; granularities are 144, 72, 36, 18, 9
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": TILE,
    "patch_size": 14,
}
TEXT = {
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
}
PINPOINTS = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]


def build_model(num_layers: int, device: torch.device) -> AvgLlavaForConditionalGeneration:
    """A random model in eval mode."""
    torch.manual_seed(0)
    config = AvgLlavaConfig(
        dict(VISION),
        {**TEXT, "num_hidden_layers": num_layers},
        image_token_id=IMAGE_TOKEN_ID,
        vision_feature_layer=-2,
        image_grid_pinpoints=[[rows * TILE, columns * TILE] for rows, columns in PINPOINTS],
        router_attention="tiles",
        unpad_rule="token_grid",
        # what is measured must not depend on what is drawn
        router_dropout=0.0,
    )
    return AvgLlavaForConditionalGeneration(config).to(device).eval()


def build_batch(config: AvgLlavaConfig, batch_size: int, num_text: int, num_answer: int, device: torch.device) -> dict:
    """Samples of one landscape image of 2 x 2 tiles, an instruction and an answer."""
    generator = torch.Generator().manual_seed(0)
    height, width = TILE * 3 // 2, TILE * 2
    layout = anyres_layout(height, width, TILE, config.image_grid_pinpoints)
    reserved = COUNT_RULES["unpad_token_grid"](layout, config.image_seq_length)
    text = torch.randint(0, IMAGE_TOKEN_ID, (batch_size, num_text + num_answer), generator=generator)
    input_ids = torch.cat([torch.full((batch_size, reserved), IMAGE_TOKEN_ID), text], dim=1)
    labels = input_ids.clone()
    labels[:, :-num_answer] = -100
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
        "pixel_values": torch.randn(batch_size * layout.num_tiles, 3, TILE, TILE, generator=generator),
        "num_tiles": torch.full((batch_size,), layout.num_tiles),
        "image_sizes": torch.tensor([[height, width]] * batch_size),
    }
    return {name: value.to(device) for name, value in batch.items()}


def straightforward_step(trainer: AvgLlavaRouterTrainer, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The released procedure: a full forward pass per granularity, then tower, projector and router once more.

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
    asked = without_answers(inputs, labels, model.config.image_token_id)
    vision = VisionInputs(**{name: inputs[name] for name in ("pixel_values", "num_tiles", "image_sizes")})
    compressed = model.model.compress_prompt(asked["input_ids"], vision, asked["attention_mask"])
    loss = trainer.router_loss(compressed.router_logits, losses)
    loss.backward()
    return loss.detach(), losses


@torch.no_grad()
def tower_share(model: AvgLlavaForConditionalGeneration, batch: dict, repeats: int) -> float:
    """Share of the tower in a forward pass at the finest granularity."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    tower, whole = [], []
    for _ in range(repeats + 1):
        tower.append(seconds(lambda: model.model.encode(inputs["pixel_values"])))
        whole.append(seconds(lambda: model(**inputs, vtc_budget="full", logits_to_keep=1, use_cache=False)))
    return statistics.median(tower[1:]) / statistics.median(whole[1:])


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call, with all that it left to the GPU."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(trainer: AvgLlavaRouterTrainer, batch: dict, repeats: int) -> dict:
    """Median seconds of both steps, taken in turns, and how far their losses are apart."""
    model, num_images = trainer.model, torch.tensor(len(batch["num_tiles"]))
    ours, theirs = [], []
    for _ in range(repeats + 1):
        model.zero_grad()
        ours.append(seconds(lambda: trainer.training_step(model, dict(batch), num_images)))
        model.zero_grad()
        theirs.append(seconds(lambda: straightforward_step(trainer, batch)))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    losses, _ = trainer.measure(model, batch["labels"], inputs)
    _, expected = straightforward_step(trainer, batch)
    return {
        "once_s": statistics.median(ours[1:]),
        "straightforward_s": statistics.median(theirs[1:]),
        "largest_loss_difference": float((losses - expected).abs().max()),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 14], help="decoder layers, one model each")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--text-tokens", type=int, default=48)
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3, help="measured rounds after one for warming up")
    parser.add_argument("--threads", type=int, default=None, help="default: as torch decides")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device, console, results = torch.device(arguments.device), Console(stderr=arguments.json), []
    table = Table(
        title=f"RGLF step, {arguments.batch_size} samples, {torch.get_num_threads()} threads", pad_edge=False
    )
    for name in ("decoder layers", "tower's share", "straightforward", "tower once", "speed-up", "loss difference"):
        table.add_column(name, justify="right")
    for num_layers in arguments.layers:
        model = build_model(num_layers, device)
        batch = build_batch(model.config, arguments.batch_size, arguments.text_tokens, arguments.answer_tokens, device)
        with tempfile.TemporaryDirectory() as folder:
            options = TrainingArguments(folder, report_to=[], use_cpu=device.type == "cpu", disable_tqdm=True)
            trainer = AvgLlavaRouterTrainer(model, options)
            trainer.create_optimizer()
            result = {"layers": num_layers, **compare(trainer, batch, arguments.repeats)}
        result["tower_share"] = tower_share(model, batch, arguments.repeats)
        result["speed_up"] = result["straightforward_s"] / result["once_s"]
        results.append(result)
        table.add_row(
            str(num_layers),
            f"{result['tower_share']:.1%}",
            f"{result['straightforward_s']:.2f} s",
            f"{result['once_s']:.2f} s",
            f"{result['speed_up']:.2f}x",
            f"{result['largest_loss_difference']:.1e}",
        )
    if arguments.json:
        sys.stdout.write(json.dumps({"goal": GOAL, "goal_tower_share": GOAL_TOWER_SHARE, "results": results}) + "\n")
        return
    console.print(table)
    counted = [result["speed_up"] for result in results if result["tower_share"] >= GOAL_TOWER_SHARE]
    if not counted:
        console.print("no model's tower takes a third of a forward pass: give fewer --layers")
        return
    console.print(
        f"lowest speed-up where the tower takes at least a third: {min(counted):.2f}x, the goal of {GOAL:g}x is "
        f"{'met' if min(counted) >= GOAL else 'NOT met'}"
    )


if __name__ == "__main__":
    main()
