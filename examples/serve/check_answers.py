"""Every method in vLLM's OpenAI server against the same checkpoint in transformers: counts and probabilities.

HF_HUB_OFFLINE=1 python examples/serve/check_answers.py                      # float32
HF_HUB_OFFLINE=1 python examples/serve/check_answers.py --dtype bfloat16     # on a GPU, or a CPU

For each method a server of its shipped checkpoint is asked `--prompts` questions about one image, one about two and
one about none, at every budget that the method can meet, several at once, with the real client. Needs vllm and hf_vtc.
"""

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import openai
import torch
from local_server import SERVED_NAME, messages, serving
from PIL import Image
from same_answers import Comparison, compare, require_control
from transformers import AutoProcessor

from hf_vtc import AutoModelForVision2Seq

ROOT = Path(__file__).resolve().parents[2]
CARDS = ROOT / "model_cards"
PAGES = sorted((ROOT / "examples" / "images").glob("*.png"))
QUESTIONS = (
    "what colour is the page?",
    "how many digits are there?",
    "what is the number in the box?",
    "is the page wide or tall?",
)
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}
_SHARES = ("full", 1.0, 0.7, 0.5, 0.25)


class Method(NamedTuple):
    """Folder of a shipped checkpoint, what its configuration must say to be served, and budgets that it can meet."""

    folder: Path
    overrides: dict[str, Any]
    budgets: tuple[Any, ...]


# None where what the method decides by itself is served
METHODS = {
    "convllava": Method(CARDS / "convllava-tiny", {}, ("full", 1.0, None)),
    "vistog": Method(CARDS / "vistog-tiny", {}, (*_SHARES, None)),
    "vico": Method(CARDS / "vico-tiny", {}, _SHARES),
    "avg_llava": Method(CARDS / "avg-llava-tiny", {}, _SHARES),
    "llavolta": Method(CARDS / "llavolta-tiny", {"compress_layer_idx": -1}, (*_SHARES, None)),
}


class Case(NamedTuple):
    question: str
    images: tuple[Path, ...]


def cases(count: int) -> list[Case]:
    """`count` prompts about one page each, then one about two of them and one about none."""
    single = [Case(QUESTIONS[idx // len(PAGES) % len(QUESTIONS)], (PAGES[idx % len(PAGES)],)) for idx in range(count)]
    return [*single, Case(QUESTIONS[1], tuple(PAGES[:2])), Case(QUESTIONS[0], ())]


async def answers_of(address: str, asked: list[tuple[Case, Any]], concurrency: int) -> list[Any]:
    """Chat completions about some prompts, each at a budget."""
    turns = asyncio.Semaphore(concurrency)

    async def one(case: Case, budget: Any) -> Any:
        extra: dict[str, Any] = {"return_token_ids": True}
        if case.images and budget is not None:
            extra["mm_processor_kwargs"] = {"vtc_budget": budget}
        async with turns:
            return await client.chat.completions.create(
                model=SERVED_NAME,
                messages=messages(case.question, *case.images),
                max_tokens=8,
                temperature=0,
                logprobs=True,
                extra_body=extra,
            )

    async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=1800) as client:
        return await asyncio.gather(*[one(case, budget) for case, budget in asked])


def inputs_of(processor: Any, case: Case) -> Any:
    content = [{"type": "image"}] * len(case.images) + [{"type": "text", "text": case.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [Image.open(file).convert("RGB") for file in case.images]
    return processor(text=[prompt], images=images or None, return_tensors="pt")


def check(name: str, num_prompts: int, dtype: str, concurrency: int, tolerance: float) -> list[str]:
    """What is wrong with the answers of a server of one method."""
    method = METHODS[name]
    options = ["--dtype", dtype, "--max-model-len", "2048", "--enforce-eager", "--trust-request-mm-kwargs"]
    if method.overrides:
        options += ["--hf-overrides", json.dumps(method.overrides)]
    asked = [(case, budget) for budget in method.budgets for case in cases(num_prompts)]
    with serving(method.folder, *options, VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR") as server:
        answers = asyncio.run(answers_of(server.address, asked, concurrency))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForVision2Seq.from_pretrained(method.folder, dtype=getattr(torch, dtype)).eval().to(device)
    for field, value in method.overrides.items():
        setattr(model.config, field, value)
    processor = AutoProcessor.from_pretrained(method.folder)
    # ConvLLaVA has one count for an image
    has_counts = 0.5 in method.budgets
    found: list[Comparison] = []
    wrong: list[str] = []
    for (case, budget), answer in zip(asked, answers, strict=True):
        other = ("full" if budget != "full" else 0.5) if has_counts else None
        inputs = inputs_of(processor, case).to(device, model.dtype)
        try:
            found.append(compare(model, inputs, answer, budget, other, tolerance))
        except RuntimeError as error:
            images = ", ".join(file.name for file in case.images) or "no image"
            wrong.append(f"{name}, {images}, {case.question!r}: {error}")
    print(f"{name}: {len(found)} of {len(asked)} answers are those of transformers", flush=True)
    if found and has_counts:
        print(f"  {require_control(found)}", flush=True)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--tolerance", type=float, help="of log-probabilities, 0.001 in float32 and 0.1 in bfloat16")
    arguments = parser.parse_args()
    tolerance = TOLERANCES[arguments.dtype] if arguments.tolerance is None else arguments.tolerance
    wrong = []
    for name in arguments.methods:
        wrong += check(name, arguments.prompts, arguments.dtype, arguments.concurrency, tolerance)
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
