"""Gates to pass before any router is trained: is there something to choose, and how much would a perfect choice bring?

    PYTHONPATH=examples python -m ledger.gates outputs/ledger/vico-work/after_consistency

1. Every kind of question is answered at full length, 97 % of them.
2. Dense questions are not at the compressed length: at most 70 %.
3. Sparse and coarse ones are, 97 %.
4. The oracle's choice beats every fixed choice with no more tokens, a choice by lot of as many, and the line between
   the fixed points by 5 points, with a lower bound (one-sided, 95 %) above 3.

Choices are decisions given to the model, over held-out pages of a seed that the card does not use. The oracle of ViCO
keeps tables and compresses all else; that of AVG-LLaVA takes the compressed granularity but for dense questions.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from hf_vtc.evaluation import read_questions, records_to_ask
from hf_vtc.evaluation.running import Asker
from hf_vtc.evaluation.statistics import Difference, difference

from .dataset import EvaluationItem, evaluation_set, records_of
from .pages import field_bits
from .questions import EVALUATED_KINDS
from .stages import load

GATE_SEED = 4321
_BATCH_SIZE, _MAX_ANSWER_TOKENS, _DRAWS = 100, 6, 3
# of gates 1 to 4
FULL_RIGHT, DENSE_COMPRESSED_RIGHT, GAP, GAP_BOUND = 0.97, 0.70, 0.05, 0.03


@dataclass(frozen=True)
class Choice:
    """Decisions of every item under one policy, and tokens per tile of each of its pages, in the mean."""

    decisions: list[torch.Tensor]
    tokens: list[float]


def choices_of(config: Any, items: Sequence[EvaluationItem], seed: int = 0) -> dict[str, Choice]:
    """Policies by name: `full`, `compressed`, `oracle`, and draws by lot of as many tokens as the oracle spends."""
    rng = np.random.default_rng(seed)
    if hasattr(config, "compressed_seq_length"):
        full, small = config.image_seq_length, config.compressed_seq_length
        oracle = [np.array([kind != "table" for kind in item.fields]) for item in items]
        policies = {
            "full": [np.zeros(len(each), bool) for each in oracle],
            "compressed": [np.ones(len(each), bool) for each in oracle],
            "oracle": oracle,
        }
        for draw in range(_DRAWS):
            policies[f"lot #{draw + 1}"] = [rng.permutation(each) for each in oracle]
        cost: Callable[[np.ndarray], float] = lambda each: float(np.where(each, small, full).mean())  # noqa: E731
    else:
        scales = config.vis_token_granularity
        coarse, finest = scales.index(compressed_granularity(scales)), len(scales) - 1
        oracle = [np.array([finest if item.kind == "dense" else coarse]) for item in items]
        policies = {
            "full": [np.array([finest])] * len(items),
            "compressed": [np.array([coarse])] * len(items),
            "oracle": oracle,
        }
        for draw in range(_DRAWS):
            policies[f"lot #{draw + 1}"] = [oracle[idx] for idx in rng.permutation(len(oracle))]
        cost = lambda each: float(scales[int(each[0])])  # noqa: E731
    return {
        name: Choice([torch.from_numpy(each) for each in decisions], [cost(each) for each in decisions])
        for name, decisions in policies.items()
    }


def compressed_granularity(scales: Sequence[int]) -> int:
    """The granularity of AVG-LLaVA that stands for "compressed": a quarter of the finest, as ViCO's."""
    return scales[-1] // 4


@torch.no_grad()
def scores_of(
    model: Any, processor: Any, items: Sequence[EvaluationItem], choices: dict[str, Choice]
) -> dict[str, np.ndarray]:
    """Right or wrong of every item under every policy; the tower runs once per page."""
    records = records_to_ask(records_of(list(items)), None, "kind")
    questions = read_questions(records, "exact", "kind", "last")
    asker = Asker(model.eval(), processor, records, _MAX_ANSWER_TOKENS)
    right: dict[str, list[float]] = {name: [] for name in choices}
    for start in range(0, len(questions), _BATCH_SIZE):
        some = questions[start : start + _BATCH_SIZE]
        batch = asker.batch_of(some, ["full"])
        for name, choice in choices.items():
            decisions = torch.cat(choice.decisions[start : start + len(some)]).to(model.device)
            inputs = {**batch.inputs, "image_features": batch.features, "router_decisions": decisions}
            texts, _, _ = asker.generate(inputs)
            right[name] += [question.score(text) for question, text in zip(some, texts, strict=True)]
    return {name: np.array(values) for name, values in right.items()}


