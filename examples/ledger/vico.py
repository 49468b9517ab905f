"""Train `model_cards/vico-ledger` from the base of `ledger.base`: consistency, gates, router.

    PYTHONPATH=examples python -m ledger.vico --base outputs/ledger/base --output outputs/ledger/vico

The two stages are those of `hf_vtc.trainers`; the tower stays as it is in both. Between them stand the gates of
`ledger.gates`: where one fails no router is trained, since there would be nothing for it to choose.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from transformers import set_seed

import hf_vtc
from hf_vtc.data import VtcCollator
from hf_vtc.trainers import VicoConsistencyTrainer, VicoRouterTrainer

from .gates import require_gates
from .sizes import SIZES
from .stages import Conversations, build_processor, load, run_stage, save, stage_arguments, trained_parts

CONSISTENCY_PAGES_SEED, ROUTER_PAGES_SEED = 100, 200


def train_consistency(model, reference, processor, args: argparse.Namespace, console: Console) -> None:
    """Stage 1, in place; the share of compressed tiles differs from page to page."""
    size = SIZES[args.size]
    optimizer = torch.optim.AdamW(trained_parts(model, "vision_tower", "router"), lr=args.rate, weight_decay=0.01)
    trainer = VicoConsistencyTrainer(
        model,
        stage_arguments(args.work / "consistency", size, size.consistency_steps, args.rate, args.seed),
        reference_model=reference,
        compress_probability=(0.2, 1.0),
        train_dataset=Conversations(size.consistency_steps * size.method_batch, CONSISTENCY_PAGES_SEED + args.seed),
        data_collator=VtcCollator(processor),
        optimizers=(optimizer, None),
    )
    run_stage(trainer, console, "consistency")


def train_router(model, reference, processor, args: argparse.Namespace, console: Console) -> None:
    """Stage 2, in place: labels from compressing one tile at a time."""
    size = SIZES[args.size]
    trainer = VicoRouterTrainer(
        model,
        stage_arguments(args.work / "router", size, size.router_steps, 2e-3, args.seed),
        reference_model=reference,
        probe="one_tile",
        percentile=args.percentile,
        train_dataset=Conversations(size.router_steps * size.method_batch, ROUTER_PAGES_SEED + args.seed),
        data_collator=VtcCollator(processor),
    )
    run_stage(trainer, console, "router")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of ledger.base")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--work", type=Path, default=Path("outputs/ledger/vico-work"))
    parser.add_argument("--consistency", type=Path, help="folder after stage 1, to go on from there")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of stage 1")
    parser.add_argument("--percentile", type=float, default=80.0, help="of past loss ratios, the router's threshold")
    parser.add_argument("--gate-questions", type=int, default=600, help="0: go on without the gates")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    console = Console(width=119)
    set_seed(args.seed)
    processor = build_processor(args.base)
    reference = hf_vtc.convert.from_base(args.base, "vico", dtype=torch.float32)
    if args.consistency is None:
        model = hf_vtc.convert.from_base(args.base, "vico", dtype=torch.float32, flash_mode=True)
        train_consistency(model, reference, processor, args, console)
        save(model, processor, args.work / "after_consistency")
    model, _ = load(args.consistency or args.work / "after_consistency")
    if args.gate_questions:
        require_gates(model, processor, args.gate_questions, console, args.work / "gates.json")
    train_router(model, reference, processor, args, console)
    save(model, processor, args.output, torch.bfloat16)
    console.print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
