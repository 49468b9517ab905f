"""ConvLLaVA's tower against transformers' ConvNextModel with the same weights, in the same run.

    python examples/benchmark_convnext.py                              # ConvNeXt-L with five stages at 1536 pixels
    python examples/benchmark_convnext.py --resolution 256 --widths 16 32 64 128 256 --depths 1 1 3 1 2

Random weights (what they say does not change the time) with a layer scale of 0.1, so that every block shows in the
outputs. Variants take turns in one run, so that a machine that slows down slows all of them:

- stock: `ConvNextModel`;
- ours: the tower of `hf_vtc`, eagerly;
- channels-last: weights and pixels in channels-last memory (between stages, maps are kept so in any case);
- folded: layer scale multiplied into the weights;
- both: channels-last and folded;
- compiled: both, by `torch.compile`.

Printed are median times, ratios to stock (medians of the ratios within a round), and the largest difference of the
outputs. The goal: ours at most 1.02, outputs equal within 1e-5 (absolute and relative). About twenty minutes and 8 GB
on 2 CPU cores.
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import ConvNextModel, PretrainedConfig

from hf_vtc.models.configuration_convllava import ConvllavaConfig
from hf_vtc.models.modeling_convllava import ConvNextTower
from hf_vtc.report.measured import in_turns

GOAL = 1.02
TOLERANCE = 1e-5
LAYER_SCALE = 0.1


def build_towers(widths: list[int], depths: list[int], resolution: int) -> tuple[ConvNextModel, ConvNextTower]:
    """The stock model and our tower with the same random weights, in eval mode."""
    torch.manual_seed(0)
    vision = {
        "hidden_sizes": widths,
        "depths": depths,
        "image_size": resolution,
        "layer_scale_init_value": LAYER_SCALE,
    }
    config = ConvllavaConfig(vision).vision_config
    stock = ConvNextModel(config).eval()
    return stock, tower_of(stock, config)


def tower_of(module: nn.Module, config: PretrainedConfig) -> ConvNextTower:
    """A tower with the weights of another module, in the same memory."""
    with torch.device("meta"):
        tower = ConvNextTower(config).eval()
    loaded = tower.load_state_dict(module.state_dict(), strict=False, assign=True)
    assert not loaded.missing_keys and set(loaded.unexpected_keys) <= {"layernorm.weight", "layernorm.bias"}
    return tower


def build_variants(
    stock: ConvNextModel, tower: ConvNextTower, pixel_values: torch.Tensor, compiled: bool
) -> dict[str, Callable[[], torch.Tensor]]:
    """Functions that give the last stage's map `(B, C, h, w)`, by name; weights exist twice, folded and not."""
    folded = copy.deepcopy(tower).fold_layer_scale()
    channels_last = tower_of(tower, tower.config).to(memory_format=torch.channels_last)
    both = tower_of(folded, folded.config).to(memory_format=torch.channels_last)
    pixels_last = pixel_values.contiguous(memory_format=torch.channels_last)
    variants = {
        "stock": lambda: stock(pixel_values).last_hidden_state,
        "ours": lambda: tower(pixel_values)[0],
        "channels-last": lambda: channels_last(pixels_last)[0],
        "folded": lambda: folded(pixel_values)[0],
        "both": lambda: both(pixels_last)[0],
    }
    if compiled:
        program = torch.compile(both)
        variants["compiled"] = lambda: program(pixels_last)[0]
    return variants


@torch.inference_mode()
def differences(variants: dict[str, Callable[[], torch.Tensor]]) -> dict[str, dict[str, float | bool]]:
    """Largest difference to the stock outputs, and whether all are equal within the tolerance, as torch.allclose."""
    expected, found = variants["stock"](), {}
    for name, variant in variants.items():
        maps = variant()
        equal = torch.allclose(maps, expected, rtol=TOLERANCE, atol=TOLERANCE)
        found[name] = {"difference": float((maps - expected).abs().max()), "equal": equal}
    return found


def report(seconds: dict[str, list[float]], difference: dict[str, dict]) -> dict[str, dict[str, float | bool]]:
    """Median time, median of the ratios to stock within a round, and difference of each variant."""
    return {
        name: {
            "seconds": statistics.median(values),
            "ratio": statistics.median(one / base for one, base in zip(values, seconds["stock"], strict=True)),
            **difference[name],
        }
        for name, values in seconds.items()
    }


def as_table(results: dict[str, dict[str, float]], title: str) -> Table:
    table = Table("tower", "median", "to stock", "largest difference", title=title)
    for name, row in results.items():
        table.add_row(name, f"{row['seconds']:.3f} s", f"{row['ratio']:.3f}", f"{row['difference']:.1e}")
    return table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--resolution", type=int, nargs="+", default=[1536], help="side in pixels, or height and width"
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[192, 384, 768, 1536, 3072])
    parser.add_argument("--depths", type=int, nargs="+", default=[3, 3, 27, 3, 6])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=0, help="rounds before, beside the one that compares outputs")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it needs a C++ compiler")
    parser.add_argument("--threads", type=int, default=None, help="default: as torch decides")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    arguments = parser.parse_args()
    if len(arguments.resolution) > 2:
        parser.error(f"--resolution takes one or two numbers, got {arguments.resolution}")
    if len(arguments.widths) != len(arguments.depths):
        parser.error(f"--widths and --depths need one number per stage, got {arguments.widths} and {arguments.depths}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    # full float32, or differences would show the precision of the matrix units
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device, console = torch.device(arguments.device), Console(stderr=arguments.json)
    height, width = arguments.resolution * 2 if len(arguments.resolution) == 1 else arguments.resolution
    with device:
        stock, tower = build_towers(arguments.widths, arguments.depths, min(height, width))
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(arguments.batch_size, 3, height, width, generator=generator).to(device)

    variants = build_variants(stock, tower, pixel_values, compiled=not arguments.no_compile)
    difference = differences(variants)
    with torch.inference_mode():
        seconds = in_turns(variants, device, arguments.repeats, arguments.warmup)
    results = report(seconds, difference)
    num_parameters = sum(parameter.numel() for parameter in tower.parameters())
    met = results["ours"]["ratio"] <= GOAL and all(row["equal"] for row in results.values())
    if arguments.json:
        content = {
            "resolution": [height, width],
            "batch_size": arguments.batch_size,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "num_parameters": num_parameters,
            "goal": GOAL,
            "tolerance": TOLERANCE,
            "met": met,
            "variants": results,
        }
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
        return
    title = f"{num_parameters / 1e6:.0f} M parameters, {height} x {width}, {torch.get_num_threads()} threads, {device}"
    console.print(as_table(results, title))
    console.print(f"ours at most {GOAL} and outputs equal within {TOLERANCE}: {'met' if met else 'NOT met'}")


if __name__ == "__main__":
    main()
