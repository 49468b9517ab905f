"""How much of its ideal speed-up LLaVolta's training step reaches: (2, 8) against no compression.

    python examples/benchmark_llavolta_step.py

A randomly initialised LLaVA-like model (what weights say does not change the time) of at least 200 M parameters in the
language model sees 576 visual tokens per image, as LLaVA-1.5 does; the tower is frozen, as in the recipe. Steps with
and without compression take turns in one run, so that a machine that slows down slows both. Forward, backward and
optimizer step are timed; measured speed-up / speed-up by FLOPs is printed, the goal is 0.9.
"""

import argparse
import json
import statistics
import sys
import time

import torch
from rich.console import Console

from hf_vtc.models.configuration_llavolta import LlavoltaConfig
from hf_vtc.models.modeling_llavolta import LlavoltaForConditionalGeneration

GOAL = 0.9
VOCAB_SIZE = 8192
IMAGE_TOKEN_ID = VOCAB_SIZE - 1
# 24 x 24 patches; a small tower, since the language model is what gets faster
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 336,
    "patch_size": 14,
}
# 16 layers of 12.6 M parameters and a vocabulary of 8 k: 218 M
TEXT = {
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 1024,
    "intermediate_size": 2752,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 4096,
}


def build_model(num_layers: int, device: torch.device, dtype: torch.dtype) -> LlavoltaForConditionalGeneration:
    """A random model in training mode, tower frozen."""
    torch.manual_seed(0)
    config = LlavoltaConfig(
        dict(VISION),
        {**TEXT, "num_hidden_layers": num_layers},
        vision_feature_layer=-2,
        image_token_id=IMAGE_TOKEN_ID,
        compress_layer_idx=2,
        compress_stride=8,
    )
    model = LlavoltaForConditionalGeneration(config).to(device, dtype).train()
    model.model.vision_tower.requires_grad_(False)
    return model


def build_batch(model: LlavoltaForConditionalGeneration, batch_size: int, num_text_tokens: int) -> dict:
    """One image per row, half of the text before it, half behind, of which half is an answer."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, IMAGE_TOKEN_ID, (batch_size, num_text_tokens), generator=generator)
    image = torch.full((batch_size, model.config.image_seq_length), IMAGE_TOKEN_ID)
    before = num_text_tokens // 2
    input_ids = torch.cat([text[:, :before], image, text[:, before:]], dim=1)
    labels = input_ids.masked_fill(torch.arange(input_ids.shape[1]) < input_ids.shape[1] - num_text_tokens // 4, -100)
    side = VISION["image_size"]
    batch = {
        "input_ids": input_ids,
        "labels": labels,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(batch_size, 3, side, side, generator=generator).to(model.dtype),
    }
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def step_flops(config: LlavoltaConfig, num_text_tokens: int, compressed: bool) -> float:
    """Multiplications and additions of forward and backward, per row: linear layers and attention, tower forward only.

    A backward pass costs two forward passes, of the tower (frozen, in front of everything) none.
    """
    text, vision = config.text_config, config.vision_config
    width, inner = text.hidden_size, text.intermediate_size
    visual, layer_idx = config.image_seq_length, config.compress_layer_idx if compressed else text.num_hidden_layers
    lengths = [num_text_tokens + visual] * layer_idx
    lengths += [num_text_tokens + config.kept_tokens(visual, config.compress_stride)] * (
        text.num_hidden_layers - layer_idx
    )
    # causal: half of the scores, though kernels for short sequences compute all of them
    decoder = sum(2 * length * (4 * width**2 + 3 * width * inner) + 2 * length**2 * width for length in lengths)
    head = 2 * lengths[-1] * width * text.vocab_size
    projector = 2 * visual * (vision.hidden_size * width + width**2)
    patches, hidden = visual + 1, vision.hidden_size
    per_layer = 2 * patches * (4 * hidden**2 + 2 * hidden * vision.intermediate_size) + 4 * patches**2 * hidden
    return 3.0 * (decoder + head + projector) + per_layer * vision.num_hidden_layers


def timed_step(model, optimizer, batch: dict, budget: str) -> float:
    """Seconds of one optimizer step."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(**batch, vtc_budget=budget, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=TEXT["num_hidden_layers"], help="of the decoder")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps of each kind")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=None, help="default: as torch decides")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    console = Console(stderr=arguments.json)
    model = build_model(arguments.layers, torch.device(arguments.device), getattr(torch, arguments.dtype))
    parameters = sum(parameter.numel() for parameter in model.model.language_model.parameters())
    batch = build_batch(model, arguments.batch_size, arguments.text_tokens)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # without states, so that the optimizer is a small part of a step, as it is of a large batch
    optimizer = torch.optim.SGD(trained, lr=1e-4)
    times = {"full": [], "auto": []}
    for _ in range(arguments.warmup + arguments.repeats):
        for budget in times:
            times[budget].append(timed_step(model, optimizer, batch, budget))
    median = {budget: statistics.median(values[arguments.warmup :]) for budget, values in times.items()}
    flops = {budget: step_flops(model.config, arguments.text_tokens, compressed=budget == "auto") for budget in times}
    measured, ideal = median["full"] / median["auto"], flops["full"] / flops["auto"]
    result = {
        "language_model_parameters": parameters,
        "visual_tokens": model.config.image_seq_length,
        "batch_size": arguments.batch_size,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "seconds": median,
        "speedup": measured,
        "speedup_by_flops": ideal,
        "share": measured / ideal,
        "goal": GOAL,
    }
    if arguments.json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
        return
    console.print(
        f"{parameters / 1e6:.0f} M parameters in the language model, {model.config.image_seq_length} visual tokens, "
        f"batch {arguments.batch_size}, {arguments.dtype} on {arguments.device}, {torch.get_num_threads()} threads"
    )
    console.print(f"step without compression {median['full']:.3f} s, with (2, 8) {median['auto']:.3f} s")
    verdict = "met" if measured / ideal >= GOAL else "NOT met"
    console.print(
        f"speed-up {measured:.2f}, by FLOPs {ideal:.2f}, share {measured / ideal:.3f}: the goal of {GOAL} is {verdict}"
    )


if __name__ == "__main__":
    main()
