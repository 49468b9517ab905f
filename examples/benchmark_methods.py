"""Every method against what could be: its oracle, plain transformers, and the straightforward procedure in training.

    python examples/benchmark_methods.py --size small         # some four minutes on two idle cores
    python examples/benchmark_methods.py                      # a decoder of 100 M parameters, more than an hour
    python examples/benchmark_methods.py --parts training --vocabularies 32000 152000

Parts, each in one run whose variants take turns, so that a machine that slows down slows all of them:

- first-token: from pixels to the first token. The oracle runs the same tower, the connectors that were needed, and the
  stock language model on embeddings that are packed already; for AVG-LLaVA's router under "auto" also its matrix
  products. eta = oracle / ours; of "full" the oracle is plain transformers with the same weights.
- training: one optimizer step of each trainer, and of the next-token loss in full and under LoRA.
- router-step: AVG-LLaVA's router training against one forward pass of the whole model per granularity.
- tower: ConvLLaVA's tower against transformers' `ConvNextModel`.

Ratios are medians over the rounds; rounds go on until a repeated run would agree within 5 % in 19 of 20 cases, or the
time of a group is up: then the run says that the machine is too noisy, marks what it is unsure of by ~, and ends with
status 3. Where outputs differ it reports nothing more and ends with status 2. Memory is the peak of tensors beyond
those that were there before a call. Results are written as JSON and as tables of Markdown.

On a machine that has other work too, `--clock process` counts seconds that this process spends on CPUs: what a call
costs, not how long it takes.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmark_parts import conv_tower, first_token, router_step, training
from benchmark_parts.cases import METHODS, ON_GRIDS, SIZES
from benchmark_parts.first_token import DifferentOutputs
from benchmark_parts.rounds import Limits
from benchmark_parts.writing import environment, table, unsteady, write

PARTS = ("first-token", "training", "router-step", "tower")
OUTPUTS_DIFFER, TOO_NOISY = 2, 3
# decoder layers that give the tower from two thirds to a tenth of a forward pass
_ROUTER_LAYERS = {"tiny": [2], "small": [2, 6, 10, 40], "100m": [4, 8, 20, 48]}


def budget(text: str) -> str | float:
    return text if text == "auto" else float(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="100m")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["first-token"])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *ON_GRIDS], default=list(METHODS))
    parser.add_argument("--budgets", nargs="+", type=budget, default=["auto", 0.5, 0.25], help="beside 'full'")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8], help="of the first token")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--training-batch", type=int, default=2)
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[32000], help="of the decoders that train")
    parser.add_argument("--kinds", nargs="+", choices=("full", "lora"), default=["full", "lora"], help="of training")
    parser.add_argument("--layers", nargs="+", type=int, help="of the decoder, for the router step")
    parser.add_argument("--compiled", action="store_true", help="the tower by torch.compile too")
    parser.add_argument("--most-seconds", type=float, help="for the rounds of one group")
    parser.add_argument("--threads", type=int, help="default: as torch decides")
    parser.add_argument("--clock", choices=("wall", "process"), default="wall", help="process: seconds of its own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_methods.json"))
    arguments = parser.parse_args()
    if arguments.most_seconds is None:
        arguments.most_seconds = {"tiny": 1.0, "small": 10.0, "100m": 120.0}[arguments.size]
    return arguments


def groups(arguments: argparse.Namespace) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """What is measured together, by name, and its rows."""
    limits = Limits(torch.device(arguments.device), arguments.most_seconds, arguments.clock == "process")
    if "first-token" in arguments.parts:
        for method in arguments.methods:
            for batch_size in arguments.batch_sizes:
                for name in arguments.dtypes:
                    rows = first_token.measure(
                        method,
                        arguments.size,
                        batch_size,
                        getattr(torch, name),
                        arguments.budgets,
                        limits,
                    )
                    yield f"first token, {method}, batch {batch_size}, {name}", rows
    if "training" in arguments.parts:
        for method in arguments.methods:
            for vocabulary in arguments.vocabularies:
                for kind in arguments.kinds:
                    own = ["full", *arguments.budgets]
                    given = (arguments.size, arguments.training_batch, vocabulary, kind == "lora", own, limits)
                    yield f"training, {method}, vocabulary {vocabulary}, {kind}", training.measure(method, *given)
    if "router-step" in arguments.parts:
        layers = arguments.layers or _ROUTER_LAYERS[arguments.size]
        yield "router step", router_step.measure(arguments.size, 1, layers, limits)
    if "tower" in arguments.parts:
        yield "tower", conv_tower.measure(arguments.size, 1, limits, arguments.compiled)


def main() -> int:
    arguments = parse_arguments()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    # full float32, or differences would show the precision of the matrix units
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rows = []
    about = environment("python examples/benchmark_methods.py " + " ".join(sys.argv[1:]))
    try:
        for name, found in groups(arguments):
            print(name, file=sys.stderr, flush=True)
            rows += found
            # as they come, so that a run that is cut off still counts
            write(arguments.output, rows, about)
    except DifferentOutputs as problem:
        print(f"Outputs differ, nothing more is reported: {problem}", file=sys.stderr)
        return OUTPUTS_DIFFER
    print(table(rows))
    noisy = unsteady(rows)
    if noisy:
        print("machine too noisy:\n" + "\n".join(noisy), file=sys.stderr)
        return TOO_NOISY
    return 0


if __name__ == "__main__":
    sys.exit(main())
