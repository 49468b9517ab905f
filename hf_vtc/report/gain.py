"""What compression gains on this machine, at a size where tokens cost."""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from ..methods.record import record_of
from ..models.prompt_vtc import Budget
from .analytic import default_budget
from .measured import ONE_TOKEN, in_turns
from .shapes import inputs_of_shape, model_of_shape, shapes_of_methods

# of the records' shapes, the one that two CPU cores can run
_SIZE = "100m"
# rounds that count, few where each takes long
_MOST_ROUNDS = 7


@dataclass(frozen=True)
class Gain:
    """Seconds from pixels to the first token, without and with compression, in turns.

    Args:
        shape (`str`): of the model, whose weights are random: they do not change the time.
        num_parameters, num_decoder_parameters (`int`): of all, and of the language model.
        num_reserved, num_kept (`int`): visual tokens before and after.
        full_seconds, kept_seconds (`list[float]`): one entry per round.
    """

    shape: str
    num_parameters: int
    num_decoder_parameters: int
    device: str
    dtype: str
    threads: int
    vtc_budget: Budget
    num_reserved: int
    num_kept: int
    num_text_tokens: int
    full_seconds: list[float]
    kept_seconds: list[float]

    @property
    def speedup(self) -> float:
        """Median over the rounds of full / compressed."""
        return median(full / kept for full, kept in zip(self.full_seconds, self.kept_seconds, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Every field, and the speed-up, for JSON."""
        return {**asdict(self), "speedup": self.speedup}

    def __str__(self) -> str:
        full, kept = median(self.full_seconds), median(self.kept_seconds)
        return (
            f"{self.num_reserved} visual tokens {full:.2f} s, {self.num_kept} of them (budget {self.vtc_budget}) "
            f"{kept:.2f} s to the first token: {self.speedup:.2f} times faster."
        )


def shape_of_gain(model: PreTrainedModel) -> str | None:
    """The shape at which the method of a model is measured; None if its record has none, or nothing to compare."""
    name = f"{record_of(model.config).name.replace('_', '-')}-{_SIZE}"
    own = shapes_of_methods()
    if name not in own:
        return None
    record, shape = own[name]
    config = record.config(image_token_id=0, **shape.config())
    return name if _has_choice(config) else None


@torch.no_grad()
def measure_gain(
    shape: str,
    device: torch.device,
    dtype: torch.dtype,
    max_seconds: float = 20.0,
    on_round: Callable[[int, int], None] | None = None,
) -> Gain:
    """Measure a shape with random weights, full against its default budget, in turns.

    Args:
        shape (`str`): of a compressing model.
        max_seconds (`float`): for the rounds that count; if the first one takes longer, it is the only one.
        on_round (`Callable`, *optional*): called with the rounds that are done and their number, the first one of
            which does not count.
    """
    model, sizes = model_of_shape(shape, device, dtype)
    inputs, budget = inputs_of_shape(model, sizes), default_budget(model.config)
    run = functools.partial(model.generate, **inputs, **ONE_TOKEN)
    variants = {"full": lambda: run(vtc_budget="full"), "kept": lambda: run(vtc_budget=budget)}
    first = in_turns(variants, model.device, repeats=1, warmup=0)
    # where one round takes all the time there is, it has to do, with what is set up once in it
    rounds = min(_MOST_ROUNDS, int(max_seconds / sum(map(sum, first.values()))))

    def report(num_done: int) -> None:
        if on_round is not None:
            on_round(num_done + 1, rounds + 1)

    report(0)
    seconds = in_turns(variants, model.device, rounds, warmup=0, on_round=report) if rounds else first
    reserved, kept = (int(model.count_visual_tokens(**inputs, vtc_budget=each).sum()) for each in ("full", budget))
    return Gain(
        shape=shape,
        num_parameters=model.num_parameters(),
        num_decoder_parameters=model.model.language_model.num_parameters(),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        vtc_budget=budget,
        num_reserved=reserved,
        num_kept=kept,
        num_text_tokens=inputs["input_ids"].shape[1] - reserved,
        full_seconds=seconds["full"],
        kept_seconds=seconds["kept"],
    )


def _has_choice(config: Any) -> bool:
    """Whether an image of a model can have several counts of visual tokens."""
    (levels,) = config.levels(config.sizes_of(torch.tensor([1]), torch.tensor([[config.tile_size] * 2])))
    return len(levels) > 1
