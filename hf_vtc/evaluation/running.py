"""Asking: batches of questions, each answered at every point in turn, the tower run once for all of them.

Points take turns within a batch, so that a machine that slows down slows all of them. What is answered stands in a
file at once; a run that was ended goes on behind it, and comes to the same answers, since batches are the same.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data import ChatRecords
from ..data.videos import Video, metadata_of
from ..methods import record_of
from ..models.layout_vtc import Layout
from ..models.prompt_vtc import VisionInputs
from ..models.vision_vtc import Choice, VisualTokens
from .points import Point, clipped_budget
from .questions import Question

logger = logging.get_logger(__name__)

ANSWERS_FILE = "samples.jsonl"
TIMES_FILE = "times.jsonl"
RUN_FILE = "run.json"


@dataclass
class Answer:
    """What one point answered to one question: text, score, visual tokens kept and reserved, images and videos, those
    of them that got more than the budget, whether the answer is cut off, and the prompt's tokens that are not
    visual."""

    key: str
    point: str
    answer: str
    score: float | None
    tokens: int
    reserved: int
    num_images: int = 1
    num_clipped: int = 0
    truncated: bool = False
    text_tokens: int = 0

    @classmethod
    def from_line(cls, line: str) -> "Answer":
        return cls(**json.loads(line))

    def to_line(self) -> str:
        return json.dumps(vars(self), ensure_ascii=False) + "\n"


class AnswerFile:
    """The answers of a run, in memory, and in a folder if there is one.

    Args:
        folder (`Path`, *optional*): of this run; what an earlier one has answered there is read.
        run (`Mapping`): what answers depend on. A folder of another run is refused.

    Raises:
        ValueError: the folder's answers were given under other circumstances; the message names them.
    """

    def __init__(self, folder: Path | None, run: Mapping[str, Any]):
        self.folder = folder
        self.answers: dict[tuple[str, str], Answer] = {}
        # per question, and the batch in which it was measured
        self.seconds: dict[tuple[str, str], tuple[float, int]] = {}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._claim(dict(run))
        for file, read in ((ANSWERS_FILE, self._read_answer), (TIMES_FILE, self._read_time)):
            self._recover(folder / file, read)

    def _claim(self, run: dict[str, Any]) -> None:
        file = self.folder / RUN_FILE
        run = json.loads(json.dumps(run))
        if not file.exists():
            write_atomically(file, json.dumps(run, indent=2) + "\n")
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = sorted(name for name in {*before, *run} if before.get(name) != run.get(name))
        if changed:
            name = changed[0]
            raise ValueError(
                f"`output` {str(self.folder)!r} holds answers of another run: `{'`, `'.join(changed)}` changed "
                f"({name}: {before.get(name)!r} before, {run.get(name)!r} now). Give another folder, or remove this "
                "one."
            )

    def _recover(self, file: Path, read: Any) -> None:
        """Read the whole lines of a file, and cut off what a killed process left unfinished behind them."""
        if not file.exists():
            return
        content = file.read_bytes()
        whole = content.rfind(b"\n") + 1
        for line in content[:whole].decode("utf-8").splitlines():
            read(line)
        if whole < len(content):
            with file.open("r+b") as stream:
                stream.truncate(whole)

    def _read_answer(self, line: str) -> None:
        answer = Answer.from_line(line)
        self.answers[answer.point, answer.key] = answer

    def _read_time(self, line: str) -> None:
        point, key, seconds, batch_idx = json.loads(line)
        self.seconds[point, key] = (seconds, batch_idx)

    def has(self, point: Point, questions: Sequence[Question]) -> bool:
        """Whether all of these questions are answered."""
        return all((point.name, question.key) in self.answers for question in questions)

    def add(self, answers: Sequence[Answer], seconds: float, batch_idx: int) -> None:
        """Keep the answers of a batch, and write those that are new."""
        new = [answer for answer in answers if (answer.point, answer.key) not in self.answers]
        self.answers.update({(answer.point, answer.key): answer for answer in new})
        times = {(each.point, each.key): (seconds / len(answers), batch_idx) for each in new}
        self.seconds.update(times)
        if self.folder is None:
            return
        _append(self.folder / TIMES_FILE, "".join(json.dumps([*name, *value]) + "\n" for name, value in times.items()))
        _append(self.folder / ANSWERS_FILE, "".join(answer.to_line() for answer in new))


def _append(file: Path, text: str) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def write_atomically(file: Path, text: str) -> None:
    """Write a file so that nobody finds a part of it."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


