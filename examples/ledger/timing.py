"""How long an answer takes at the sizes of `ledger.sizes`, from page to last token, the tower in.

    PYTHONPATH=examples python -m ledger.timing --size gpu --method vico --budgets 0.5 0.25
    PYTHONPATH=examples python -m ledger.timing --size gpu --method avg_llava --budgets 0.5 0.25

Weights are random: what a token costs does not depend on them, and what a router keeps is given as a budget. Points
take turns, alone and in a batch of eight; answers have as many tokens at every point.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import set_seed

import hf_vtc
from hf_vtc.evaluation import read_questions, records_to_ask
from hf_vtc.evaluation.points import Point
from hf_vtc.evaluation.running import Asker
from hf_vtc.evaluation.summary import FULL
from hf_vtc.evaluation.timing import BATCH_SIZES, HEADER, Times, measure_times

from .base import build_base
from .dataset import evaluation_set, records_of
from .sizes import SIZES
from .stages import build_processor
from .text import build_tokenizer

_ANSWER_TOKENS = 2


def measure(size: str, method: str, budgets: Sequence[float]) -> list[Times]:
    """Times of full length and of each budget, see [`Times`]."""
    set_seed(0)
    tokenizer = build_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        processor = build_processor(folder)
    model = hf_vtc.convert.from_base(build_base(SIZES[size], tokenizer), method, dtype=torch.float32).eval()
    # an answer ends where its time is up, not where random weights say so
    model.generation_config.eos_token_id = None
    records = records_to_ask(records_of(evaluation_set(max(BATCH_SIZES))), None, "kind")
    asker = Asker(model, processor, records, _ANSWER_TOKENS)
    points = [Point(FULL, budget="full"), *(Point(f"{budget:g}", budget=budget) for budget in budgets)]
    return measure_times(asker, read_questions(records, "exact", "kind", "last"), points)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="gpu")
    parser.add_argument("--method", choices=("vico", "avg_llava"), required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25], help="shares of the visual tokens")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args(arguments)
    found = measure(args.size, args.method, args.budgets)
    table = Table(*HEADER[:-1], title=f"{args.method}, size {args.size}, {torch.get_num_threads()} threads")
    for each in found:
        table.add_row(*each.cells()[:-1])
    Console(width=119).print(table)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([vars(each) for each in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
