"""Model cards: what is given is kept, what is absent is written from the config."""

import os
import re
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from transformers import PreTrainedModel, ProcessorMixin

from ..files import read_text
from ..methods import record_of
from ..models.window_vtc import NEWEST_PROVEN, OLDEST_PROVEN
from ..report import default_budget, estimate
from ..report.render import binary_bytes, count, flops

_TAGS = ("vtc", "vision-token-compression", "custom_code")
# begins the paragraph by which a card is known to come from here
_CODE = "Code (`*.py`): Apache-2.0"
_PROVEN = re.compile(r"^The code in this folder was proven on .*$", flags=re.MULTILINE)
# height and width in pixels: a thumbnail, a photo, a page
_IMAGE_SIZES = ((336, 336), (768, 1024), (1344, 896))


def card_beside(model: PreTrainedModel | str | os.PathLike) -> Path | None:
    """The `README.md` of a model's folder, None where there is none."""
    if isinstance(model, str | os.PathLike) and (Path(model) / "README.md").is_file():
        return Path(model) / "README.md"
    return None


def complete_card(
    card: ModelCard | str | os.PathLike | None,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    title: str,
    base_model: str | None = None,
    license: str | None = None,
    sections: str = "",
) -> ModelCard:
    """The given card, or a new one, with the metadata that the Hub needs.

    Args:
        card: a `ModelCard`, its text, its path (a string without a line break), or None for a new one.
        model (`PreTrainedModel`), processor (`ProcessorMixin`): what it describes.
        title (`str`): name of the folder or repository, for a new card.
        base_model (`str`, *optional*): repository that the weights come from; replaces what the card says.
        license (`str`, *optional*): identifier of the weights' licence; replaces what the card says.
        sections (`str`): Markdown that stands in a new card between example and token counts: what was measured.
    """
    if card is None:
        card = _new_card(model, processor, title, base_model, license, sections)
    elif isinstance(card, os.PathLike) or (isinstance(card, str) and "\n" not in card):
        card = read_text(Path(card))
    card = _parsed(_stating_versions(str(card)))
    card.data["code_proven_on"] = f"transformers {OLDEST_PROVEN} - {NEWEST_PROVEN}"
    card.data.library_name = card.data.library_name or "transformers"
    card.data.pipeline_tag = card.data.pipeline_tag or "image-text-to-text"
    card.data.base_model = base_model or card.data.base_model
    card.data.license = license or card.data.license
    method = record_of(model.config).name
    card.data.tags = list(dict.fromkeys((*(card.data.tags or ()), *_TAGS, method)))
    return card


def _parsed(text: str) -> ModelCard:
    """A card whose metadata is as flat as that of the Hub.

    Raises:
        ValueError: the metadata is no YAML, or none that the Hub would take.
    """
    # an anchor stands for itself as often as it is named: some lines of them are a tree without end
    metadata = REGEX_YAML_BLOCK.search(text)
    if metadata and re.search(r"(^|[\s,\[{:])[&*][^\s&*]", metadata[2]):
        raise ValueError("The metadata of the card may not hold YAML anchors (`&name`, `*name`). Write it out.")
    try:
        card = ModelCard(text)
    # of the YAML parser and of huggingface_hub, which share no class
    except Exception as error:
        raise ValueError(
            f"The metadata of the card cannot be read ({error}). Repair the lines between `---`."
        ) from error
    tags = card.data.tags
    if tags is not None and not (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)):
        raise ValueError(f"`tags` of the card must be a list of words, got {tags!r}. Repair the lines between `---`.")
    return card


def _stating_versions(text: str) -> str:
    """A card whose sentence about versions speaks of the code that is written beside it.

    Only cards that an export wrote have that sentence, or get it.
    """
    if _PROVEN.search(text):
        return _PROVEN.sub(lambda found: _versions(), text, count=1)
    return text.replace(f"\n{_CODE}", f"\n{_versions()}\n\n{_CODE}", 1)


def _versions() -> str:
    return (
        f"The code in this folder was proven on transformers {OLDEST_PROVEN} to {NEWEST_PROVEN} (from a local folder: "
        "5.11 or newer). With a newer one it says so in the log; `hf-vtc export OLD NEW` writes the code anew."
    )


def _new_card(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    title: str,
    base_model: str | None,
    license: str | None,
    sections: str,
) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    origin = f", made from [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    weights = f"`{license}`" if license else "not stated here; that of the checkpoint they come from applies"
    return f"""---
library_name: transformers
---

# {title}

A vision-language model with vision-token compression (`{model.config.model_type}`) and {parameters / 1e6:,.1f} million
parameters{origin}.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

path = "{title}"  # this repository, or a folder that holds its files
revision = "main"  # better the commit whose code you have read: it runs on your machine
model = AutoModelForImageTextToText.from_pretrained(path, revision=revision, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(path, revision=revision, trust_remote_code=True)
image = {{"type": "image", "url": "page.png"}}
messages = [{{"role": "user", "content": [image, {{"type": "text", "text": "What is shown?"}}]}}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=32, vtc_budget="auto")
print(processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
```

`vtc_budget` is `"auto"` (the method's own decision), `"full"` (no compression), a share of the reserved tokens such as
`0.5`, or the largest number of visual tokens per image.
{sections and f"{chr(10)}{sections}{chr(10)}"}
## Tokens

{_token_table(model, processor)}

## Code and licence

{_CODE}, a copy of what it needs of the Python package `hf_vtc`, which has training, LoRA and
measurements besides. Weights: {weights}.
"""


def _token_table(model: PreTrainedModel, processor: ProcessorMixin) -> str:
    """What compression can save, by image size, from the config alone."""
    budget, rows = default_budget(model.config), []
    for height, width in _IMAGE_SIZES:
        costs = estimate(model.config, (height, width), vtc_budget=budget, image_processor=processor.image_processor)
        cells = (
            f"{height} x {width}",
            count(costs.num_reserved),
            count(costs.num_kept),
            f"{binary_bytes(costs.full_kv_cache_bytes)} / {binary_bytes(costs.kv_cache_bytes)}",
            f"{flops(costs.full_prefill_flops)} / {flops(costs.prefill_flops)}",
            f"{costs.ttft_speedup:.2f}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    header = "| image, px | visual tokens | kept | KV cache, full / kept | prefill FLOPs, full / kept | speed-up |"
    return "\n".join(
        [
            f"Counted from the config for `vtc_budget={budget!r}`, {costs.num_text_tokens} text tokens, batch 1, 16 "
            "bits a value: what compression can save at best, not a measurement. The speed-up is the ideal one of the "
            "first token, tower included.",
            "",
            header,
            "|---|---|---|---|---|---|",
            *rows,
        ]
    )
