"""Benchmarks of lmms-eval at every budget: one run of it for each point, whose samples become a report of ours.

lmms-eval draws the questions, asks the model by `lmms.py` and scores the answers; tables, intervals and the
recommendation are those of `evaluate`. It runs in a process of its own, as on a command line.
"""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..files import read_json
from ..hub.source import load_model
from ..models.prompt_vtc import Budget, budgets_per_image
from .points import Point
from .questions import Question
from .recommendation import recommend
from .report import EvalReport, versions
from .running import ANSWERS_FILE, Answer, AnswerFile, write_atomically
from .scores import Metric
from .summary import FULL, Settings, rows_of
from .sweep import arms_of, checkpoint_digest

_FOLDER = "lmms"
_TOKENS = "tokens"
_INSTALL = "pip install 'hf-vtc[lmms]'"
_NOTE = (
    "Asked and scored by lmms-eval {version}, which asks the model alone: there are no baselines. Its questions are "
    "taken for independent, since its files do not say which of them share an image."
)


@dataclass(frozen=True)
class TasksRequest:
    """What to run.

    Args:
        checkpoint (`str`): folder, or id of the Hub.
        tasks (`Sequence[str]`): of lmms-eval, by name.
        budgets (`Sequence`, *optional*): `vtc_budget` of each point; full length is always measured. Default: auto.
        include_path (`str`, *optional*): folder of tasks of one's own.
        metric (`str`): key of the score in the samples of every task; `"auto"` is the task's own choice, see
            `score_key_of`.
        batch_size (`int`), limit (`int`, *optional*): of lmms-eval; the limit takes the first questions of a task.
        device (`str`, *optional*), dtype (`str`): of the model.
    """

    checkpoint: str
    tasks: Sequence[str]
    budgets: Sequence[Budget] | None = None
    include_path: str | None = None
    metric: str = "auto"
    batch_size: int = 16
    limit: int | None = None
    device: str | None = None
    dtype: str = "auto"

    @property
    def points(self) -> list[Point]:
        """Full length, and each budget once."""
        names = {"full": "full"}
        for budget in ("auto",) if self.budgets is None else self.budgets:
            budgets_per_image(budget, 1)
            names.setdefault("auto" if budget is None else str(budget), "auto" if budget is None else budget)
        return [Point(name, budget=budget) for name, budget in names.items()]

    def command(self, point: Point, folder: Path) -> list[str]:
        """The command line of one point, which writes into a folder."""
        arguments = {
            "pretrained": self.checkpoint,
            "vtc_budget": point.budget,
            "dtype": self.dtype,
            "token_log": folder / _TOKENS,
        }
        if any("," in str(value) for value in arguments.values()):
            raise ValueError(f"lmms-eval takes a comma for the end of a name. Rename {self.checkpoint} or {folder}.")
        command = [sys.executable, "-m", "lmms_eval", "--model", "hf_vtc", "--tasks", ",".join(self.tasks)]
        command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
        command += ["--batch_size", str(self.batch_size), "--output_path", str(folder), "--log_samples"]
        for option, value in (("include_path", self.include_path), ("limit", self.limit), ("device", self.device)):
            command += [] if value is None else [f"--{option}", str(value)]
        return command


def evaluate_tasks(
    request: TasksRequest, settings: Settings, holdout: bool | None = None, output: Path | None = None
) -> EvalReport:
    """Run tasks of lmms-eval at every point, and report on them as `evaluate` does.

    Args:
        request ([`TasksRequest`]): what to run.
        settings ([`Settings`]): of the statistics.
        holdout (`bool`, *optional*): see `recommend`.
        output (`Path`, *optional*): folder that keeps the files of lmms-eval. Points that are done there are not run
            again.

    Raises:
        ImportError: lmms-eval is missing.
        ValueError: a budget is none, `output` belongs to another run, or a task has no score for each question.
        RuntimeError: a run failed; the message ends with what it said last.
    """
    points = request.points
    version = _version_of_lmms()
    # as it will be asked, since the digest is that of the weights in use
    model = load_model(request.checkpoint, request.dtype)
    run = {
        "checkpoint": checkpoint_digest(model),
        "tasks": list(request.tasks),
        "include_path": request.include_path,
        "limit": request.limit,
        "metric": request.metric,
        "batch_size": request.batch_size,
        "dtype": request.dtype,
        "device": request.device or "the fastest here",
        "versions": {**versions(), "lmms_eval": version},
    }
    config = model.config
    del model
    with TemporaryDirectory() as passing:
        folder = Path(passing) if output is None else output
        answers = AnswerFile(folder, run)
        found = {point.name: _run(request, point, (folder / _FOLDER / point.name).absolute()) for point in points}
    questions = _common_questions(found)
    answers.answers = {(name, answer.key): answer for name, pairs in found.items() for _, answer in pairs}
    if output is not None:
        lines = [answer.to_line() for answer in answers.answers.values()]
        write_atomically(output / ANSWERS_FILE, "".join(lines))
    arms = arms_of(points, questions, answers)
    rows = rows_of(arms, settings, config)
    facts = {
        "model": request.checkpoint,
        **run,
        **vars(settings),
        "metric": ", ".join(sorted({question.metric.name for question in questions})),
        "data": _digest(questions),
        "num_questions": len(questions),
        "num_images": len(questions),
        "max_new_tokens": "each task's",
    }
    recommendation, notes = recommend(arms, rows, settings, holdout), [_NOTE.format(version=version)]
    return EvalReport(rows, recommendation, facts, notes, answers.answers)


