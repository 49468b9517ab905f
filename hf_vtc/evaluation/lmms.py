"""`lmms_eval --model hf_vtc`: our checkpoints as a model of lmms-eval (0.7), with a budget as a model argument.

    lmms_eval --model hf_vtc --model_args pretrained=my-vico,vtc_budget=0.5 --tasks textvqa_val --batch_size 8

Prompts are rendered and answered as `hf_vtc.evaluate` does it, so that both give the same answers. A budget belongs
into `--model_args` alone: lmms-eval's cache of responses does not look at it elsewhere.
"""

import functools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from transformers.utils import logging

from ..hub.source import load_model, load_processor
from ..models.prompt_vtc import Budget, budgets_per_image
from .questions import Question
from .running import Asker

_DEFAULT_NEW_TOKENS = 128
# of tasks, which other models read and ours need not: they say how, and not what, is generated
_WITHOUT_EFFECT = ("image_aspect_ratio",)


class HfVtc(lmms):
    """A checkpoint of hf_vtc.

    Args:
        pretrained (`str`): folder, or id of the Hub.
        vtc_budget: as in `generate`. `1` is one visual token, `1.0` all of them. Default: the method decides.
        batch_size (`int` or `str`): questions in a batch.
        device (`str`, *optional*): such as `"cuda:0"`. Default: the fastest one here.
        dtype (`str`): name of one of torch, or `"auto"` for that of the checkpoint.
        token_log (`str`, *optional*): folder in which every process writes what its answers cost, a line each: for
            `hf-vtc eval --tasks`, since the files of lmms-eval have no place for visual tokens.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        vtc_budget: Budget = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        token_log: str | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise ValueError(
                "`--model_args` of hf_vtc are pretrained, vtc_budget, device, dtype and token_log, got "
                f"{', '.join(unknown)}."
            )
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"`--batch_size` must be a whole number of at least 1, got {batch_size!r}.")
        budgets_per_image(vtc_budget, 1)
        self.vtc_budget, self.batch_size = vtc_budget, int(batch_size)
        self.token_log = None if token_log is None else Path(token_log)
        # where results of several processes are gathered
        self.device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        processor = load_processor(pretrained)
        model = load_model(pretrained, dtype if dtype == "auto" else getattr(torch, dtype))
        self._asker = Asker(model.to(self.device).eval(), processor, None, _DEFAULT_NEW_TOKENS)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "hf_vtc answers tasks of output type `generate_until`, and not those that ask for likelihoods."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError(
            "hf_vtc answers tasks of output type `generate_until`, and not those of many rounds."
        )

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests; those with the same generation arguments share batches."""
        groups: dict[str, list[int]] = {}
        for idx, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append(idx)
        results: list[GenerationResult | None] = [None] * len(requests)
        visual, seconds = [], 0.0
        with logging.tqdm(total=len(requests), desc="Answering", disable=self.rank != 0) as progress:
            for members in groups.values():
                arguments, stops = generation_arguments(requests[members[0]].args[2])
                for start in range(0, len(members), self.batch_size):
                    chosen = members[start : start + self.batch_size]
                    began = time.perf_counter()
                    found, counts = self._answered([requests[idx] for idx in chosen], arguments, stops)
                    seconds += time.perf_counter() - began
                    visual += counts
                    for idx, result in zip(chosen, found, strict=True):
                        results[idx] = result
                        self.cache_hook.add_partial("generate_until", requests[idx].args[:3:2], result.text)
                    progress.update(len(chosen))
        new_tokens = sum(result.token_counts.output_tokens for result in results)
        mean = sum(visual) / len(visual) if visual else 0.0
        log_metrics(seconds, new_tokens, new_tokens / seconds, additional_metrics={"visual_tokens": mean})
        return results

    def _answered(
        self, requests: Sequence[Instance], arguments: Mapping[str, Any], stops: Sequence[str]
    ) -> tuple[list[GenerationResult], list[int]]:
        """Answers of a batch, and the visual tokens of each of its images."""
        questions, images = zip(*map(self._question, requests), strict=True)
        inputs = self._asker.inputs_of(questions, images)
        count = functools.partial(self._asker.model.count_visual_tokens, **inputs)
        counts, reserved = (count(vtc_budget=budget).tolist() for budget in (self.vtc_budget, "full"))
        out = self._asker.generated(inputs | {"vtc_budget": self.vtc_budget}, **arguments)
        tokenizer, results, remaining = self._asker.processor.tokenizer, [], list(zip(counts, reserved, strict=True))
        costs: list[dict[str, Any]] = []
        ends = self._asker.end_tokens
        for row, shown, ids, mask in zip(out, images, inputs["input_ids"], inputs["attention_mask"], strict=True):
            own = [remaining.pop(0) for _ in shown]
            kept, most = (sum(column) for column in zip(*own, strict=True)) if own else (0, 0)
            placeholders = int((ids == self._asker.config.image_token_id).sum())
            text = tokenizer.decode(row, skip_special_tokens=True)
            for stop in stops:
                text = text.split(stop)[0]
            # the end token is written as well
            length = next((idx + 1 for idx, token in enumerate(row.tolist()) if token in ends), len(row))
            text_tokens = int(mask.sum()) - placeholders
            results.append(GenerationResult(text.strip(), TokenCounts(text_tokens + kept, length)))
            costs.append(
                {
                    "tokens": kept,
                    "reserved": most,
                    "num_images": len(shown),
                    "truncated": not any(token in ends for token in row.tolist()),
                    "text_tokens": text_tokens,
                }
            )
        self._log(requests, costs)
        return results, counts

    def _log(self, requests: Sequence[Instance], costs: Sequence[Mapping[str, Any]]) -> None:
        if self.token_log is None:
            return
        self.token_log.mkdir(parents=True, exist_ok=True)
        names = [{"task": str(request.args[4]), "doc_id": request.args[3]} for request in requests]
        with (self.token_log / f"{self.rank}.jsonl").open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps({**name, **cost}) + "\n" for name, cost in zip(names, costs, strict=True))

    def _question(self, request: Instance) -> tuple[Question, list[Any]]:
        """The messages of a request and their images.

        Raises:
            ValueError: there are videos or sounds.
        """
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        images, videos, audios = messages.extract_media()
        if videos or audios:
            raise ValueError(
                f"Task {task}, document {doc_id} shows videos or sounds, but for lmms-eval hf_vtc shows images alone. "
                "Ask records of videos by `hf-vtc eval --data`."
            )
        prompt = [
            {
                "role": each["role"],
                "content": [
                    {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["text"]}
                    for part in each["content"]
                ],
            }
            for each in messages.to_hf_messages()
        ]
        return Question(str(doc_id), str(task), 0, len(images), prompt), images


