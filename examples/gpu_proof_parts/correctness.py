"""Part a: the CUDA ops build without a warning and are right, and the shipped checkpoints answer as on a CPU."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import hf_vtc.ops
from hf_vtc.methods.names import is_method

from .op_cases import OPS
from .work import Proof

ROOT = Path(__file__).resolve().parents[2]
CARDS = ROOT / "model_cards"
IMAGES = ROOT / "examples" / "images"
BUDGETS = ("full", "auto", 0.5)
# of the largest logit; float32 on both sides, in another order of summation
LOGIT_TOLERANCE = 1e-4
_NEW_TOKENS = 8
_CAPTURED: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def run(proof: Proof) -> None:
    build(proof)
    running = start_op_cases(proof)
    # of every form another kind of question
    questions = pages()[:: len(pages()) if proof.dry else 4]
    for folder in sorted(CARDS.glob("*-tiny")):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if is_method(config["model_type"]):
            proof.attempt(
                "shipped checkpoints", folder.name, lambda folder=folder: check_checkpoint(proof, folder, questions)
            )
    finish_op_cases(proof, running)
    proof.headline()


# ---- ops


def build(proof: Proof) -> None:
    """Build for use, which later parts find, and side by side with warnings as errors, for the record."""
    if not proof.dry:
        builder = [sys.executable, "-m", "hf_vtc.ops.build", "--kind", "cuda", "--arch"]
        builder.append("".join(map(str, torch.cuda.get_device_capability())))
        run_builders(proof, {"for use": builder, "warnings are errors": [*builder, "--compile-only"]})
    loaded = hf_vtc.ops.load(proof.device.type)
    proof.record("build of the ops", "load", ok=loaded is not None, file=None if loaded is None else loaded.name)


def run_builders(proof: Proof, commands: dict[str, list[str]]) -> None:
    """Run commands at the same time; one row for each, with what it said if it failed."""
    start = time.perf_counter()
    started = {name: subprocess.Popen(command, **_CAPTURED) for name, command in commands.items()}
    for name, process in started.items():
        said, _ = process.communicate()
        sys.stdout.write(said)
        seconds = round(time.perf_counter() - start, 1)
        error = said[-1500:] if process.returncode else None
        proof.record("build of the ops", name, ok=process.returncode == 0, seconds=seconds, error=error)


def start_op_cases(proof: Proof) -> dict[str, subprocess.Popen]:
    """One process per op, which cannot hurt the others; a dry run has one for all."""
    command = [sys.executable, "-m", "gpu_proof_parts.op_cases", "--device", proof.device.type]
    groups = {"all": OPS} if proof.dry else {op: (op,) for op in OPS}
    return {
        name: subprocess.Popen([*command, "--records", str(proof.records), "--ops", *ops], **_CAPTURED)
        for name, ops in groups.items()
    }


def finish_op_cases(proof: Proof, running: dict[str, subprocess.Popen]) -> None:
    """Wait for them; rows of wrong results are theirs, that one crashed is said here."""
    for name, process in running.items():
        said, _ = process.communicate()
        sys.stdout.write(said)
        lines = [line for line in said.splitlines() if line.strip()] or [""]
        crashed = process.returncode not in (0, 1)
        error = f"status {process.returncode}: {lines[-1][:300]}" if crashed else None
        proof.record("processes of op cases", name, ok=process.returncode == 0, error=error)


# ---- checkpoints


def pages() -> list[tuple[Image.Image, str]]:
    """The images of this repository, each with its questions."""
    content = json.loads((IMAGES / "pages.json").read_text(encoding="utf-8"))
    opened = [(Image.open(IMAGES / page["image"]).convert("RGB"), page["questions"]) for page in content]
    return [(image, question["question"]) for image, questions in opened for question in questions]


def answers_of(
    folder: Path, questions: list[tuple[Image.Image, str]], device: torch.device, dtype: torch.dtype
) -> dict[Any, list[tuple[list[int], torch.Tensor, list[int]]]]:
    """For each budget and question: new ids, logits of the prompt, and visual tokens kept."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(device).eval()
    answers: dict[Any, list] = {budget: [] for budget in BUDGETS}
    for image, question in questions:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[prompt], images=[[image]], return_tensors="pt").to(device)
        for budget in BUDGETS:
            answers[budget].append(_answer(model, inputs, budget))
    return answers


@torch.no_grad()
def _answer(model, inputs, budget) -> tuple[list[int], torch.Tensor, list[int]] | str:
    try:
        out = model.generate(**inputs, vtc_budget=budget, max_new_tokens=_NEW_TOKENS, do_sample=False)
    except ValueError as refusal:
        # a method without such a budget; it must refuse it everywhere
        return str(refusal)
    logits = model(**inputs, vtc_budget=budget).logits[0].float().cpu()
    kept = model.count_visual_tokens(**inputs, vtc_budget=budget).tolist()
    return out[0, inputs["input_ids"].shape[1] :].tolist(), logits, kept


def check_checkpoint(proof: Proof, folder: Path, questions: list[tuple[Image.Image, str]]) -> None:
    """The same answers on both devices: exactly in float32, as often as it comes in bfloat16."""
    # TensorFloat-32 is no float32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    expected = answers_of(folder, questions, torch.device("cpu"), torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        found = answers_of(folder, questions, proof.device, dtype)
        for budget in BUDGETS:
            row = compare(expected[budget], found[budget])
            ok = None
            if dtype == torch.float32:
                ok = row["ids_equal"] == row["counts_equal"] == row["questions"]
                ok = ok and row["logits_to_largest"] <= LOGIT_TOLERANCE
            proof.record("shipped checkpoints", folder.name, ok, budget=budget, dtype=str(dtype)[6:], **row)


def compare(expected: list, found: list) -> dict[str, Any]:
    """How many answers agree, and how far logits are apart, as a share of the largest; infinite for NaN."""
    same_ids = same_counts = 0
    apart = 0.0
    for own, other in zip(expected, found, strict=True):
        if isinstance(own, str) or isinstance(other, str):
            same_ids += own == other
            same_counts += own == other
            continue
        same_ids += own[0] == other[0]
        same_counts += own[2] == other[2]
        if own[1].shape == other[1].shape:
            share = float((own[1] - other[1]).abs().max() / own[1].abs().max())
            apart = max(apart, share) if share == share else float("inf")
        else:
            apart = float("inf")
    refused = expected[0] if isinstance(expected[0], str) else None
    return {
        "questions": len(expected),
        "ids_equal": same_ids,
        "counts_equal": same_counts,
        "logits_to_largest": apart,
        "refused": refused,
    }
