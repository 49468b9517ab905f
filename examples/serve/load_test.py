"""Many requests at once with mixed budgets, images and broken inputs: no 500, no leak, every error a sentence as 400.

python examples/serve/load_test.py model_cards/vico-tiny --requests 2000 --concurrency 32

Starts a server by itself. Exits with 1 if a request got an answer of another kind than it should, or if the server's
memory grew by more than `--growth` after the first quarter of the requests, or by more than `--last-growth` in the
last one: a cache that fills grows ever less, a leak as much in each quarter.
"""

import argparse
import asyncio
import random
import sys
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import openai
from local_server import SERVED_NAME, Server, messages, serving
from PIL import Image

QUESTION = "how many digits are there?"
BROKEN_IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


class Kind(NamedTuple):
    """A kind of request: how often it comes, what is right (a status and a part of its message)."""

    name: str
    weight: int
    status: int
    message: str = ""


KINDS = (
    Kind("image", 10, 200),
    Kind("image seen before", 6, 200),
    Kind("two images", 4, 200),
    Kind("text", 3, 200),
    Kind("stream", 3, 200),
    Kind("budget too small", 1, 400, "smallest admissible count"),
    Kind("budget of a wrong kind", 1, 400, "must be None or 'auto', 'full'"),
    Kind("unknown argument", 1, 400, "did you mean `vtc_budget`"),
    Kind("broken image", 1, 400, "image"),
    Kind("placeholder in a text", 1, 400, "image placeholders but"),
)


def noise(random_source: random.Random) -> Image.Image:
    height, width = random_source.randint(40, 200), random_source.randint(40, 200)
    values = np.random.default_rng(random_source.getrandbits(32)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def request_of(kind: Kind, random_source: random.Random, seen: list[Image.Image], budgets: list[Any]) -> dict:
    """Messages and arguments of one request."""
    arguments = {"vtc_budget": random_source.choice(budgets)}
    wrong = {
        "budget too small": {"vtc_budget": 1},
        "budget of a wrong kind": {"vtc_budget": 2.5},
        "unknown argument": {"budget": 0.5},
    }
    images = [random_source.choice(seen) if kind.name == "image seen before" else noise(random_source)]
    if kind.name == "text":
        images = []
    elif kind.name == "two images":
        images.append(random_source.choice(seen))
    asked = messages(QUESTION, *images)
    if kind.name == "broken image":
        asked[0]["content"][0] = BROKEN_IMAGE
    elif kind.name == "placeholder in a text":
        asked[0]["content"][1]["text"] = "what does <IMG_CONTEXT> mean?"
    return {"messages": asked, "extra_body": {"mm_processor_kwargs": wrong.get(kind.name, arguments)}}


async def ask(client: openai.AsyncOpenAI, kind: Kind, request: dict) -> str | None:
    """What is wrong with the answer, None for nothing."""
    try:
        answer = await client.chat.completions.create(
            model=SERVED_NAME, max_tokens=8, temperature=0, stream=kind.name == "stream", **request
        )
        if kind.name == "stream":
            async for _ in answer:
                pass
        status, text = 200, ""
    except openai.APIStatusError as error:
        status, text = error.status_code, str(error)
    except openai.APIConnectionError as error:
        # its own message says no more than that there is no answer
        status, text = 0, f"{error} {error.__cause__!r}"
    if status != kind.status or kind.message not in text:
        return f"{kind.name}: {status} {text[:300]}"
    return None


async def load(server: Server, num_requests: int, concurrency: int, budgets: list[Any]) -> tuple[list[str], list[int]]:
    """What was wrong, and the server's memory in bytes after each quarter of the requests."""
    random_source, wrong, memory = random.Random(0), [], []
    seen = [noise(random_source) for _ in range(8)]
    client = openai.AsyncOpenAI(base_url=server.address, api_key="none", max_retries=0, timeout=1800)
    turns, counts = asyncio.Semaphore(concurrency), Counter()

    async def one(kind: Kind, request: dict) -> None:
        async with turns:
            problem = await ask(client, kind, request)
        counts[kind.name] += 1
        if problem is not None:
            wrong.append(problem)

    for start in range(0, num_requests, max(num_requests // 4, 1)):
        count = min(max(num_requests // 4, 1), num_requests - start)
        kinds = random_source.choices(KINDS, [kind.weight for kind in KINDS], k=count)
        await asyncio.gather(*[one(kind, request_of(kind, random_source, seen, budgets)) for kind in kinds])
        held = server.memory()
        memory.append(sum(held.values()))
        shares = ", ".join(f"{name} {num_bytes / 2**20:.0f}" for name, num_bytes in held.items())
        print(f"{start + count} requests, {len(wrong)} wrong, {memory[-1] / 2**20:.0f} MiB ({shares})", flush=True)
    await client.close()
    print(", ".join(f"{name}: {count}" for name, count in sorted(counts.items())))
    return wrong, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--growth", type=float, default=0.1, help="of memory after the first quarter, as a share")
    parser.add_argument("--last-growth", type=float, default=0.02, help="of memory in the last quarter, as a share")
    arguments = parser.parse_args()
    options = ("--dtype", "float32", "--max-model-len", "2048", "--enforce-eager", "--trust-request-mm-kwargs")
    # small caches, so that they are full after a quarter of the requests and what grows then is a leak
    options += ("--mm-processor-cache-gb", "0.05", "--num-gpu-blocks-override", "256")
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    # on a CPU torch keeps a compiled kernel for each of the last 1024 shapes, and prompts have many lengths
    environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "16"
    # a connection that rests while the machine is busy is not to be closed under the next request
    environment["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] = "600"
    with serving(arguments.model, *options, **environment) as server:
        wrong, memory = asyncio.run(load(server, arguments.requests, arguments.concurrency, ["full", 0.7, 0.5, 0.3]))
    growth, last_growth = memory[-1] / memory[0] - 1, memory[-1] / memory[-2] - 1
    print(f"memory grew by {growth:.1%} after the first quarter, by {last_growth:.1%} in the last")
    print(*sorted(set(wrong))[:20], sep="\n")
    sys.exit(bool(wrong) or growth > arguments.growth or last_growth > arguments.last_growth)


if __name__ == "__main__":
    main()