def oracle_gaps(choices: dict[str, Choice], scores: dict[str, np.ndarray]) -> dict[str, Difference]:
    """How much more the oracle has right than each rival that spends no more tokens."""
    tokens = {name: float(np.mean(choice.tokens)) for name, choice in choices.items()}
    share = (tokens["oracle"] - tokens["compressed"]) / (tokens["full"] - tokens["compressed"])
    lots = [values for name, values in scores.items() if name.startswith("lot")]
    rivals = {
        "compressed": (scores["compressed"], False),
        "lot": (np.mean(lots, axis=0), True),
        "line": (share * scores["full"] + (1 - share) * scores["compressed"], True),
    }
    images = [str(idx) for idx in range(len(scores["full"]))]
    return {
        name: difference(values, scores["oracle"], images, 0.95, graded) for name, (values, graded) in rivals.items()
    }


def bits_table(full: int, small: int) -> dict[str, tuple[float, float, float]]:
    """Bits of each kind of field, and bits per token at full and at compressed length."""
    bits = {kind: field_bits(kind) for kind in ("table", "box", "photo")}
    return {kind: (each, each / full, each / small) for kind, each in bits.items()}


def measure_gates(model: Any, processor: Any, num_questions: int, console: Console) -> dict[str, Any]:
    """Answer everything, print it, and return figures and `passed` by gate."""
    items = evaluation_set(num_questions, GATE_SEED)
    choices = choices_of(model.config, items)
    scores = scores_of(model, processor, items, choices)
    kinds = np.array([item.kind for item in items])
    by_kind = {
        name: {kind: float(values[kinds == kind].mean()) for kind in EVALUATED_KINDS} | {"all": float(values.mean())}
        for name, values in scores.items()
    }
    gaps = oracle_gaps(choices, scores)
    passed = {
        "1 full length": min(by_kind["full"][kind] for kind in EVALUATED_KINDS) >= FULL_RIGHT,
        "2 dense compressed": by_kind["compressed"]["dense"] <= DENSE_COMPRESSED_RIGHT,
        "3 others compressed": min(by_kind["compressed"][kind] for kind in ("coarse", "sparse")) >= FULL_RIGHT,
        "4 oracle gap": all(gap.value >= GAP and gap.lower > GAP_BOUND for gap in gaps.values()),
    }
    full = model.config.image_seq_length
    bits = bits_table(full, full // 4)
    tokens = {name: float(np.mean(choice.tokens)) for name, choice in choices.items()}
    table = Table(title=f"{num_questions} held-out questions of seed {GATE_SEED}, one per page")
    for column in ("choice", "tokens per tile", *EVALUATED_KINDS, "all"):
        table.add_column(column)
    for name, row in by_kind.items():
        table.add_row(name, f"{tokens[name]:.2f}", *(f"{row[kind]:.1%}" for kind in (*EVALUATED_KINDS, "all")))
    console.print(table)
    for kind, (total, long, short) in bits.items():
        console.print(f"{kind}: {total:.1f} bits, {long:.2f} per token at full length, {short:.2f} compressed")
    for name, gap in gaps.items():
        console.print(f"oracle - {name}: {gap.value:+.3f}, lower bound {gap.lower:+.3f}")
    for name, good in passed.items():
        console.print(f"gate {name}: {'passed' if good else 'FAILED'}")
    return {
        "questions": num_questions,
        "seed": GATE_SEED,
        "bits": bits,
        "tokens_per_tile": tokens,
        "scores": by_kind,
        "gaps": {name: {"value": gap.value, "lower": gap.lower} for name, gap in gaps.items()},
        "passed": passed,
    }


def require_gates(model: Any, processor: Any, num_questions: int, console: Console, file: Path) -> None:
    """Measure the gates and write their figures.

    Raises:
        RuntimeError: one failed.
    """
    found = measure_gates(model, processor, num_questions, console)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")
    failed = [name for name, good in found["passed"].items() if not good]
    if failed:
        raise RuntimeError(
            f"Gates {failed} failed, see {file}: a router would learn to choose where nothing is to be chosen. Change "
            "the data or the training before, or pass `--gate-questions 0` to go on all the same."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder, after training with compression and before its router's")
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--output", type=Path, default=Path("outputs/ledger/gates.json"))
    args = parser.parse_args()
    require_gates(*load(args.model), args.questions, Console(width=119), args.output)


if __name__ == "__main__":
    main()
