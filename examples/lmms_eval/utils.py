"""What the task digit_forms reads from a record, and how it scores an answer."""

from pathlib import Path
from typing import Any

from PIL import Image

_FOLDER = Path("outputs/digit_forms")


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The page."""
    return [Image.open(_FOLDER / doc["image"]).convert("RGB")]


def doc_to_text(doc: dict[str, Any]) -> str:
    """The question, without the marker of its image."""
    return doc["conversations"][0]["value"].removeprefix("<image>\n")


def doc_to_target(doc: dict[str, Any]) -> str:
    """The only right answer."""
    return doc["conversations"][1]["value"]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 for the right answer, as the metric `exact` of `hf_vtc.evaluate` says it."""
    from hf_vtc.evaluation.scores import exact

    return {"exact": exact(results[0], [doc_to_target(doc)])}
