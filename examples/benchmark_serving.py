"""What compression saves in a vLLM server: requests per second, time to the first token, tokens in the cache.

HF_HUB_OFFLINE=1 python examples/benchmark_serving.py --output outputs/serving.json

A ViCO model with random weights (decoder of 104 M parameters, 832 visual tokens for an image of 12 tiles and its
thumbnail) is served once; budgets take turns within each round of each concurrency, so that whatever else the machine
does is the same for all of them. Every request has an image of its own and caches of prompts are off. `text` is what
an uncompressed model could reach at best: as many ordinary tokens as `full` has, without images, tower or connectors.

First the answers of the server are compared with those of `generate`, at every budget but `auto`, whose random router
stands at its threshold. Needs vllm and hf_vtc installed, and on a machine without GPU half an hour.
"""

import argparse
import asyncio
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openai
import torch
from PIL import Image
from transformers import AutoProcessor

from hf_vtc import AutoModelForVision2Seq
from hf_vtc.models.configuration_vico import VicoConfig
from hf_vtc.models.modeling_vico import VicoForConditionalGeneration

sys.path.append(str(Path(__file__).parent / "serve"))

from local_server import SERVED_NAME, Server, messages, serving  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "how many digits are there?"
BUDGETS = ("full", 0.75, 0.5, 0.25, "auto")
# (height, width) in pixels: 3 x 4 tiles
TILE, GRID = 64, (3, 4)
DECODER = {
    "model_type": "qwen3",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 400,
}
TOWER = {
    "model_type": "internvl_vision",
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "attention_bias": True,
    "image_size": [TILE, TILE],
    "patch_size": [4, 4],
}


class Answer(NamedTuple):
    """Seconds to the first token and to the last one, and tokens of the prompt and the answer."""

    first: float
    last: float
    num_tokens: int


def build(folder: Path) -> tuple[int, int]:
    """Write a model with random weights; returns the parameters of its decoder, and its visual tokens of an image."""
    processor = AutoProcessor.from_pretrained(ROOT / "model_cards" / "vico-tiny")
    processor.image_processor.size = {"height": TILE, "width": TILE}
    processor.image_processor.max_tiles = GRID[0] * GRID[1]
    torch.manual_seed(0)
    config = VicoConfig(TOWER, DECODER, image_token_id=processor.image_token_id, tie_word_embeddings=True)
    processor.image_seq_length = config.image_seq_length
    model = VicoForConditionalGeneration(config)
    model.save_pretrained(folder, save_code=False)
    processor.save_pretrained(folder, save_code=False)
    return model.model.language_model.num_parameters(), processor.reserved_tokens(GRID[0] * TILE, GRID[1] * TILE)


def noise(seed: int) -> Image.Image:
    shape = (GRID[0] * TILE, GRID[1] * TILE, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def request_of(condition: Any, seed: int, num_words: int) -> dict[str, Any]:
    if condition == "text":
        # digits are a token each
        words = "".join(random.Random(seed).choices("0123456789", k=num_words))
        return {"messages": messages(f"{words} {QUESTION}")}
    return {
        "messages": messages(QUESTION, noise(seed)),
        "extra_body": {"mm_processor_kwargs": {"vtc_budget": condition}},
    }


def check_answers(folder: Path, address: str, num_tokens: int) -> None:
    """Raise a RuntimeError if the server does not answer as `generate` does."""
    model = AutoModelForVision2Seq.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    client = openai.OpenAI(base_url=address, api_key="none", timeout=1800)
    for seed, budget in enumerate(budget for budget in BUDGETS if budget != "auto"):
        request = request_of(budget, seed, 0)
        request["extra_body"]["return_token_ids"] = True
        choice = client.chat.completions.create(model=SERVED_NAME, max_tokens=num_tokens, temperature=0, **request)
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}],
            add_generation_prompt=True,
        )
        inputs = processor(text=[prompt], images=[noise(seed)], return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**inputs, vtc_budget=budget, do_sample=False, max_new_tokens=num_tokens)
        expected, found = out[0, inputs["input_ids"].shape[1] :].tolist(), choice.choices[0].token_ids
        if found != expected:
            raise RuntimeError(f"At budget {budget} the server answers {found}, `generate` {expected}.")
    print(f"answers of the server equal those of `generate` at {len(BUDGETS) - 1} budgets", flush=True)


