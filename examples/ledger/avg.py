"""Train `model_cards/avg-llava-ledger` from the base of `ledger.base`: all granularities, gates, router.

    PYTHONPATH=examples python -m ledger.avg --base outputs/ledger/base --output outputs/ledger/avg

Stages 3 and 4 of AVG-LLaVA are those of `hf_vtc.trainers`; its stages 1 and 2 are the base. The base gives 16 tokens
per tile, so granularities are 16, 8, 4, 2 and 1. Between the stages stand the gates of `ledger.gates`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from transformers import set_seed

import hf_vtc
from hf_vtc.data import VtcCollator
from hf_vtc.trainers import AvgLlavaGranularityTrainer, AvgLlavaRouterTrainer

from .gates import require_gates
from .sizes import SIZES
from .stages import Conversations, build_processor, load, run_stage, save, stage_arguments

GRANULARITY_PAGES_SEED, ROUTER_PAGES_SEED = 300, 400


def train_granularities(model, processor, args: argparse.Namespace, console: Console) -> None:
    """Stage 3, in place; tower and projector stay as they are, or they would learn to pack a tile into few tokens."""
    size = SIZES[args.size]
    model.model.multi_modal_projector.requires_grad_(False)
    trainer = AvgLlavaGranularityTrainer(
        model,
        stage_arguments(args.work, size, size.granularity_steps, args.rate, args.seed),
        train_dataset=Conversations(size.granularity_steps * size.method_batch, GRANULARITY_PAGES_SEED + args.seed),
        data_collator=VtcCollator(processor),
    )
    run_stage(trainer, console, "granularities")


def train_router(model, processor, args: argparse.Namespace, console: Console) -> None:
    """Stage 4, in place, one question per page: a page with questions of all kinds needs the finest granularity."""
    size = SIZES[args.size]
    num_pages = 2 * size.avg_router_steps * size.method_batch
    trainer = AvgLlavaRouterTrainer(
        model,
        stage_arguments(args.work, size, size.avg_router_steps, 5e-3, args.seed, batch=2 * size.method_batch),
        loss_tolerance=args.tolerance,
        ce_loss_weight=1.0,
        train_dataset=Conversations(num_pages, ROUTER_PAGES_SEED + args.seed, max_questions=1),
        data_collator=VtcCollator(processor),
    )
    run_stage(trainer, console, "router")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of ledger.base")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--work", type=Path, default=Path("outputs/ledger/avg-work"))
    parser.add_argument("--stage-3", type=Path, help="folder after stage 3, to go on from there")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--granularities", type=int, nargs="+", help="tokens per tile, coarse first; default: 1 to 16")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of stage 3")
    parser.add_argument("--tolerance", type=float, default=0.1, help="nats per token within which losses are equal")
    parser.add_argument("--gate-questions", type=int, default=600, help="0: go on without the gates")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    console = Console(width=119)
    set_seed(args.seed)
    processor = build_processor(args.base)
    if args.stage_3 is None:
        # a router of minutes learns from the first step: with dropout it does not find the question beside the page
        fields = {"router_dropout": 0.0}
        if args.granularities is not None:
            fields["vis_token_granularity"] = args.granularities
        model = hf_vtc.convert.from_base(args.base, "avg_llava", dtype=torch.float32, **fields)
        train_granularities(model, processor, args, console)
        save(model, processor, args.work / "after_stage_3")
    model, _ = load(args.stage_3 or args.work / "after_stage_3")
    if args.gate_questions:
        require_gates(model, processor, args.gate_questions, console, args.work / "gates.json")
    train_router(model, processor, args, console)
    save(model, processor, args.output, torch.bfloat16)
    console.print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