@dataclass
class Compressed:
    """Pictures of a batch at one point of the method: what was chosen, and the visual tokens."""

    choice: Choice
    visual: VisualTokens


@dataclass
class Batch:
    """Some questions as model inputs, their images and videos through the tower.

    A picture is an image, a frame of a video, or a newline behind one; `rows`, `counts` and `num_tiles` are those of
    each in prompt order. `items` are the pictures of each image and each video, in the order of budgets.
    """

    questions: list[Question]
    inputs: dict[str, torch.Tensor]
    rows: list[int] = field(default_factory=list)
    counts: list[Sequence[int]] = field(default_factory=list)
    items: list[list[int]] = field(default_factory=list)
    num_tiles: list[int] = field(default_factory=list)
    text_tokens: list[int] = field(default_factory=list)
    features: Any = None
    seconds: float = 0.0
    # what the method made of the images at each budget
    found: dict[str, Compressed] = field(default_factory=dict)

    @property
    def given(self) -> dict[str, Any]:
        """Model inputs, with features in place of pixels where all points share them."""
        return self.inputs if self.features is None else {**self.inputs, "image_features": self.features}

    @property
    def vision(self) -> dict[str, Any]:
        """Pixels, unless they have been through the tower, and what says whose they are."""
        return {name: self.given[name] for name in VisionInputs.__dataclass_fields__ if name in self.given}

    @cached_property
    def levels(self) -> list[Sequence[int]]:
        """Visual tokens of each image and each whole video at each of its levels, in the order of budgets."""
        return [_summed([self.counts[idx] for idx in pictures]) for pictures in self.items]

    @property
    def num_reserved(self) -> list[int]:
        """Visual tokens of each question without compression."""
        return self.per_question([counts[0] for counts in self.counts])

    def per_question(self, values: Sequence[int]) -> list[int]:
        """Sums over the pictures of each question."""
        sums = [0] * len(self.questions)
        for row, value in zip(self.rows, values, strict=True):
            sums[row] += int(value)
        return sums

    def num_clipped(self, budget: Any) -> list[int]:
        """Images and videos of each question that get more than a budget, since they admit no less."""
        sums = [0] * len(self.questions)
        for pictures, counts in zip(self.items, self.levels, strict=True):
            sums[self.rows[pictures[0]]] += int(clipped_budget(budget, counts)[1])
        return sums


