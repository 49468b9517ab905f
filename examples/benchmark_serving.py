"""What compression saves in a vLLM server: requests per second, time to the first token, tokens in the cache.

HF_HUB_OFFLINE=1 python examples/benchmark_serving.py --output outputs/serving.json

An InternVL model of transformers with random weights (decoder of 104 M parameters, 832 visual tokens for an image of
12 tiles and its thumbnail) is served as vLLM serves it without hf_vtc: `stock`. The ViCO model that `from_base` makes
of it is served beside it, and its budgets and `stock` take turns within each round of each concurrency, so that
whatever else the machine does is the same for all of them. Every request has an image of its own and caches of prompts
are off. The router of `auto` knows nothing, but its rule compresses half of the tiles of an image.

First the answers of both servers are compared with what the ViCO model says in transformers, at every budget but
`auto`. Needs vllm, hf_vtc and, for `stock`, torchvision in a build for this machine (`--without-stock` leaves it out);
without a GPU half an hour. With one: `--size 7b --dtype bfloat16 --concurrency 1 4 16 32`.
"""

import argparse
import asyncio
import json
import platform
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openai
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, InternVLConfig, InternVLForConditionalGeneration

from hf_vtc import AutoModelForVision2Seq
from hf_vtc.convert import from_base

sys.path.append(str(Path(__file__).parent / "serve"))

from local_server import SERVED_NAME, Server, messages, serving  # noqa: E402
from same_answers import compare, require_control  # noqa: E402

PROCESSOR = Path(__file__).resolve().parents[1] / "model_cards" / "vico-tiny"
QUESTION = "how many digits are there?"
STOCK = "stock"
BUDGETS = ("full", 0.75, 0.5, 0.25, "auto")
# rows and columns of tiles
GRID = (3, 4)
# the shipped tokenizer has 400 tokens, and stock InternVL needs one for videos
VOCAB_SIZE = 416


class Size(NamedTuple):
    """Shapes of a model."""

    decoder: dict[str, Any]
    tower: dict[str, Any]
    tile: int
    patch: int


