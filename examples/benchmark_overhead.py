"""What routing and packing cost: time to first token of a compressed model against its oracle.

    python examples/benchmark_overhead.py

A randomly initialised InternVL-like model of 400 M parameters (what weights say does not change the time) keeps half
of its visual tokens. The oracle runs the same tower, the connectors that are needed, and the language model on
embeddings that are packed already. oracle / measured is printed as eta; the goal is 0.95. Full, compressed and oracle
take turns in one run, so that a machine that slows down slows all of them. About five minutes on 2 CPU cores.
"""

import argparse
import json
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hf_vtc.models.configuration_vico import VicoConfig
from hf_vtc.models.modeling_vico import VicoForConditionalGeneration
from hf_vtc.report import BenchReport, bench

GOAL = 0.95
VOCAB_SIZE = 32000
IMAGE_TOKEN_ID = VOCAB_SIZE - 1
# tower like ViT-B on tiles of 224 pixels (64 visual tokens, 16 if compressed), layers of Qwen3-0.6B
VISION = {
    "model_type": "internvl_vision",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "attention_bias": True,
    "image_size": [224, 224],
    "patch_size": [14, 14],
}
TEXT = {
    "model_type": "qwen3",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def build_model(device: torch.device, dtype: torch.dtype) -> VicoForConditionalGeneration:
    """A random model in eval mode."""
    torch.manual_seed(0)
    config = VicoConfig(dict(VISION), dict(TEXT), image_token_id=IMAGE_TOKEN_ID)
    return VicoForConditionalGeneration(config).to(device, dtype).eval()


def build_inputs(config: VicoConfig, batch_size: int, num_tiles: int, num_text_tokens: int) -> dict[str, torch.Tensor]:
    """Prompts of one image of `num_tiles` tiles, with half of the text before it and half behind."""
    generator = torch.Generator().manual_seed(0)
    image = torch.full((batch_size, num_tiles * config.image_seq_length), IMAGE_TOKEN_ID)
    text = torch.randint(0, IMAGE_TOKEN_ID, (batch_size, num_text_tokens), generator=generator)
    input_ids = torch.cat([text[:, : num_text_tokens // 2], image, text[:, num_text_tokens // 2 :]], dim=1)
    side = VISION["image_size"][0]
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(batch_size * num_tiles, 3, side, side, generator=generator),
        "num_tiles": torch.full((batch_size,), num_tiles),
    }


def summary(reports: list[BenchReport]) -> Table:
    """One row per batch size."""
    table = Table(pad_edge=False)
    for name in ("batch", "tiles", "tokens", "full", "ours", "p90", "oracle", "p90", "eta", "phi"):
        table.add_column(name, justify="right", no_wrap=True)
    for report in reports:
        kept, reserved = sum(report.num_kept), sum(report.num_reserved)
        table.add_row(
            str(report.batch_size),
            str(report.num_tiles),
            f"{kept}/{reserved}",
            *(f"{seconds:.2f}s" for seconds in _seconds(report)),
            f"{report.eta:.3f}",
            "-" if report.phi is None else f"{report.phi:.2f}",
        )
    return table


def _seconds(report: BenchReport) -> tuple[float, ...]:
    return (
        report.full.median,
        report.measured.median,
        report.measured.p90,
        report.oracle.median,
        report.oracle.p90,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tiles", type=int, nargs="+", default=[7, 3], help="tiles per image, one per batch size")
    parser.add_argument("--repeats", type=int, nargs="+", default=[9, 4], help="measured rounds, one per batch size")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--budget", type=float, default=0.5, help="share of the visual tokens")
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--entry", choices=("generate", "forward"), default="generate")
    parser.add_argument("--threads", type=int, default=None, help="default: as torch decides")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    arguments = parser.parse_args()
    for name in ("tiles", "repeats"):
        if len(getattr(arguments, name)) != len(arguments.batch_sizes):
            parser.error(f"--{name} needs one number per batch size, got {getattr(arguments, name)}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model = build_model(torch.device(arguments.device), getattr(torch, arguments.dtype))
    console, reports = Console(stderr=arguments.json), []
    for batch_size, num_tiles, repeats in zip(arguments.batch_sizes, arguments.tiles, arguments.repeats, strict=True):
        inputs = build_inputs(model.config, batch_size, num_tiles, arguments.text_tokens)
        report = bench(model, inputs, arguments.budget, repeats, arguments.warmup, arguments.entry)
        reports.append(report)
        console.print(report, highlight=False)
    if arguments.json:
        content: dict[str, Any] = {"goal": GOAL, "reports": [report.to_dict() for report in reports]}
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
        return
    console.print(f"\n{reports[0].num_parameters / 1e6:.0f} M parameters, {torch.get_num_threads()} threads")
    console.print(summary(reports))
    worst = min(report.eta for report in reports)
    console.print(f"lowest eta {worst:.3f}: the goal of {GOAL} is {'met' if worst >= GOAL else 'NOT met'}")


if __name__ == "__main__":
    main()