def _common_questions(found: Mapping[str, Sequence[tuple[Question, Answer]]]) -> list[Question]:
    """The questions, which must be the same at every point; a metric is graded if any score of it is.

    Raises:
        ValueError: they are not.
    """
    questions = [question for question, _ in found[FULL]]
    graded = set()
    for name, pairs in found.items():
        if [question for question, _ in pairs] != questions:
            raise ValueError(f"lmms-eval asked other questions at {name} than at full length. Run it anew.")
        graded |= {question.kind for question, answer in pairs if answer.score not in (0.0, 1.0)}
    return [
        replace(question, metric=replace(question.metric, graded=question.kind in graded)) for question in questions
    ]


def _version_of_lmms() -> str:
    if importlib.util.find_spec("lmms_eval") is None:
        raise ImportError(f"`tasks` are those of lmms-eval, which is missing. Install it: `{_INSTALL}`.")
    from importlib.metadata import version

    return version("lmms_eval")


def _run(request: TasksRequest, point: Point, folder: Path) -> list[tuple[Question, Answer]]:
    """One run of lmms-eval, unless its results are there, and what it found."""
    if not list(folder.rglob("*_results.json")):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        log = folder / "log.txt"
        with log.open("w", encoding="utf-8") as stream:
            code = subprocess.run(request.command(point, folder), stdout=stream, stderr=subprocess.STDOUT).returncode
        if code or not list(folder.rglob("*_results.json")):
            said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            raise RuntimeError(
                f"lmms-eval failed at {point.name}: {' '.join(said[-1:])} All that it said is in {log}."
            )
    return read_point(folder, point.name, request.metric)


def read_point(folder: Path, point: str, metric: str = "auto") -> list[tuple[Question, Answer]]:
    """Questions and answers of a run, by task and document.

    Args:
        folder (`Path`): that the run wrote into.
        point (`str`): name of the point.
        metric (`str`): see `score_key_of`.

    Raises:
        ValueError: a task has no score for each question, or an answer has no line of tokens.
    """
    (results,) = folder.rglob("*_results.json")
    configs, found = read_json(results)["configs"], []
    tokens = {}
    for file in sorted((folder / _TOKENS).glob("*.jsonl")):
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            tokens[line.pop("task"), line.pop("doc_id")] = line
    for task in sorted(configs):
        files = sorted(folder.rglob(f"*_samples_{task}.jsonl"))
        if not files:
            raise ValueError(f"Task {task} has written no samples, so that nothing can be compared. Leave it out.")
        lines = [json.loads(line) for line in files[0].read_text(encoding="utf-8").splitlines()]
        key = score_key_of(task, configs[task], lines, metric)
        for line in sorted(lines, key=lambda each: each["doc_id"]):
            if (task, line["doc_id"]) not in tokens:
                raise ValueError(f"Task {task}, document {line['doc_id']} was not asked in this run. Run it anew.")
            found.append(_as_ours(task, line, key, point, tokens[task, line["doc_id"]]))
    return found


def _as_ours(
    task: str, line: Mapping[str, Any], key: str, point: str, tokens: Mapping[str, Any]
) -> tuple[Question, Answer]:
    name = f"{task}/{line['doc_id']}"
    asked = line["input"] if isinstance(line["input"], str) else json.dumps(line["input"])
    question = Question(
        name,
        task,
        line["doc_id"],
        tokens["num_images"],
        [{"role": "user", "content": asked}],
        (str(line["target"]),),
        kind=task,
        metric=Metric(key, _scored_elsewhere),
        image=name,
    )
    text = line["filtered_resps"]
    return question, Answer(
        name, point, text if isinstance(text, str) else json.dumps(text), _number(line[key]), **tokens
    )


def score_key_of(
    task: str, config: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], metric: str = "auto"
) -> str:
    """What the score of a sample is called: what was asked for, or what the task says, or its first metric.

    Raises:
        ValueError: not every sample has a number from 0 to 1 there.
    """
    metrics = [each["metric"] for each in config.get("metric_list") or []]
    wanted = [metric] if metric != "auto" else [key for key in (config.get("score_key"), *metrics) if key]
    for key in wanted:
        numbers = [_number(line.get(key)) for line in lines]
        if numbers and all(number is not None and 0 <= number <= 1 for number in numbers):
            return key
    raise ValueError(
        f"Task {task} has no score from 0 to 1 for each question under {', '.join(wanted) or 'any key'}: it is scored "
        f"as a whole or by a judge. Its samples have {', '.join(sorted(lines[0])) if lines else 'no lines'}; name "
        "another one as `metric`, or leave the task out."
    )


def _number(value: Any) -> float | None:
    """The score of a sample: a number, or what a task keeps beside the answer as `score`."""
    if isinstance(value, Mapping):
        value = value.get("score")
    return float(value) if isinstance(value, int | float) else None


def _scored_elsewhere(answer: str, references: Sequence[str], choices: Sequence[str]) -> float:
    raise NotImplementedError("lmms-eval scores its answers itself.")


def _digest(questions: Sequence[Question]) -> str:
    digest = hashlib.sha256()
    for question in questions:
        fields = [question.key, question.messages, question.references, question.metric.name]
        digest.update(json.dumps(fields, sort_keys=True).encode())
    return digest.hexdigest()