SIZES = {
    "small": Size(
        {
            "model_type": "qwen3",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "head_dim": 64,
        },
        {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 6},
        tile=64,
        patch=4,
    ),
    # InternVL3-8B: InternViT-300M and the decoder of Qwen2.5-7B
    "7b": Size(
        {
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        tile=448,
        patch=14,
    ),
}


class Answer(NamedTuple):
    """Seconds to the first token and to the last one, and tokens of the prompt and the answer."""

    first: float
    last: float
    num_tokens: int


def build(size: Size, dtype: torch.dtype, folder: Path, stock_folder: Path | None) -> tuple[int, int]:
    """Write both models; returns the parameters of their decoder, and their visual tokens of an image."""
    processor = AutoProcessor.from_pretrained(PROCESSOR)
    processor.image_processor.size = {"height": size.tile, "width": size.tile}
    processor.image_processor.max_tiles = GRID[0] * GRID[1]
    tower = {"attention_bias": True, "image_size": [size.tile] * 2, "patch_size": [size.patch] * 2, **size.tower}
    decoder = {"vocab_size": VOCAB_SIZE, "eos_token_id": processor.tokenizer.eos_token_id, **size.decoder}
    image_seq_length = (size.tile // size.patch // 2) ** 2
    config = InternVLConfig(
        vision_config=tower,
        text_config=decoder,
        image_token_id=processor.image_token_id,
        image_seq_length=image_seq_length,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    torch.manual_seed(0)
    stock = InternVLForConditionalGeneration._from_config(config, dtype=dtype)
    # strictly above the median of an image's tiles
    rule = {"flash_mode": True, "flash_relative_threshold": 0.5, "flash_absolute_threshold": 0.0}
    model = from_base(stock, "vico", **rule)
    processor.image_seq_length = image_seq_length
    model.save_pretrained(folder, save_code=False)
    processor.save_pretrained(folder, save_code=False)
    if stock_folder is not None:
        stock.save_pretrained(stock_folder)
        stock_processor(processor, image_seq_length).save_pretrained(stock_folder)
    return (
        model.model.language_model.num_parameters(),
        processor.reserved_tokens(GRID[0] * size.tile, GRID[1] * size.tile),
    )


def stock_processor(processor: Any, image_seq_length: int) -> Any:
    """What transformers has for InternVL, with the settings of `processor`."""
    # they need torchvision
    from transformers import GotOcr2ImageProcessor, InternVLProcessor
    from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

    settings = processor.image_processor
    named = {
        "start_image_token": processor.image_start_token,
        "end_image_token": processor.image_end_token,
        "context_image_token": processor.image_token,
        "video_token": "<video>",
    }
    tokenizer = AutoTokenizer.from_pretrained(PROCESSOR, extra_special_tokens=named)
    shared = {"size": settings.size, "image_mean": settings.image_mean, "image_std": settings.image_std}
    images = GotOcr2ImageProcessor(
        crop_to_patches=True, min_patches=settings.min_tiles, max_patches=settings.max_tiles, **shared
    )
    return InternVLProcessor(
        images,
        tokenizer,
        InternVLVideoProcessor(**shared),
        image_seq_length=image_seq_length,
        chat_template=processor.chat_template,
    )


def picture(size: Size, seed: int) -> Image.Image:
    """Random blocks of 8 x 8 pixels, in the shape of the grid of tiles."""
    height, width = (count * size.tile for count in GRID)
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def request_of(condition: Any, image: Image.Image, **extra: Any) -> dict[str, Any]:
    if condition != STOCK:
        extra["mm_processor_kwargs"] = {"vtc_budget": condition}
    return {"model": SERVED_NAME, "messages": messages(QUESTION, image), "temperature": 0, "extra_body": extra}


def check_answers(size: Size, folder: Path, servers: dict[Any, Server], num_new: int, tolerance: float) -> None:
    """Raise a RuntimeError if a server does not answer as the ViCO model in transformers does."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForVision2Seq.from_pretrained(folder, dtype="auto").eval().to(device)
    processor = AutoProcessor.from_pretrained(folder)
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}],
        add_generation_prompt=True,
    )
    found = []
    for seed, condition in enumerate(condition for condition in servers if condition != "auto"):
        budget = "full" if condition == STOCK else condition
        image = picture(size, seed)
        inputs = processor(text=[prompt], images=[image], return_tensors="pt").to(device, model.dtype)
        client = openai.OpenAI(base_url=servers[condition].address, api_key="none", timeout=1800)
        request = request_of(condition, image, return_token_ids=True)
        answer = client.chat.completions.create(max_tokens=num_new, logprobs=True, **request)
        found.append(compare(model, inputs, answer, budget, 0.5 if budget == "full" else "full", tolerance))
        print(f"{condition}: {found[-1].num_visual} visual tokens", flush=True)
    print(require_control(found), flush=True)


async def ask(client: openai.AsyncOpenAI, request: dict[str, Any], num_new: int) -> Answer:
    start, first, num_tokens = time.perf_counter(), None, 0
    stream = await client.chat.completions.create(
        max_tokens=num_new, stream=True, stream_options={"include_usage": True}, **request
    )
    async for chunk in stream:
        if chunk.choices and first is None:
            # the server begins when there is a token, whatever of it can be written
            first = time.perf_counter() - start
        if chunk.usage:
            num_tokens = chunk.usage.total_tokens
    return Answer(first, time.perf_counter() - start, num_tokens)


async def measure(
    size: Size, servers: dict[Any, Server], concurrency: int, num_requests: int, num_rounds: int, num_new: int
) -> list[dict[str, Any]]:
    """A row for each condition at one concurrency; rounds in which all of them take turns."""
    conditions = list(servers)
    rates, answers = {each: [] for each in conditions}, {each: [] for each in conditions}
    cpu_seconds = dict.fromkeys(conditions, 0.0)
    clients = {
        each: openai.AsyncOpenAI(base_url=server.address, api_key="none", max_retries=0, timeout=3600)
        for each, server in servers.items()
    }
    turns = asyncio.Semaphore(concurrency)

    async def one(condition: Any, request: dict[str, Any]) -> Answer:
        async with turns:
            return await ask(clients[condition], request, num_new)

    for round_idx in range(num_rounds):
        # the order turns, so that no condition is always the one behind the slowest
        for condition in conditions[round_idx % len(conditions) :] + conditions[: round_idx % len(conditions)]:
            seeds = [hash((concurrency, round_idx, idx)) & 0xFFFFFFFF for idx in range(num_requests)]
            requests = [request_of(condition, picture(size, seed), ignore_eos=True) for seed in seeds]
            start, cpu_start = time.perf_counter(), servers[condition].cpu_seconds()
            found = await asyncio.gather(*[one(condition, request) for request in requests])
            rates[condition].append(num_requests / (time.perf_counter() - start))
            cpu_seconds[condition] += servers[condition].cpu_seconds() - cpu_start
            answers[condition] += found
    for client in clients.values():
        await client.close()
    return [
        {
            "concurrency": concurrency,
            "condition": str(condition),
            "requests": num_requests * num_rounds,
            "requests_per_second": statistics.median(rates[condition]),
            "slowest_round": min(rates[condition]),
            "fastest_round": max(rates[condition]),
            "cpu_seconds_per_request": cpu_seconds[condition] / (num_requests * num_rounds),
            "first_token_seconds": statistics.median(answer.first for answer in answers[condition]),
            "tokens_in_cache": statistics.mean(answer.num_tokens for answer in answers[condition]),
        }
        for condition in conditions
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown: rates also as multiples of the uncompressed model's, CPU time of the server per request."""
    uncompressed = rows[0]["condition"]
    lines = [
        f"| at once | condition | requests/s (rounds) | of `{uncompressed}` | CPU s | first token, s | tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    base = {row["concurrency"]: row["requests_per_second"] for row in rows if row["condition"] == uncompressed}
    for row in rows:
        own = row["requests_per_second"]
        lines.append(
            f"| {row['concurrency']} | {row['condition']} | {own:.2f} ({row['slowest_round']:.2f}, "
            f"{row['fastest_round']:.2f}) | {own / base[row['concurrency']]:.2f} | "
            f"{row['cpu_seconds_per_request']:.2f} | {row['first_token_seconds']:.2f} | {row['tokens_in_cache']:.0f} |"
        )
    return "\n".join(lines)


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--requests", type=int, default=2, help="of each condition in a round, times the concurrency")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tolerance", type=float, help="of log-probabilities, 0.001 in float32 and 0.1 in bfloat16")
    parser.add_argument("--without-stock", action="store_true", help="where torchvision is missing")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.tolerance is None:
        arguments.tolerance = {"float32": 1e-3, "bfloat16": 0.1}[arguments.dtype]
    return arguments


def main() -> None:
    arguments = arguments_of()
    size = SIZES[arguments.size]
    with tempfile.TemporaryDirectory() as place, ExitStack() as started:
        folder, stock_folder = Path(place, "vico"), None if arguments.without_stock else Path(place, "stock")
        num_parameters, num_visual = build(size, getattr(torch, arguments.dtype), folder, stock_folder)
        print(f"decoder of {num_parameters / 1e6:.0f} M parameters, {num_visual} visual tokens", flush=True)
        options = ["--dtype", arguments.dtype, "--max-model-len", "4096", "--trust-request-mm-kwargs"]
        options += ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0", "--enforce-eager"]
        # at the start stock InternVL would put the longest video together
        options += ["--limit-mm-per-prompt", '{"image": 1, "video": 0}']
        if torch.cuda.is_available():
            # of each server; the model in transformers has the rest
            options += ["--gpu-memory-utilization", "0.35"]
        environment = {"HF_VTC_VLLM_AUTO": "1", "VLLM_CPU_KVCACHE_SPACE": "3", "VLLM_LOGGING_LEVEL": "ERROR"}
        # connections to one server rest while the other is measured
        environment["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] = "600"
        servers = {}
        if stock_folder is not None:
            servers[STOCK] = started.enter_context(serving(stock_folder, *options, **environment))
        ours = started.enter_context(serving(folder, *options, **environment))
        servers |= dict.fromkeys(BUDGETS, ours)
        check_answers(size, folder, servers, arguments.new_tokens, arguments.tolerance)
        rows = []
        for concurrency in arguments.concurrency:
            num_requests = max(arguments.requests * concurrency, 2)
            rows += asyncio.run(
                measure(size, servers, concurrency, num_requests, arguments.rounds, arguments.new_tokens)
            )
            print(table(rows[-len(servers) :]), flush=True)
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1), encoding="utf-8")
    print(f"\n{machine}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