async def ask(client: openai.AsyncOpenAI, condition: Any, seed: int, num_words: int, num_new: int) -> Answer:
    start, first, num_tokens = time.perf_counter(), None, 0
    stream = await client.chat.completions.create(
        model=SERVED_NAME,
        max_tokens=num_new,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        **_with(request_of(condition, seed, num_words), ignore_eos=True),
    )
    async for chunk in stream:
        if chunk.choices and first is None:
            # the server begins when there is a token, whatever of it can be written
            first = time.perf_counter() - start
        if chunk.usage:
            num_tokens = chunk.usage.total_tokens
    last = time.perf_counter() - start
    return Answer(first, last, num_tokens)


def _with(request: dict[str, Any], **extra: Any) -> dict[str, Any]:
    return {**request, "extra_body": {**request.get("extra_body", {}), **extra}}


async def measure(
    server: Server, concurrency: int, num_requests: int, num_rounds: int, num_words: int, num_new: int
) -> list[dict[str, Any]]:
    """A row for each condition at one concurrency; rounds in which all of them take turns."""
    client = openai.AsyncOpenAI(base_url=server.address, api_key="none", max_retries=0, timeout=3600)
    conditions = ("text", *BUDGETS)
    rates, answers = {each: [] for each in conditions}, {each: [] for each in conditions}
    for round_idx in range(num_rounds):
        # the order turns, so that no condition is always the one behind the slowest
        for condition in conditions[round_idx % len(conditions) :] + conditions[: round_idx % len(conditions)]:
            turns = asyncio.Semaphore(concurrency)

            async def one(seed: int, condition: Any = condition, turns: asyncio.Semaphore = turns) -> Answer:
                async with turns:
                    return await ask(client, condition, seed, num_words, num_new)

            seeds = [hash((concurrency, round_idx, idx)) & 0xFFFFFFFF for idx in range(num_requests)]
            start = time.perf_counter()
            found = await asyncio.gather(*map(one, seeds))
            rates[condition].append(num_requests / (time.perf_counter() - start))
            answers[condition] += found
    await client.close()
    return [
        {
            "concurrency": concurrency,
            "condition": str(condition),
            "requests_per_second": statistics.median(rates[condition]),
            "slowest_round": min(rates[condition]),
            "fastest_round": max(rates[condition]),
            "first_token_seconds": statistics.median(answer.first for answer in answers[condition]),
            "tokens_in_cache": statistics.mean(answer.num_tokens for answer in answers[condition]),
        }
        for condition in conditions
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown, with the rate as a multiple of that of `full` and of `text`."""
    lines = [
        "| at once | condition | requests/s (slowest, fastest) | of `full` | of `text` | first token, s | tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate = {
            each["condition"]: each["requests_per_second"]
            for each in rows
            if each["concurrency"] == row["concurrency"]
        }
        own = row["requests_per_second"]
        lines.append(
            f"| {row['concurrency']} | {row['condition']} | {own:.2f} ({row['slowest_round']:.2f}, "
            f"{row['fastest_round']:.2f}) | {own / rate['full']:.2f} | {own / rate['text']:.2f} | "
            f"{row['first_token_seconds']:.2f} | {row['tokens_in_cache']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--requests", type=int, default=2, help="of each condition in a round, times the concurrency")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        num_parameters, num_visual = build(Path(folder))
        print(f"decoder of {num_parameters / 1e6:.0f} M parameters, {num_visual} visual tokens", flush=True)
        options = ("--dtype", arguments.dtype, "--max-model-len", "2048", "--trust-request-mm-kwargs")
        options += ("--no-enable-prefix-caching", "--mm-processor-cache-gb", "0", "--enforce-eager")
        environment = {"HF_VTC_VLLM_AUTO": "1", "VLLM_CPU_KVCACHE_SPACE": "3", "VLLM_LOGGING_LEVEL": "ERROR"}
        with serving(folder, *options, **environment) as server:
            check_answers(Path(folder), server.address, arguments.new_tokens)
            rows = []
            for concurrency in arguments.concurrency:
                num_requests = max(arguments.requests * concurrency, 2)
                rows += asyncio.run(
                    measure(server, concurrency, num_requests, arguments.rounds, num_visual, arguments.new_tokens)
                )
                print(table(rows[-len(BUDGETS) - 1 :]), flush=True)
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1), encoding="utf-8")
    print(f"\n{machine}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
