"""Questions to measure by: records of any format that training reads, each with what counts as right.

Beside the fields of training a record may have `answers` (a list of references), `kind`, `choices` (options of a
multiple-choice question) and `metric`.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..data import ChatRecords, RecordError, load_records
from ..data.videos import Video, metadata_of, telling_frames
from .scores import METRICS, Metric, find_metric, number_in, option_in

FIELDS = ("answers", "kind", "choices", "metric")
_TURNS = ("last", "all")
_ENOUGH_FOR_VQA = 3


@dataclass(frozen=True)
class Question:
    """One question: a prompt of messages, and the references that its answer is scored by, of which there may be none.

    `key` is its name in files; `record_idx`, `num_images` and `num_videos` say which images and videos the prompt
    shows: the first ones of that record. `image` is what questions about the same pictures share, and what a picture
    is known by elsewhere. `video_shapes` are (frames, height, width), `video_metadata` what is known of their time.
    """

    key: str
    origin: str
    record_idx: int
    num_images: int
    messages: list[dict[str, Any]]
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    kind: str = ""
    metric: Metric | None = None
    image: str = ""
    image_sizes: tuple[tuple[int, int], ...] = ()
    num_videos: int = 0
    video_shapes: tuple[tuple[int, int, int], ...] = ()
    video_metadata: tuple[Mapping[str, Any], ...] = ()

    @property
    def num_shown(self) -> int:
        """Images and videos, a whole video being one."""
        return self.num_images + self.num_videos

    @property
    def text(self) -> str:
        """What is asked, without images."""
        content = self.messages[-1]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        return "".join(part["text"] for part in parts if part["type"] == "text")

    def score(self, answer: str) -> float | None:
        """How right an answer is; None where no reference is known."""
        if not self.references:
            return None
        return self.metric.score(answer, self.references, self.choices)


def records_to_ask(
    source: Any, image_folder: Any = None, group_by: str = "kind", ignore_fields: Collection[str] = (), **options: Any
) -> ChatRecords:
    """`load_records`, with the fields that only an evaluation reads."""
    if isinstance(source, ChatRecords):
        return source
    ignored = {*ignore_fields, *FIELDS, group_by}
    return load_records(source, image_folder, ignore_fields=ignored, needs_answer=False, **options)


def read_questions(
    records: ChatRecords, metric: Any = "auto", group_by: str = "kind", turns: str = "last"
) -> list[Question]:
    """The questions of some records, in their order.

    Args:
        records ([`ChatRecords`]): of `records_to_ask`.
        metric: see `find_metric`; `"auto"` goes by the references of all records, and is what `metric` of a record
            does not say.
        group_by (`str`): field of a record whose values are reported apart.
        turns (`str`): `"last"`: the last answer of a conversation is the reference and all before it the prompt;
            `"all"`: each answer is one.

    Raises:
        RecordError: a record's references, options or metric cannot be used; the message names it.
    """
    if turns not in _TURNS:
        raise ValueError(f"`turns` must be one of {', '.join(_TURNS)}, got {turns!r}.")
    found: list[Question] = []
    for idx in range(len(records)):
        item, fields = records[idx], records.fields(idx)
        try:
            found += _questions_of(idx, item, fields, group_by, turns)
        except ValueError as error:
            raise RecordError(f"{item['origin']}: {error}") from error
    common = _metric_of(found) if metric == "auto" else find_metric(metric)
    return [_with_metric(question, common) for question in _with_unique_keys(found)]


def _questions_of(
    idx: int, item: Mapping[str, Any], fields: Mapping[str, Any], group_by: str, turns: str
) -> list[Question]:
    messages = item["messages"]
    answered = [
        place for place, each in enumerate(messages) if each["role"] == "assistant" and each.get("weight") != 0
    ]
    places = answered if turns == "all" else answered[-1:]
    if messages[-1]["role"] == "user" and (turns == "last" or not answered):
        # nobody has answered it yet
        places = [len(messages)]
    if not places:
        raise ValueError("There is no question to ask: every answer has weight 0. Leave the record out.")
    answers = _strings(fields.get("answers"), "answers")
    choices = _strings(fields.get("choices"), "choices")
    if answers and len(places) > 1:
        raise ValueError("`answers` are those of one question, but with `turns='all'` the record has several.")
    metric = fields.get("metric")
    if metric is not None and metric not in METRICS:
        raise ValueError(f"`metric` of a record must be one of {', '.join(METRICS)}, got {metric!r}.")
    name, kind = next((str(fields[key]) for key in ("id", "question_id") if fields.get(key) is not None), ""), ""
    if fields.get(group_by) is not None:
        kind = str(fields[group_by])
    questions = []
    for place in places:
        prompt = messages[:place]
        types = [part["type"] for each in prompt for part in _parts(each["content"])]
        images, videos = item["images"][: types.count("image")], item.get("videos", [])[: types.count("video")]
        pictures = [*images, *(frame for video in videos for frame in video.frames)]
        references = answers
        if not references and place < len(messages):
            references = (_text_of(messages[place]["content"]),)
        if choices and any(option_in(each, choices) is None for each in references):
            raise ValueError(f"The answer must name one of the `choices`, got {list(references)}.")
        questions.append(
            Question(
                key=f"{name or f'record {idx}'}" + (f", turn {place}" if len(places) > 1 else ""),
                origin=item["origin"],
                record_idx=idx,
                num_images=len(images),
                messages=[{"role": each["role"], "content": each["content"]} for each in prompt],
                references=references,
                choices=choices,
                kind=kind,
                metric=None if metric is None else METRICS[metric],
                image=fingerprint(pictures) if pictures else f"text {idx}",
                image_sizes=tuple((image.height, image.width) for image in images),
                num_videos=len(videos),
                video_shapes=tuple((len(each.frames), each.frames[0].height, each.frames[0].width) for each in videos),
                video_metadata=tuple(metadata_of(videos)),
            )
        )
    return questions


def _parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _text_of(content: Any) -> str:
    return "".join(part["text"] for part in _parts(content))


def _strings(values: Any, field: str) -> tuple[str, ...]:
    if values is None:
        return ()
    values = [values] if isinstance(values, str) else values
    if not isinstance(values, (list, tuple)) or not all(isinstance(each, str) for each in values):
        raise ValueError(f"`{field}` must be a list of strings, got {values!r}.")
    return tuple(values)


def _with_unique_keys(questions: list[Question]) -> list[Question]:
    """Keys are names in files; those that records share, or that they lack, get the place as well."""
    seen: dict[str, int] = {}
    for question in questions:
        seen[question.key] = seen.get(question.key, 0) + 1
    return [
        question if seen[question.key] == 1 else _replace(question, key=f"{question.key} (question {idx})")
        for idx, question in enumerate(questions)
    ]


def _with_metric(question: Question, common: Metric) -> Question:
    return question if question.metric is not None else _replace(question, metric=common)


def _replace(question: Question, **changes: Any) -> Question:
    return Question(**{**vars(question), **changes})


def _metric_of(questions: Sequence[Question]) -> Metric:
    """What `"auto"` stands for: by options, by how many references agree, by numbers; ANLS is never guessed."""
    scored = [question for question in questions if question.references]
    if scored and all(question.choices for question in scored):
        return METRICS["choice"]
    if scored and all(len(question.references) >= _ENOUGH_FOR_VQA for question in scored):
        return METRICS["vqa"]
    if scored and all(number_in(each) is not None for question in scored for each in question.references):
        return METRICS["relaxed"]
    return METRICS["exact"]


def fingerprint(images: Sequence[Image.Image]) -> str:
    """What images are known by: a digest of their decoded pixels, whatever their files are called."""
    digest = hashlib.sha256()
    for image in images:
        rgb = image.convert("RGB")
        digest.update(f"{rgb.width}x{rgb.height} ".encode())
        digest.update(np.ascontiguousarray(rgb).tobytes())
    return digest.hexdigest()[:32]


def _telling_pictures(images: Sequence[Image.Image], videos: Sequence[Video]) -> list[Image.Image]:
    return [*images, *(frame for video in videos for frame in telling_frames(video))]


def refuse_training_images(records: ChatRecords, questions: Sequence[Question], train_records: ChatRecords) -> None:
    """Raise if a picture of these questions, or a frame of their videos that tells which it is, was trained on.

    Raises:
        RecordError: naming the records on both sides.
    """
    trained: dict[str, str] = {}
    for idx in range(len(train_records)):
        item = train_records[idx]
        for picture in _telling_pictures(item["images"], item.get("videos", [])):
            trained.setdefault(fingerprint([picture]), item["origin"])
    leaked = []
    for question in questions:
        item = records[question.record_idx]
        shown = item["images"][: question.num_images], item.get("videos", [])[: question.num_videos]
        known = map(fingerprint, ([picture] for picture in _telling_pictures(*shown)))
        found = [trained[digest] for digest in known if digest in trained]
        if found:
            leaked.append(f"{question.origin} shows the image of {found[0]}")
    if leaked:
        more = f", and {len(leaked) - 5} more" if len(leaked) > 5 else ""
        raise RecordError(
            f"{len(leaked)} of {len(questions)} questions show images of the training data: "
            f"{'; '.join(leaked[:5])}{more}. Leave them out of one of the two."
        )
