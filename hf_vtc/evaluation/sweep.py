"""`evaluate`: from a model and records to a report."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..models.prompt_vtc import Budget
from .baselines import Rival, baseline_points
from .points import Point, method_points
from .questions import Question, read_questions, records_to_ask, refuse_training_images
from .recommendation import recommend
from .report import EvalReport, versions
from .running import Answer, AnswerFile, Asker, Batch, batches_of
from .statistics import questions_needed, scipy_stats
from .summary import FULL, Arm, Settings, line_name, rows_of
from .timing import measure_times

BASELINES = ("random", "pool", "smaller")
# tokens that an answer may be longer than the longest reference, and how long it may be where none is known
_MORE_TOKENS = 8
_TOKENS_WITHOUT_REFERENCE = 64
# answered questions from which on it is foreseen how many will be needed, and for which claim
_ENOUGH_TO_TELL = 200
# questions that are asked alone too
_ASKED_ALONE = 8
_USUAL_MARGIN, _USUAL_CONFIDENCE = 0.01, 0.95


def evaluate(
    model: PreTrainedModel,
    processor: Any,
    records: Any,
    *,
    image_folder: Any = None,
    budgets: Sequence[Budget] | None = None,
    metric: Any = "auto",
    baselines: Sequence[str] = BASELINES,
    tolerance: float = 0.01,
    relative: bool = False,
    confidence: float = 0.95,
    seeds: int = 5,
    seed: int = 0,
    group_by: str = "kind",
    turns: str = "last",
    limit: int | None = None,
    clip: bool = False,
    holdout: bool | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    train_records: Any = None,
    time: bool = False,
    price_per_hour: float | None = None,
    output: Any = None,
) -> EvalReport:
    """Ask a model every question at every budget, and say what compression costs.

    Args:
        model (`PreTrainedModel`): of hf_vtc, on its device, or with adapters of PEFT around it.
        processor (`VtcProcessor`): of this model.
        records: whatever `load_records` reads, or what `records_to_ask` gave; with videos where the processor takes
            them. Fields `answers`, `kind`, `choices` and
            `metric` are read too.
        image_folder: where paths of images start, see `load_records`.
        budgets: `vtc_budget` of each point; full length is always measured. Default: auto and three shares, as far as
            all images admit them.
        metric: `"auto"`, a name of `METRICS`, `"module:function"`, or a function of answer and references.
        baselines (`Sequence[str]`): what stands beside each budget with as many tokens.
        tolerance (`float`): by how much the score may fall for a budget to be recommended.
        relative (`bool`): whether that is a share of the score at full length; else it is a difference of scores.
        confidence (`float`): of intervals and of the recommendation.
        seeds (`int`): draws of a baseline by lot.
        seed (`int`): of everything that is drawn.
        group_by (`str`): field of records whose values are reported apart.
        turns (`str`): `"last"` or `"all"`, see `read_questions`.
        limit (`int`, *optional*): ask so many questions, drawn from all.
        clip (`bool`): whether a budget that is too small for an image or a whole video becomes the smallest that it
            admits.
        holdout (`bool`, *optional*): see `recommend`.
        batch_size (`int`): questions in a batch.
        max_new_tokens (`int`, *optional*): longest answer. Default: that of the longest reference and 8 more.
        train_records: what the model was trained on; a question about one of its images or videos is an error.
        time (`bool`): whether to time some questions afterwards, alone and in a batch: tower, choice, first token and
            answer at each point of the method.
        price_per_hour (`float`, *optional*): of the machine, with `time`: what is saved is given in money too.
        output (`str` or `os.PathLike`, *optional*): folder in which answers are written as they come. A run that was
            ended goes on there.

    Returns:
        [`EvalReport`]

    Raises:
        ValueError: an argument is outside of its range, a budget cannot be met, or `output` belongs to another run.
        RecordError: a record cannot be used.
    """
    _check(tolerance, confidence, seeds, batch_size, limit, max_new_tokens)
    _check_price(price_per_hour, time)
    # now, and not after the last answer
    scipy_stats()
    takes_videos = processor.video is not None
    records = records_to_ask(records, image_folder, group_by, takes_videos=takes_videos)
    questions = read_questions(records, metric, group_by, turns)
    if train_records is not None:
        trained = records_to_ask(train_records, image_folder, group_by, takes_videos=takes_videos)
        refuse_training_images(records, questions, trained)
    questions = _drawn(questions, limit, seed)
    max_new_tokens = max_new_tokens or _longest_answer(processor, questions)
    asker = Asker(model, processor, records, max_new_tokens)
    points = method_points(processor, asker.config, questions, budgets, clip)
    beside, notes = baseline_points(asker, points, questions, baselines, seeds)
    settings = Settings(tolerance, confidence, relative, seed)
    run = {
        "checkpoint": checkpoint_digest(asker.head),
        "data": data_digest(questions),
        "metric": ", ".join(sorted({question.metric.name for question in questions})),
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "seed": seed,
        "clip": clip,
        "versions": dict(versions()),
    }
    answers = AnswerFile(None if output is None else Path(output), run)
    with _answering(model):
        notes += ask(asker, questions, [*points, *beside], answers, batch_size, seed)
        in_order = [questions[idx] for idx in order_of(questions, seed)]
        times = measure_times(asker, in_order, points, price_per_hour) if time else []
    refuse_other_scores(questions, answers.answers.values())

    arms = arms_of([*points, *beside], questions, answers)
    rows = rows_of(arms, settings, asker.config)
    facts = {"model": asker.config.name_or_path, **run, **vars(settings), "seeds": seeds}
    facts |= {"num_questions": len(questions), "num_images": len({question.image for question in questions})}
    facts |= {"price_per_hour": price_per_hour} if time else {}
    return EvalReport(rows, recommend(arms, rows, settings, holdout), facts, notes, answers.answers, times)


@contextmanager
def _answering(model: PreTrainedModel) -> Iterator[None]:
    """The model without dropout while the body runs, and then as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def ask(
    asker: Asker,
    questions: Sequence[Question],
    points: Sequence[Point],
    answers: AnswerFile,
    batch_size: int,
    seed: int,
) -> list[str]:
    """Answer what is not answered yet, batch by batch, every point in turn.

    Returns:
        Notes on what was met.
    """
    order, rival, is_warm, notes = order_of(questions, seed), Rival(asker, seed), False, []
    with logging.tqdm(total=len(questions) * len(points), desc="Answering", delay=5) as progress:
        for batch_idx, chosen in enumerate(batches_of(questions, batch_size, order)):
            missing = [point for point in points if not answers.has(point, chosen)]
            progress.update(len(chosen) * (len(points) - len(missing)))
            if not missing:
                continue
            batch = asker.batch_of(chosen, [point.budget for point in points])
            if not is_warm:
                # what is set up once is nobody's time
                asker.answer(batch, points[0])
                is_warm, notes = True, _otherwise_alone(asker, batch, points)
            # the first of a batch finds the caches cold
            first = batch_idx % len(points)
            for point in [*points[first:], *points[:first]]:
                if point not in missing:
                    continue
                respond = asker.answer if point.family == "method" else rival.answer
                answers.add(*respond(batch, point), batch_idx)
                progress.update(len(chosen))
            progress.set_postfix_str(_outlook(points, questions, answers))
    return notes


