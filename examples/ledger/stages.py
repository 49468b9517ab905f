"""What the stages of the ledger models share: pages as conversations, the processor, a run, saving and loading."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digit_forms.dataset import page_rng
from digit_forms.text import TOKENS_PER_TILE
from digit_forms.training import training_arguments
from rich.console import Console
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)

import hf_vtc
from hf_vtc.models.image_processing_vtc import VtcImageProcessor
from hf_vtc.models.processing_vtc import VtcProcessor

from .pages import FIELD_SIZE, MAX_TILES, Page, draw_page
from .questions import EVALUATED_KINDS, Question
from .sizes import Size


def question_of_kind(page: Page, kind: str, rng: np.random.Generator) -> Question:
    """A question of one kind about a page, its topic first."""
    topics = sorted({question.topic for question in page.questions if question.kind == kind})
    topic = topics[rng.integers(len(topics))]
    choices = [question for question in page.questions if question.topic == topic]
    return choices[rng.integers(len(choices))]


class Conversations(torch.utils.data.Dataset):
    """Training pages as conversations of at most `max_questions` questions of the evaluated kinds.

    With one question per page kinds take turns, and a dense one gets a page with a table; else questions are drawn
    from the coarse and sparse ones of a page and six digits of its tables.
    """

    def __init__(self, num_pages: int, seed: int, max_questions: int = 10):
        self.num_pages, self.seed, self.max_questions = num_pages, seed, max_questions

    def __len__(self) -> int:
        return self.num_pages

    def __getitem__(self, idx: int) -> dict[str, Any]:
        rng = page_rng(self.seed, "train", idx)
        if self.max_questions == 1:
            kind = EVALUATED_KINDS[idx % len(EVALUATED_KINDS)]
            page = draw_page(rng, "train", 1 + int(rng.integers(2)) if kind == "dense" else None)
            questions = [question_of_kind(page, kind, rng)]
        else:
            page = draw_page(rng, "train")
            dense = [question for question in page.questions if question.kind == "dense"]
            questions = [question for question in page.questions if question.kind in ("coarse", "sparse")]
            questions += [dense[i] for i in rng.permutation(len(dense))[:6]]
            questions = [questions[i] for i in rng.permutation(len(questions))[: self.max_questions]]
        messages = []
        for question in questions:
            messages.append({"role": "user", "content": question.text})
            messages.append({"role": "assistant", "content": question.answer})
        return {"messages": messages, "images": [page.image]}


class ProgressLog(TrainerCallback):
    """Prints what the trainer logs, one line each time."""

    def __init__(self, console: Console, stage: str):
        self.console, self.stage, self.start = console, stage, time.time()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = {name: round(float(value), 4) for name, value in logs.items() if isinstance(value, int | float)}
        minutes = (time.time() - self.start) / 60
        self.console.print(f"{self.stage} {state.global_step}/{state.max_steps}, {minutes:.1f} min: {shown}")


def stage_arguments(
    folder: Path, size: Size, steps: int, learning_rate: float, seed: int, batch: int | None = None
) -> TrainingArguments:
    """Arguments of a stage of a method: no checkpoints on the way, a log that shows a run that does not learn."""
    return training_arguments(
        folder,
        steps,
        batch or size.method_batch,
        learning_rate,
        seed,
        save_strategy="no",
        logging_steps=max(steps // 10, 1),
        bf16=size.bf16,
        dataloader_num_workers=size.workers,
    )


def run_stage(trainer: Any, console: Console, stage: str) -> None:
    """Train, and leave the model ready to answer."""
    trainer.pop_callback(PrinterCallback)
    trainer.add_callback(ProgressLog(console, stage))
    trainer.train()
    # which the trainer turns off
    trainer.model.config.use_cache = True
    trainer.model.eval()


def build_processor(base: str | Path) -> VtcProcessor:
    """The processor that cuts pages into their fields, without a thumbnail."""
    image_processor = VtcImageProcessor(tiling="dynamic", size=FIELD_SIZE, max_tiles=MAX_TILES, use_thumbnail=False)
    return VtcProcessor(image_processor, AutoTokenizer.from_pretrained(base), image_seq_length=TOKENS_PER_TILE)


def trained_parts(model: PreTrainedModel, *frozen: str) -> list[torch.nn.Parameter]:
    """Parameters of a model but those of the named parts."""
    prefixes = tuple(f"model.{part}." for part in frozen)
    return [parameter for name, parameter in model.named_parameters() if not name.startswith(prefixes)]


def save(model: PreTrainedModel, processor: VtcProcessor, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write weights and processor, without code."""
    model.requires_grad_(True).to(dtype).save_pretrained(folder, save_code=False)
    processor.save_pretrained(folder, save_code=False)


def load(folder: str | Path) -> tuple[PreTrainedModel, VtcProcessor]:
    """Model and processor of a checkpoint folder, in float32, on the GPU if there is one."""
    model = hf_vtc.AutoModelForVision2Seq.from_pretrained(folder, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval(), AutoProcessor.from_pretrained(folder)
