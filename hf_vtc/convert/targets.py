"""What a base becomes: the methods that uncompressed checkpoints can be turned into."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from transformers import PretrainedConfig, PreTrainedModel

from ..models.configuration_avg_llava import AvgLlavaConfig
from ..models.configuration_convllava import ConvllavaConfig
from ..models.configuration_llavolta import LlavoltaConfig
from ..models.configuration_vico import VicoConfig
from ..models.configuration_vistog import VistogConfig
from ..models.modeling_avg_llava import AvgLlavaForConditionalGeneration
from ..models.modeling_convllava import ConvllavaForConditionalGeneration
from ..models.modeling_llavolta import LlavoltaForConditionalGeneration
from ..models.modeling_vico import VicoForConditionalGeneration
from ..models.modeling_vistog import VistogForConditionalGeneration
from .plan import Plan, ProcessorSettings, Renamed


class Target(NamedTuple):
    """A method, as a layout needs to know it.

    Args:
        config (`type`): config class.
        model (`type`): class with a language modelling head.
        bases (`tuple[str, ...]`): kinds of uncompressed checkpoints that it can start from: `"internvl"` (pixel
            shuffle, tiles), `"llava"` (one tile per image), `"llava_next"` (tiles with a newline after each row).
        new_modules (`tuple[str, ...]`): submodules that a base lacks and that are initialised.
        fresh_fields (`Mapping`): config fields of a model whose new parts know nothing yet.
        fresh_note (`str`): what the caller of such a model should know, empty for nothing.
        processor_fields (`Mapping`): fields of `VtcProcessor` that the method needs on every base.
    """

    config: type[PretrainedConfig]
    model: type[PreTrainedModel]
    bases: tuple[str, ...] = ()
    new_modules: tuple[str, ...] = ()
    fresh_fields: Mapping[str, Any] = {}
    fresh_note: str = ""
    processor_fields: Mapping[str, Any] = {}


TARGETS: dict[str, Target] = {
    "vistog": Target(
        VistogConfig,
        VistogForConditionalGeneration,
        bases=("internvl", "llava"),
        new_modules=("model.semantic_tokens", "model.grouping"),
        # groups have no grid that a pixel shuffle could fold
        fresh_fields={"downsample_ratio": 1.0},
        fresh_note="A base checkpoint: semantic tokens and grouping layer are freshly initialised. Train them before "
        "asking for anything but `vtc_budget='full'`.",
    ),
    # no base: its tower is another one
    "convllava": Target(ConvllavaConfig, ConvllavaForConditionalGeneration),
    "vico": Target(
        VicoConfig,
        VicoForConditionalGeneration,
        bases=("internvl",),
        new_modules=("model.compressed_projector", "model.router"),
        fresh_fields={"flash_mode": False},
        fresh_note="A base checkpoint: the compressed connector and the router are freshly initialised and routing is "
        "off (`flash_mode=False`). Train them before switching it on.",
    ),
    "llavolta": Target(LlavoltaConfig, LlavoltaForConditionalGeneration, bases=("internvl", "llava", "llava_next")),
    "avg_llava": Target(
        AvgLlavaConfig,
        AvgLlavaForConditionalGeneration,
        bases=("internvl", "llava", "llava_next"),
        new_modules=("model.router",),
        # the original LLaVA-NeXT code measures padding on the grid of tokens, which is right while tokens are square
        fresh_fields={"router_select": False, "unpad_rule": "true_aspect"},
        fresh_note="A base checkpoint: the router is freshly initialised and does not choose (`router_select=False`), "
        "and the model has seen its finest granularity only. Train both, in this order, before switching it on.",
    ),
}


def targets_of(base: str) -> dict[str, Target]:
    """The methods that can start from a kind of base, by name."""
    return {name: target for name, target in TARGETS.items() if base in target.bases}


def plan_base(
    target: Target,
    overrides: Mapping[str, Any],
    layout: str,
    fields: Mapping[str, Any],
    rename: Callable[[str], Renamed | None],
    processor: ProcessorSettings,
    ignored: dict[str, str],
    notes: list[str],
) -> Plan:
    """The plan that turns an uncompressed checkpoint into a method.

    Args:
        target (`Target`): the method.
        overrides (`Mapping`): fields of its config that the caller gave.
        layout (`str`): name of the source layout.
        fields (`Mapping`): fields of `VtcConfig` that the source gives, `text_config` among them.
        rename (`Callable[[str], Renamed | None]`): pure map of names of the layout.
        processor (`ProcessorSettings`): what the base needs.
        ignored (`dict[str, str]`): source name -> why it is left out on purpose.
        notes (`list[str]`): what the caller should know about the source.
    """
    new_fields = {**fields, **target.fresh_fields, **overrides}
    # a caller who sets these fields knows what the note says
    fresh = all(new_fields[name] == value for name, value in target.fresh_fields.items())
    new_modules = target.new_modules
    if new_fields["downsample_ratio"] != fields["downsample_ratio"]:
        new_modules = (*new_modules, _PROJECTOR)
        rename = _without_projector(rename)
        notes = [*notes, "The base's projector follows a pixel shuffle: a plain one is freshly initialised."]
    config, processor_fields = target.config(**new_fields), {**processor.fields, **target.processor_fields}
    if processor_fields.get("count_rule", "").startswith("unpad_"):
        processor_fields["count_rule"] = f"unpad_{config.unpad_rule}"
    return Plan(
        layout=layout,
        config=config,
        model_class=target.model,
        rename=rename,
        processor=ProcessorSettings(processor.images, processor_fields),
        ignored=ignored,
        fresh_modules=new_modules,
        is_base=True,
        notes=notes + ([target.fresh_note] if target.fresh_note and fresh else []),
    )


_PROJECTOR = "model.multi_modal_projector"


def _without_projector(rename: Callable[[str], Renamed | None]) -> Callable[[str], Renamed | None]:
    """The same map of names, with no use for a base's projector."""

    def renamed(name: str) -> Renamed | None:
        found = rename(name)
        return None if found is None or found.names[0].startswith(f"{_PROJECTOR}.") else found

    return renamed
