"""Budgets of a request: what is refused, how many placeholders an image gets, and what the encoder is told.

Needs no vllm. An engine fixes the placeholders of an image before the tower runs, and keeps images one by one in its
caches, so what an image is worth may depend on nothing but itself and the arguments of its request.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..models.configuration_vtc import VtcConfig
from ..models.processing_vtc import VtcProcessor
from ..models.processor_arguments_vtc import VtcImagesKwargs
from ..models.prompt_vtc import BY_SCORES, Budget, budgets_per_image
from ..models.tiling_vtc import refuse_unknown

# how a tensor of the encoder's inputs says `"auto"` and `"full"`; other budgets are numbers of visual tokens there
AUTO, FULL = -1, 0

_IMAGE_ARGUMENTS = frozenset(VtcImagesKwargs.__annotations__) - {"return_tensors"}
_GROUPED = ("images_kwargs", "text_kwargs", "common_kwargs")


class Planned(NamedTuple):
    """Of each image, the placeholders that it gets and the budget that the encoder is told."""

    num_placeholders: list[int]
    codes: list[int]


def refuse_unserved_base(config: VtcConfig) -> None:
    """Raise a ValueError for a model on a base whose images an engine cannot prepare or place as they must be."""
    if config.grid_base is not None:
        base, reason = config.grid_base, "its visual tokens stand at places in an image, which the engine is not told"
    elif config.max_map_tiles is not None:
        base = "llava_onevision"
        reason = "an image is cut otherwise beside others, while the engine prepares and caches images one by one"
    else:
        return
    raise ValueError(f"vLLM does not serve {config.model_type} on {base}: {reason}. Use `generate` or `hf-vtc serve`.")


def image_arguments(mm_processor_kwargs: Mapping[str, Any]) -> tuple[Budget, dict[str, Any]]:
    """`vtc_budget`, and fields of the image processor, among the `mm_processor_kwargs` of a request.

    Raises:
        ValueError: an argument is none that changes an image, or says different things of the images of a request.
    """
    given = {name: value for name, value in mm_processor_kwargs.items() if name not in _GROUPED}
    for group in _GROUPED:
        grouped = mm_processor_kwargs.get(group) or {}
        if not isinstance(grouped, Mapping):
            raise ValueError(f"`{group}` must be a dictionary of arguments, got {grouped!r}.")
        given.update(grouped)
    # vLLM's own, for a text that is not used
    given.pop("truncation", None)
    refuse_unknown(given, _IMAGE_ARGUMENTS, "`mm_processor_kwargs`")
    vtc_budget = given.pop("vtc_budget", None)
    if isinstance(vtc_budget, (list, tuple)):
        raise ValueError(
            f"`vtc_budget` must be one budget for all images of a request, got {vtc_budget!r}: an engine caches "
            "images one by one, under the arguments of their request and not under their place in it."
        )
    return vtc_budget, given


def planned(
    processor: VtcProcessor,
    image_sizes: Sequence[Sequence[int]],
    vtc_budget: Budget | Sequence[Budget],
    fields: Mapping[str, Any],
    reason: str = "",
) -> Planned:
    """What the images of a request get.

    Args:
        image_sizes: as the image processor returns them.
        vtc_budget: as the model takes it; None is `"auto"`.
        fields: of the image processor, for this request.
        reason (`str`): why the method's router cannot decide in an engine, for the message; empty if it has none.

    Raises:
        ValueError: nothing fits a budget, or only the pixels or the question could tell what does.
    """
    budgets = budgets_per_image(vtc_budget, len(image_sizes))
    config = processor.model_config
    if reason and "auto" in budgets and config.own_level([1]) == BY_SCORES:
        raise ValueError(
            f"`vtc_budget='auto'` cannot be served for {config.model_type}: {reason} Give a number of tokens, a share "
            "of them or 'full' in `mm_processor_kwargs`, of the request or of the server."
        )
    counts = processor.written_tokens(image_sizes, budgets, **fields)
    words = {"auto": AUTO, "full": FULL}
    codes = [words.get(budget, count) if isinstance(budget, str) else count for budget, count in zip(budgets, counts)]
    return Planned(counts, codes)


def budget_of_code(code: int) -> Budget:
    """The budget that a code of `planned` stands for."""
    return {AUTO: "auto", FULL: "full"}.get(code, code)