class Asker:
    """Answers batches of questions greedily.

    Args:
        model (`PreTrainedModel`): of hf_vtc, or with adapters of PEFT around it.
        processor (`VtcProcessor`): of this model.
        records ([`ChatRecords`], *optional*): that hold the images and videos of the questions.
        max_new_tokens (`int`): longest answer.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, records: ChatRecords | None, max_new_tokens: int):
        self.model, self.processor, self.records = model, processor, records
        self.max_new_tokens = max_new_tokens
        self.head = bare_model(model)
        self.config = self.head.config

    def inputs_of(
        self,
        questions: Sequence[Question],
        images: Sequence[Sequence[Any]],
        videos: Sequence[Sequence[Video]] = (),
        **options: Any,
    ) -> dict[str, torch.Tensor]:
        """Model inputs of some prompts, padded, on the model's device.

        Args:
            images, videos (`Sequence[Sequence]`): of each prompt.
            **options: of the processor.
        """
        texts = [
            self.processor.apply_chat_template(
                [{"role": each["role"], "content": _with_parts(each["content"])} for each in question.messages],
                add_generation_prompt=True,
                tokenize=False,
            )
            for question in questions
        ]
        tokenizer = self.processor.tokenizer
        # as `apply_chat_template(tokenize=True)` does: no first token twice
        if tokenizer.bos_token is not None and texts[0].startswith(tokenizer.bos_token):
            options["add_special_tokens"] = False
        if any(videos):
            options["videos"] = [[video.frames for video in row] for row in videos]
            options["video_metadata"] = metadata_of([video for row in videos for video in row])
        inputs = self.processor(
            text=texts,
            images=[list(each) for each in images] if any(images) else None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **options,
        )
        return dict(inputs.to(self.model.device))

    def media_of(self, questions: Sequence[Question]) -> tuple[list[list[Any]], list[list[Video]]]:
        """The images and the videos of each question's prompt, decoded."""
        items = [self.records[each.record_idx] for each in questions]
        images = [item["images"][: each.num_images] for item, each in zip(items, questions)]
        return images, [item.get("videos", [])[: each.num_videos] for item, each in zip(items, questions)]

    @torch.no_grad()
    def batch_of(self, questions: Sequence[Question], budgets: Sequence[Any], **image_options: Any) -> Batch:
        """Questions as inputs, and their pictures through the tower, once for all points that show these pixels.

        Args:
            budgets: of all points: what the tower must do is decided by the first that compresses.
            **image_options: fields of the image processor for this call.
        """
        batch = Batch(list(questions), self.inputs_of(questions, *self.media_of(questions), **image_options))
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
        batch.text_tokens = (mask & ~torch.isin(ids, ids.new_tensor(self.config.placeholder_ids))).sum(1).tolist()
        if not VisionInputs(**batch.vision).given:
            return batch
        wanted = next((budget for budget in budgets if budget != "full"), "full")
        _, layout = self.layout_of(batch, VisionInputs(**batch.vision, vtc_budget="full"))
        batch.rows, batch.counts, batch.items = layout.rows, layout.counts, _items_of(layout)
        # images that are encoded whole have no tiles
        whole = layout.sizes.num_tiles is None
        batch.num_tiles = [1] * len(batch.rows) if whole else layout.sizes.num_tiles.tolist()
        if layout.videos is not None and self.config.sees_tiles:
            # features of frames that are tiles are not taken, so that every point runs the tower
            return batch
        vision = VisionInputs(**batch.vision, vtc_budget=admitted(batch, wanted))
        _, layout = self.layout_of(batch, vision)
        start = self._now()
        batch.features = self._encoded(vision, layout, batch)
        batch.seconds = self._now() - start
        batch.inputs.pop("pixel_values", None)
        if self.config.frame_split == "uniform":
            # a budget that is split by how much frames change looks at them each time
            batch.inputs.pop("pixel_values_videos", None)
        return batch

    def _encoded(self, vision: VisionInputs, layout: Layout, batch: Batch) -> Any:
        """Features of all pictures, of which images that several questions show run through the tower once."""
        shown = [(question.image, place) for question in batch.questions for place in range(question.num_images)]
        if len(set(shown)) == len(shown) or not self.config.sees_tiles:
            return self.head.model.encode_of(vision, layout)
        pixel_values = vision.pixel_values
        tiles = torch.arange(len(pixel_values)).split(batch.num_tiles)
        firsts = dict(reversed(list(zip(shown, range(len(shown))))))
        once = torch.cat([tiles[idx] for idx in sorted(firsts.values())])
        source = torch.empty(len(pixel_values), dtype=torch.long)
        source[once] = torch.arange(len(once))
        repeated = torch.cat([source[tiles[firsts[each]]] for each in shown]).to(pixel_values.device)
        features = self.head.model.encode(pixel_values[once.to(pixel_values.device)], layout)
        if isinstance(features, dict):
            return {name: each.index_select(0, repeated) for name, each in features.items()}
        return features.index_select(0, repeated)

    def layout_of(self, batch: Batch, vision: VisionInputs) -> tuple[torch.Tensor, Layout]:
        """Embeddings of the prompts of a batch, and where its pictures are."""
        base, ids = self.head.model, batch.inputs["input_ids"]
        embeds, mask = base.find_placeholders(ids, None)
        return embeds, base.layout_of(
            mask, batch.inputs.get("attention_mask"), vision, video_mask=base.find_videos(ids, None)
        )

    @torch.no_grad()
    def compressed(self, batch: Batch, budget: Any) -> Compressed:
        """What the method makes of the pictures of a batch within a budget, found once."""
        if str(budget) not in batch.found:
            batch.found[str(budget)] = self.compress(batch, budget)
        return batch.found[str(budget)]

    @torch.no_grad()
    def compress(self, batch: Batch, budget: Any) -> Compressed:
        """The same, found anew."""
        vision = VisionInputs(**batch.vision, vtc_budget=admitted(batch, budget))
        embeds, layout = self.layout_of(batch, vision)
        return Compressed(*self.head.model.compress(vision, layout, embeds))

    def answer(self, batch: Batch, point: Point) -> tuple[list[Answer], float]:
        """Answers of a point of the method, and seconds, the tower's included."""
        if not batch.items:
            texts, truncated, seconds = self.generate(batch.inputs)
            none = [0] * len(batch.questions)
            return self.as_answers(batch, point, texts, truncated, none, none), seconds
        found, budget = self.compressed(batch, point.budget), admitted(batch, point.budget)
        inputs = {**batch.given, "vtc_budget": budget}
        texts, truncated, seconds = self.generate(inputs)
        kept = batch.per_question(found.choice.num_kept.tolist())
        clipped = batch.num_clipped(point.budget)
        answers = self.as_answers(batch, point, texts, truncated, kept, batch.num_reserved, clipped)
        return answers, seconds + batch.seconds

    @torch.no_grad()
    def generate(self, inputs: Mapping[str, Any]) -> tuple[list[str], list[bool], float]:
        """Greedy answers, whether each was cut off, and seconds."""
        start = self._now()
        new = self.generated(inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1)
        seconds = self._now() - start
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        ends = self.end_tokens
        truncated = [not any(int(token) in ends for token in row) for row in new]
        return [text.strip() for text in texts], truncated, seconds

    @torch.no_grad()
    def generated(self, inputs: Mapping[str, Any], **arguments: Any) -> torch.Tensor:
        """New tokens of some prompts, `(B, new)`."""
        out = self.model.generate(**inputs, **arguments)
        # a prompt of embeddings gives back new tokens alone
        return out if "input_ids" not in inputs else out[:, inputs["input_ids"].shape[1] :]

    @property
    def end_tokens(self) -> set[int]:
        """Tokens that end an answer."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return {*ends, self.processor.tokenizer.eos_token_id} - {None}

    def as_answers(
        self,
        batch: Batch,
        point: Point,
        texts: Sequence[str],
        truncated: Sequence[bool],
        kept: Sequence[int],
        reserved: Sequence[int],
        clipped: Sequence[int] | None = None,
    ) -> list[Answer]:
        clipped = [0] * len(texts) if clipped is None else clipped
        return [
            Answer(
                question.key,
                point.name,
                text,
                question.score(text),
                tokens,
                most,
                question.num_shown,
                changed,
                cut,
                length,
            )
            for question, text, cut, tokens, most, changed, length in zip(
                batch.questions, texts, truncated, kept, reserved, clipped, batch.text_tokens, strict=True
            )
        ]

    def _now(self) -> float:
        if self.model.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()


def admitted(batch: Batch, budget: Any) -> Any:
    """What is given as `vtc_budget`: the budget, or one for each image and video where some admit no less than
    another."""
    each = [clipped_budget(budget, counts) for counts in batch.levels]
    return [own for own, _ in each] if any(changed for _, changed in each) else budget


def _items_of(layout: Layout) -> list[list[int]]:
    """Pictures of each image and each video: images first and then videos, as budgets name them."""
    if layout.videos is None:
        return [[idx] for idx in range(layout.num_images)]
    items: list[list[int]] = [[] for _ in layout.videos.frames]
    for picture_idx, item_idx in enumerate(layout.videos.items[layout.order].tolist()):
        items[item_idx].append(picture_idx)
    return items


def _summed(levels: Sequence[Sequence[int]]) -> Sequence[int]:
    """Sums over pictures at each level, of which a picture with fewer stays at its last one."""
    if len(levels) == 1:
        return levels[0]
    return [sum(own[min(idx, len(own) - 1)] for own in levels) for idx in range(max(map(len, levels)))]


def _with_parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def bare_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model of hf_vtc that PEFT may have wrapped.

    Raises:
        ValueError: it is none.
    """
    from peft import PeftModel

    found = model.get_base_model() if isinstance(model, PeftModel) else model
    record_of(found.config)
    return found


def batches_of(questions: Sequence[Question], batch_size: int, order: Sequence[int]) -> Iterator[list[Question]]:
    """Questions in batches, in a given order."""
    for start in range(0, len(order), batch_size):
        yield [questions[idx] for idx in order[start : start + batch_size]]
