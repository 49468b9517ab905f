"""What visual tokens hold, before any language model learns: linear readouts of means of the frozen tower's features.

    PYTHONPATH=examples python -m ledger.readout outputs/ledger/base/tower

For 16, 8, 4, 2 and 1 tokens per tile, logistic regressions name each digit from the token under its middle: of a table
one regression for each place within a token, of a box a single one. They learn on training pages, all on as many
examples, and are measured on held-out ones. A language model may read more than a linear readout does; what this shows
is where tokens grow too few.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from train_base import to_pixel_values
from transformers import InternVLVisionModel

from hf_vtc.models.grids_vtc import pooled_grid

from .dataset import PagePool
from .pages import FIELD_SIZE, TABLE_SIDE, Field, field_bits

SCALES = (16, 8, 4, 2, 1)
TRAIN_SEED, TEST_SEED = 50, 52


def tiles_of(pool: PagePool, kind: str) -> tuple[np.ndarray, list[Field]]:
    """The tiles of one kind, and what each shows."""
    found = [
        (tiles[place], field)
        for tiles, fields in zip(pool.tiles, pool.fields, strict=True)
        for place, field in enumerate(fields)
        if field.kind == kind
    ]
    return np.stack([tile for tile, _ in found]), [field for _, field in found]


@torch.no_grad()
def token_maps(tower: torch.nn.Module, tiles: np.ndarray) -> torch.Tensor:
    """Features `(T, C, 4, 4)`, means of the patches under each of 16 tokens."""
    features = tower(to_pixel_values(tiles)).last_hidden_state[:, 1:]
    side = int(features.shape[1] ** 0.5)
    maps = features.transpose(1, 2).unflatten(2, (side, side))
    return torch.nn.functional.adaptive_avg_pool2d(maps, TABLE_SIDE)


def tokens_at(maps: torch.Tensor, scale: int) -> torch.Tensor:
    """Means `(T, C, rows, columns)` at a granularity."""
    return torch.nn.functional.adaptive_avg_pool2d(maps, pooled_grid(TABLE_SIDE, scale))


def examples_of(maps: torch.Tensor, fields: Sequence[Field], scale: int) -> dict[int, tuple[list, list]]:
    """Inputs and digits by task: the place of a table's digit within its token, or of a box's within its number."""
    tokens, tasks = tokens_at(maps, scale), {}
    height, width = (TABLE_SIDE // side for side in tokens.shape[2:])
    for tile, field in enumerate(fields):
        for digit, (left, top, right, bottom) in zip(field.text, field.areas, strict=True):
            row, column = (
                (first + last) // 2 * TABLE_SIDE // FIELD_SIZE for first, last in ((top, bottom), (left, right))
            )
            within = row % height * TABLE_SIDE + column % width
            task = within if field.kind == "table" else 0
            inputs, digits = tasks.setdefault(task, ([], []))
            inputs.append(tokens[tile, :, row // height, column // width].numpy())
            digits.append(digit)
    return tasks


def measure(tower: torch.nn.Module, num_pages: int) -> dict[str, dict[int, float]]:
    """Share of held-out digits that the readouts name right, by kind of field and tokens per tile."""
    pools = PagePool(num_pages, "train", TRAIN_SEED), PagePool(num_pages // 2, "test", TEST_SEED)
    found: dict[str, dict[int, float]] = {}
    for kind in ("table", "box"):
        (train_tiles, learned_fields), (test_tiles, asked_fields) = (tiles_of(pool, kind) for pool in pools)
        train_maps, test_maps = token_maps(tower, train_tiles), token_maps(tower, test_tiles)
        found[kind] = {}
        for scale in SCALES:
            learned, right = examples_of(train_maps, learned_fields, scale), []
            for task, (inputs, digits) in examples_of(test_maps, asked_fields, scale).items():
                # as many examples for every readout, whatever the number of places in a token
                shown, names = (part[: len(learned_fields)] for part in learned[task])
                readout = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(
                    np.stack(shown), names
                )
                right += list(readout.predict(np.stack(inputs)) == np.array(digits))
            found[kind][scale] = float(np.mean(right))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tower", help="folder of the tower that ledger.base saved")
    parser.add_argument("--pages", type=int, default=800, help="training pages; half as many held-out ones")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args(arguments)
    found = measure(InternVLVisionModel.from_pretrained(args.tower).eval(), args.pages)
    table = Table("", *(f"{scale} per tile" for scale in SCALES), title="held-out digits named right")
    for kind, shares in found.items():
        table.add_row(f"{kind}: bits per token", *(f"{field_bits(kind) / scale:.1f}" for scale in SCALES))
        table.add_row(f"{kind}: right", *(f"{shares[scale]:.1%}" for scale in SCALES))
    Console(width=119).print(table)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