def _otherwise_alone(asker: Asker, batch: Batch, points: Sequence[Point]) -> list[str]:
    """A note if questions of a batch are answered otherwise alone, which no point may depend on."""
    point = [point for point in points if point.family == "method"][-1]
    together = {answer.key: answer.answer for answer in asker.answer(batch, point)[0]}
    others = 0
    chosen = batch.questions[:_ASKED_ALONE]
    for question in chosen:
        (alone,), _ = asker.answer(asker.batch_of([question], [each.budget for each in points]), point)
        others += alone.answer != together[question.key]
    if not others:
        return []
    return [f"{others} of {len(chosen)} questions were answered otherwise alone than in a batch, at {point.name}."]


def order_of(questions: Sequence[Question], seed: int) -> list[int]:
    """Places of the questions in the order in which they are asked: images by lot, so that what stands in a batch
    together says nothing, and the questions about one of them after each other, so that the tower sees it once."""
    places: dict[str, list[int]] = {}
    for idx, question in enumerate(questions):
        places.setdefault(question.image, []).append(idx)
    images = list(places)
    return [idx for image in np.random.default_rng(seed).permutation(len(images)) for idx in places[images[image]]]


def _outlook(points: Sequence[Point], questions: Sequence[Question], answers: AnswerFile) -> str:
    """How many questions a claim about the method's smallest point will need, once enough are answered to tell."""
    last = [point for point in points if point.family == "method"][-1]
    both = [(answers.answers.get((FULL, each.key)), answers.answers.get((last.name, each.key))) for each in questions]
    pairs = [(full.score, own.score) for full, own in both if full is not None and own is not None]
    pairs = [(full, own) for full, own in pairs if full is not None]
    if len(pairs) < _ENOUGH_TO_TELL or last.name == FULL:
        return ""
    changed = sum(full != own for full, own in pairs) / len(pairs)
    needed = questions_needed(changed, _USUAL_MARGIN, _USUAL_CONFIDENCE)
    return f"{last.name}: {changed:.1%} change, {needed:,} questions would show a loss of less than one point"


