"""A question about an image or a video, asked with several budgets: answer, visual tokens, time to the first token,
picture."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel

from ..data.videos import Video, metadata_of
from ..models.prompt_vtc import Budget
from ..plot import filmstrip, overlay

__all__ = ["Prompt", "model_inputs"]

# pixels of the longer side of an image in the picture of what was kept
_PICTURE_SIDE = 448
# first tokens are timed this often, unless one alone takes longer than a second
_FIRST_TOKEN_RUNS = 3


def model_inputs(processor: Any, shown: Sequence[Image.Image | Video], question: str, batch_size: int = 1) -> Any:
    """Model inputs of one question about some images and videos, `batch_size` times.

    Raises:
        ValueError: there are videos, and the model takes none.
    """
    videos = [each for each in shown if isinstance(each, Video)]
    if videos and processor.video is None:
        raise ValueError(
            "This model takes no videos, which need a tower that sees grids, as Qwen3-VL's does. Give frames as "
            "images."
        )
    content = [
        {"type": "video", "video": each.frames} if isinstance(each, Video) else {"type": "image", "image": each}
        for each in shown
    ]
    more = {"processor_kwargs": {"video_metadata": metadata_of(videos) * batch_size}} if videos else {}
    # in one step: a first token that the template writes would come twice if the text were tokenized afterwards
    return processor.apply_chat_template(
        [[{"role": "user", "content": [*content, {"type": "text", "text": question}]}]] * batch_size,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **more,
    )


class Prompt:
    """One question about one image or video, ready to be asked with several budgets."""

    def __init__(self, model: PreTrainedModel, processor: Any, picture: Image.Image | Video, question: str):
        self.model, self.processor, self.picture = model, processor, picture
        self.inputs = model_inputs(processor, [picture], question).to(model.device)
        ids = self.inputs["input_ids"]
        self.num_reserved = int(torch.isin(ids, ids.new_tensor(model.config.placeholder_ids)).sum())

    def count(self, budget: Budget) -> int:
        """Visual tokens that the model keeps."""
        return int(self.model.count_visual_tokens(**self.inputs, vtc_budget=budget).sum())

    def generate(self, budget: Budget, max_new_tokens: int) -> tuple[torch.Tensor, float]:
        """New tokens, and seconds from the call to the first of them."""
        clock = _FirstTokenClock()
        start = time.perf_counter()
        out = self.model.generate(
            **self.inputs, vtc_budget=budget, max_new_tokens=max_new_tokens, do_sample=False, streamer=clock
        )
        return out[0, self.inputs["input_ids"].shape[1] :], clock.first_token - start

    def answer(self, budget: Budget, max_new_tokens: int) -> dict[str, Any]:
        """Answer, visual tokens, and median time to the first token without loading and tiling the image."""
        tokens, first = self.generate(budget, max_new_tokens)
        seconds = [first]
        while len(seconds) < _FIRST_TOKEN_RUNS and first < 1:
            seconds.append(self.generate(budget, 1)[1])
        kept = self.count(budget)
        return {
            "budget": budget,
            "answer": self.processor.decode(tokens, skip_special_tokens=True).strip(),
            "num_reserved": self.num_reserved,
            "num_kept": kept,
            "compression_ratio": self.num_reserved / kept,
            "ttft_ms": 1e3 * statistics.median(seconds),
        }

    def overlay(self, budget: Budget, title: str | None = None, caption: Sequence[str] = ()) -> Image.Image:
        """Picture of what is kept, of a video without `title` and `caption`."""
        with torch.no_grad():
            output = self.model(**self.inputs, vtc_budget=budget, logits_to_keep=1)
        if isinstance(self.picture, Video):
            frames = self.picture.frames
            shape = (len(frames), frames[0].height, frames[0].width)
            (clip,), _, _ = self.processor.written_videos([shape], video_metadata=metadata_of([self.picture]))
            shown = [frames[idx] for idx in clip.shown]
            return filmstrip(shown, output, self.inputs["input_ids"], self.processor, config=self.model.config)
        return overlay(
            self.picture,
            output,
            self.processor,
            config=self.model.config,
            title=title,
            caption=caption,
            max_side=_PICTURE_SIDE,
        )


class _FirstTokenClock:
    """A streamer that notes when the first new token reached the host; `generate` streams the prompt before it."""

    def __init__(self) -> None:
        self.num_calls, self.first_token = 0, 0.0

    def put(self, value: Any) -> None:
        self.num_calls += 1
        if self.num_calls == 2:
            self.first_token = time.perf_counter()

    def end(self) -> None:
        return None
