"""Everything in one command: base, ViCO and AVG-LLaVA with their gates, and the figures of both.

    PYTHONPATH=examples python -m ledger.recipe --size gpu --output outputs/ledger-gpu
    PYTHONPATH=examples python -m ledger.recipe --size dry --output outputs/ledger-dry --questions 12 --no-gates

The second line shows in about a minute that all parts fit together; its models have learned nothing.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from . import avg, base, measure, vico
from .sizes import SIZES


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder of everything that is made")
    parser.add_argument("--questions", type=int, default=3000, help="held-out questions of each evaluation")
    parser.add_argument("--no-gates", action="store_true", help="train routers whatever there is to choose")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    console, start = Console(width=119), time.time()
    common = ["--size", args.size, "--seed", str(args.seed)]
    gates = ["--gate-questions", "0"] if args.no_gates else []
    base.main(["--output", str(args.output / "base"), *common])
    console.print(f"base: {(time.time() - start) / 60:.1f} min")
    for name, method in {"vico": vico, "avg": avg}.items():
        folder = args.output / name
        where = ["--base", str(args.output / "base"), "--output", str(folder), "--work", f"{folder}-work"]
        method.main([*where, *common, *gates])
        measure.main([str(folder), "--questions", str(args.questions), "--json", str(args.output / f"{name}.json")])
        console.print(f"{name}: {(time.time() - start) / 60:.1f} min since the start")


if __name__ == "__main__":
    main()