def refuse_other_scores(questions: Sequence[Question], answers: Iterable[Answer]) -> None:
    """Raise if an answer has another score than its question gives it: somebody changed one of the two.

    Raises:
        ValueError: naming question and point.
    """
    known = {question.key: question for question in questions}
    for answer in answers:
        question = known.get(answer.key)
        if question is None or question.score(answer.answer) != answer.score:
            raise ValueError(
                f"The answers do not belong to these questions: {answer.answer!r} to {answer.key!r} at {answer.point} "
                f"has the score {answer.score} in the file"
                + (f", but {question.score(answer.answer)} by its references." if question else ", but is not asked.")
                + " Remove the folder, and ask again."
            )


def arms_of(points: Sequence[Point], questions: Sequence[Question], answers: AnswerFile) -> dict[str, Arm]:
    """The lines of a report by name: each of the method's points, and behind it what stands beside it."""
    own = [point for point in points if point.family == "method"]
    lines: dict[str, list[Point]] = {}
    for point in own:
        lines[point.name] = [point]
        for other in points:
            if other.beside == point.name:
                lines.setdefault(line_name(other), []).append(other)
    return {name: Arm(drawn, questions, answers.answers, answers.seconds) for name, drawn in lines.items()}


def _check(
    tolerance: float, confidence: float, seeds: int, batch_size: int, limit: int | None, max_new_tokens: int | None
) -> None:
    if not 0 < tolerance < 1:
        raise ValueError(f"`tolerance` must lie between 0 and 1, got {tolerance}. 0.01 is one point of a hundred.")
    if not 0.5 < confidence < 1:
        raise ValueError(f"`confidence` must lie between 0.5 and 1, got {confidence}.")
    for name, value in (
        ("seeds", seeds),
        ("batch_size", batch_size),
        ("limit", limit),
        ("max_new_tokens", max_new_tokens),
    ):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")


def _check_price(price_per_hour: float | None, time: bool) -> None:
    if price_per_hour is None:
        return
    if not time:
        raise ValueError("`price_per_hour` is what time costs, which is measured with `time=True` only. Give both.")
    if not 0 < price_per_hour < math.inf:
        raise ValueError(f"`price_per_hour` must be a price above 0, got {price_per_hour}.")


def _drawn(questions: list[Question], limit: int | None, seed: int) -> list[Question]:
    if limit is None or limit >= len(questions):
        return questions
    chosen = np.random.default_rng(seed).permutation(len(questions))[:limit]
    return [questions[idx] for idx in sorted(chosen.tolist())]


def _longest_answer(processor: Any, questions: Sequence[Question]) -> int:
    references = sorted({each for question in questions for each in question.references})
    if not references:
        return _TOKENS_WITHOUT_REFERENCE
    ids = processor.tokenizer(references, add_special_tokens=False)["input_ids"]
    return max(map(len, ids)) + _MORE_TOKENS


def checkpoint_digest(model: PreTrainedModel) -> str:
    """What a model's weights and settings are known by, wherever they came from."""
    digest = hashlib.sha256()
    config = {name: value for name, value in model.config.to_dict().items() if name not in _OF_THE_PLACE}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# of a configuration, what says where it was read or by which version
_OF_THE_PLACE = ("_name_or_path", "transformers_version", "auto_map")


def data_digest(questions: Sequence[Question]) -> str:
    """What the questions are known by: prompts, pictures, references, kinds and metrics."""
    digest = hashlib.sha256()
    for question in questions:
        fields = [
            question.key,
            question.messages,
            question.references,
            question.choices,
            question.kind,
            question.metric.name,
            question.image,
        ]
        if question.num_videos:
            # by which prompts say the time of frames, or positions do
            fields += [question.video_shapes, question.video_metadata]
        digest.update(json.dumps(fields, sort_keys=True).encode())
    return digest.hexdigest()
