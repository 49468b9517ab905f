"""How time and memory to the first token grow: with tiles, images per row, rows, and in training with the vocabulary.

    python examples/benchmark_scale.py --output outputs/scale

Each method keeps half of its visual tokens (ConvLLaVA all, since it has no budget) and takes turns with its oracle,
what the tokens that are kept cost in plain transformers with the same weights: the ideal line. One picture per axis,
time and memory, both axes logarithmic, and all figures as JSON and Markdown. ViCO alone has a free number of tiles.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmark_parts import training
from benchmark_parts.cases import METHODS, SIZES, build, prompts, shape_of, takes
from benchmark_parts.first_token import TOLERANCES, require_equal
from benchmark_parts.rounds import Limits, peak_bytes, take_turns
from benchmark_parts.writing import environment, mebibytes, milliseconds, times
from transformers import PreTrainedModel

from hf_vtc.report.measured import Oracle

AXES = {
    "tiles": (1, 2, 5, 10, 20, 40),
    "images": (1, 2, 4, 8, 16),
    "batch": (1, 2, 4, 8, 16, 32),
    "vocabulary": (1000, 8000, 32000, 152000),
}
_LABELS = {
    "tiles": "tiles of one image",
    "images": "images of one row",
    "batch": "rows of a batch",
    "vocabulary": "tokens of the vocabulary (training step)",
}


def tiles_of(model: PreTrainedModel, num_tiles: int, num_text_tokens: int = 64) -> dict[str, torch.Tensor]:
    """One row with one image of so many tiles."""
    generator = torch.Generator().manual_seed(0)
    config, before = model.config, num_text_tokens // 2
    text = torch.randint(10, config.text_config.vocab_size, (1, num_text_tokens), generator=generator)
    image = torch.full((1, num_tiles * config.image_seq_length), config.image_token_id)
    input_ids = torch.cat([text[:, :before], image, text[:, before:]], dim=1)
    side = config.tile_size
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(num_tiles, 3, side, side, generator=generator),
        "num_tiles": torch.tensor([num_tiles]),
    }


@torch.no_grad()
def first_token(axis: str, value: int, method: str, size: str, limits: Limits) -> dict[str, Any]:
    """One point of a line."""
    shape = shape_of(method, size)
    model = build(method, shape, torch.float32, limits.device)
    if axis == "tiles":
        inputs = {name: tensor.to(limits.device) for name, tensor in tiles_of(model, value).items()}
    else:
        rows, images = (value, 1) if axis == "batch" else (1, value)
        inputs = prompts(model, shape, rows, images_per_row=images)
    budget = 0.5 if takes(model, inputs, 0.5) else "full"
    out = model(**inputs, vtc_budget=budget, logits_to_keep=1)
    oracle = Oracle(model, inputs, budget)
    require_equal(f"{method}, {axis} {value}", out.logits, oracle.logits(), TOLERANCES[torch.float32])
    variants = {
        "oracle": oracle.logits,
        "ours": lambda: model(**inputs, vtc_budget=budget, logits_to_keep=1, use_cache=True),
    }
    rounds = take_turns(variants, [("oracle", "ours")], limits)
    return {
        "kept": int(out.num_visual_tokens.sum()),
        "seconds": vars(rounds.spread("ours")),
        "oracle_seconds": vars(rounds.spread("oracle")),
        "eta": vars(rounds.ratio("oracle", "ours")),
        "bytes": peak_bytes(variants["ours"], limits.device),
        "oracle_bytes": peak_bytes(variants["oracle"], limits.device),
    }


def points(arguments: argparse.Namespace, limits: Limits) -> Iterator[dict[str, Any]]:
    """All points of all axes."""
    for axis in arguments.axes:
        for method in ["vico"] if axis == "tiles" else arguments.methods:
            for value in AXES[axis]:
                if axis == "vocabulary":
                    (row, *_) = training.measure(method, arguments.size, 1, value, False, ["auto"], limits)
                    names = ("kept", "seconds", "oracle_seconds", "eta", "bytes", "oracle_bytes")
                    found = {name: row[name] for name in names}
                else:
                    found = first_token(axis, value, method, arguments.size, limits)
                yield {"axis": axis, "value": value, "method": method, **found}


def table(rows: list[dict[str, Any]]) -> str:
    """One row per point."""
    lines = ["| axis | value | method | tokens | ms (p10-p90) | ideal | eta | MiB | ideal MiB |", "|" + " --- |" * 9]
    for row in rows:
        cells = [row["axis"], str(row["value"]), row["method"], str(row["kept"]), milliseconds(row["seconds"])]
        cells += [milliseconds(row["oracle_seconds"]), times(row["eta"])]
        lines.append(f"| {' | '.join([*cells, mebibytes(row['bytes']), mebibytes(row['oracle_bytes'])])} |")
    return "\n".join(lines)


def draw(axis: str, rows: list[dict[str, Any]], path: Path) -> None:
    """Time and memory over an axis; dashed lines are the ideal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for panel, name, unit, of in (
        (panels[0], "seconds", 1.0, lambda value: value["median"]),
        (panels[1], "bytes", 2**20, lambda value: value),
    ):
        for idx, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            own = [row for row in rows if row["method"] == method]
            values, colour = [row["value"] for row in own], f"C{idx}"
            panel.plot(values, [of(row[name]) / unit for row in own], "o-", color=colour, label=method, markersize=3)
            ideal = [of(row[f"oracle_{name}"]) / unit for row in own]
            panel.plot(values, ideal, "--", color=colour, linewidth=1)
        panel.set(xscale="log", yscale="log", xlabel=_LABELS[axis], ylabel="MiB" if name == "bytes" else name)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.suptitle("solid: measured, dashed: what the kept tokens cost in plain transformers", fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--axes", nargs="+", choices=tuple(AXES), default=list(AXES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--most-seconds", type=float, default=5.0, help="for the rounds of one point")
    parser.add_argument("--clock", choices=("wall", "process"), default="wall", help="process: seconds of its own")
    parser.add_argument("--threads", type=int, help="default: as torch decides")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("outputs/scale"), help="a folder")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    limits = Limits(torch.device(arguments.device), arguments.most_seconds, arguments.clock == "process")
    about, rows = environment("python examples/benchmark_scale.py " + " ".join(sys.argv[1:])), []
    arguments.output.mkdir(parents=True, exist_ok=True)
    for row in points(arguments, limits):
        rows.append(row)
        print(f"{row['axis']} {row['value']} {row['method']}: eta {times(row['eta'])}", flush=True)
    text = json.dumps({"environment": about, "rows": rows}, indent=1) + "\n"
    (arguments.output / "scale.json").write_text(text, encoding="utf-8")
    (arguments.output / "scale.md").write_text(f"`{about['command']}`\n\n{table(rows)}\n", encoding="utf-8")
    for axis in arguments.axes:
        own = [row for row in rows if row["axis"] == axis]
        if own:
            draw(axis, own, arguments.output / f"{axis}.png")


if __name__ == "__main__":
    main()