def generation_arguments(asked: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What a task wants of `generate`, and the strings at which an answer ends.

    Raises:
        ValueError: something is asked for that is not known, or that would share answers of two budgets.
    """
    asked = {name: value for name, value in asked.items() if value is not None and name not in _WITHOUT_EFFECT}
    if "vtc_budget" in asked:
        raise ValueError(
            "`vtc_budget` belongs into `--model_args`: lmms-eval keeps answers by these, and would give those of "
            "another budget."
        )
    stops = asked.pop("until", [])
    stops = [stops] if isinstance(stops, str) else list(stops)
    arguments: dict[str, Any] = {"max_new_tokens": int(asked.pop("max_new_tokens", _DEFAULT_NEW_TOKENS))}
    temperature = asked.pop("temperature", 0)
    arguments["do_sample"] = bool(asked.pop("do_sample", temperature > 0))
    if arguments["do_sample"]:
        arguments |= {"temperature": temperature} if temperature else {}
        arguments |= {name: asked.pop(name) for name in ("top_p", "top_k") if name in asked}
    else:
        # of sampling, which there is none of
        asked.pop("top_p", None), asked.pop("top_k", None)
    arguments["num_beams"] = int(asked.pop("num_beams", 1))
    if asked:
        raise ValueError(
            f"`generation_kwargs` of a task may be until, max_new_tokens, temperature, do_sample, top_p, top_k and "
            f"num_beams; hf_vtc does not know {', '.join(asked)}."
        )
    return arguments, [stop for stop in stops if stop]
