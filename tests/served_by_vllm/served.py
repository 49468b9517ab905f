"""What tests of serving share: prompts about the shipped pages, an engine in a process, and our own answers."""

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor

from hf_vtc import AutoModelForVision2Seq

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "examples" / "serve"))

from check_answers import CARDS, METHODS, PAGES, QUESTIONS, Case, cases  # noqa: E402, F401

MAX_TOKENS = 8
# what a server and a test process need on a machine without GPU
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    "PYTHONPATH": str(ROOT),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class Ours:
    """A model as transformers runs it, in float32."""

    def __init__(self, folder: Path, **config: Any):
        self.model = AutoModelForVision2Seq.from_pretrained(folder, dtype=torch.float32).eval()
        for name, value in config.items():
            setattr(self.model.config, name, value)
        self.processor = AutoProcessor.from_pretrained(folder)

    def prompt(self, case: Case) -> str:
        content = [{"type": "image"}] * len(case.images) + [{"type": "text", "text": case.question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    @torch.no_grad()
    def answer(self, case: Case, budget: Any) -> tuple[int, list[int]]:
        """Visual tokens, and the ids of the answer up to its end."""
        images = [Image.open(file).convert("RGB") for file in case.images]
        inputs = self.processor(text=[self.prompt(case)], images=images or None, return_tensors="pt")
        asked = {"vtc_budget": budget} if images else {}
        out = self.model.generate(**inputs, **asked, do_sample=False, max_new_tokens=MAX_TOKENS)
        count = int(self.model.count_visual_tokens(**inputs, **asked).sum())
        return count, out[0, inputs["input_ids"].shape[1] :].tolist()


@lru_cache(maxsize=1)
def ours(folder: Path, *config: tuple[str, Any]) -> Ours:
    return Ours(folder, **dict(config))


def asked(model: Ours, case: Case, budget: Any = None, **given: Any) -> dict[str, Any]:
    """A request as `engine_worker.py` takes it."""
    arguments = {} if budget is None else {"vtc_budget": budget}
    return {
        "prompt": model.prompt(case),
        "images": list(map(str, case.images)),
        "arguments": given.pop("arguments", arguments),
        **given,
    }


def run_engine(folder: Path, calls: list[list[dict]], tmp_path: Path, **engine: Any) -> list:
    """What an engine gives for `calls`; the last line that its process prints."""
    file = tmp_path / "requests.json"
    requests = {"engine": {"model": str(folder), **engine}, "max_tokens": MAX_TOKENS, "calls": calls}
    file.write_text(json.dumps(requests), encoding="utf-8")
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("engine_worker.py")), str(file)],
        env={**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise RuntimeError(result.stderr[-6000:])
    return json.loads(result.stdout.splitlines()[-1])


def as_ours(model: Ours, found: list) -> tuple[int, list[int]]:
    """What an engine found, as `Ours.answer` gives it."""
    prompt, answer = found
    return prompt.count(model.model.config.image_token_id), answer
