"""What tools must know of a method stands in its record, and nowhere else: no tool compares a `model_type`.

A part that a record leaves out is missing: the tool that needs it says so by name, and never goes on with numbers or
names that are those of another method.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.image_processing_utils import BaseImageProcessor

# the top-level name is a stand-in without torchvision in some 5.x
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ..auto import AutoModelForVision2Seq
from ..models.configuration_vtc import VtcConfig
from ..models.image_processing_vtc import VtcImageProcessor
from ..models.processing_vtc import VtcProcessor
from .baselines import Baselines
from .costs import Workload
from .drawing import Drawing, Kept
from .names import PREFIX, is_method
from .shapes import Shape

try:
    # transformers 5 loads so what may take more than images, which servers ask for
    from transformers import AutoModelForMultimodalLM
except ImportError:
    _MORE_AUTO_CLASSES = ()
else:
    _MORE_AUTO_CLASSES = (AutoModelForMultimodalLM,)


def same_in_every_layer(config: VtcConfig, num_layers: int, num_reserved: int, num_kept: int) -> list[tuple[int, int]]:
    """Every layer sees what is kept."""
    return [(num_layers, num_kept)]


def connect_all(base: nn.Module, output: Any) -> Callable[[Any], Any]:
    """The connector of an oracle that needs every feature; towers that see grids have it in them."""
    return base.multi_modal_projector if base.config.grid_base is None else lambda features: features


def connector_names(config: VtcConfig) -> tuple[str, ...]:
    """Names of the projector, or of the connectors in a tower that sees grids."""
    if config.grid_base is None:
        return ("model.multi_modal_projector",)
    # not in the config of every tower
    deeper = vars(config.vision_config).get("deepstack_visual_indexes", ())
    return (
        "model.vision_tower.merger",
        *(f"model.vision_tower.deepstack_merger_list.{idx}" for idx in range(len(deeper))),
    )


@dataclass(frozen=True)
class Costs:
    """What a method adds to the costs of tower and language model. Means, norms and sorting are left out.

    Args:
        compressor_flops (`(workload, num_kept) -> float`): FLOPs of one image that are neither the plain tower's nor
            the language model's: connectors, whatever groups or compares.
        layers (`(config, num_layers, num_reserved, num_kept) -> list`): how many layers of the language model see how
            many visual tokens, as `(layers, tokens)` in order.
        router_flops (`(workload) -> float`, *optional*): FLOPs of one image in a router, where the method has one.
        router_ranks (`bool`): whether the router also runs where the count is given, to say which tokens stay; else
            it runs under `"auto"` alone, where it is free to decide.
    """

    compressor_flops: Callable[[Workload, int], float]
    layers: Callable[[VtcConfig, int, int, int], list[tuple[int, int]]] = same_in_every_layer
    router_flops: Callable[[Workload], float] | None = None
    router_ranks: bool = False


@dataclass(frozen=True)
class Base:
    """How uncompressed checkpoints become a method.

    Args:
        kinds (`tuple[str, ...]`): that it can start from: `"internvl"` (pixel shuffle, tiles), `"llava"` (one tile per
            image), `"llava_next"`, `"llava_onevision"` (tiles with a newline after each row), `"qwen2_5_vl"`,
            `"qwen3_vl"`, `"qwen3_5"` (grids). None of them: its tower is another one.
        fresh_modules (`tuple[str, ...]`): submodules that a base lacks and that are initialised.
        fresh_fields (`Mapping`): config fields of a model whose new parts know nothing yet.
        fresh_note (`str`): what the caller of such a model should know, empty for nothing.
        warm_starts (`Mapping[str, (model) -> None]`): what gives a submodule that was initialised, by its name, better
            values than drawn ones, made from other parts of the model: where a fit starts.
        official_fields (`(config, num_layers) -> dict`): fields of its config that a `config.json` of LLaVA's original
            code may say, for a decoder of so many layers.
    """

    kinds: tuple[str, ...]
    fresh_modules: tuple[str, ...] = ()
    fresh_fields: Mapping[str, Any] = field(default_factory=dict)
    fresh_note: str = ""
    warm_starts: Mapping[str, Callable[[PreTrainedModel], None]] = field(default_factory=dict)
    official_fields: Callable[[Mapping[str, Any], int], dict[str, Any]] = lambda config, num_layers: {}


@dataclass(frozen=True)
class Sharding:
    """How a method trains with parameters that are spread over processes.

    Args:
        left_out (`(model) -> set[str]`): classes of modules that are not gathered one by one although tower, decoder
            or the method's own parts would be, since not every process runs them in the same order.
        zero3_problem (`str`): why it cannot train under ZeRO-3 and what to do instead, empty where it can.
    """

    left_out: Callable[[PreTrainedModel], set[str]] = lambda model: set()
    zero3_problem: str = ""


@dataclass(frozen=True)
class Record:
    """All that the package knows of one method.

    Args:
        config, model, head (`type`): its classes; `head` is the model with a language modelling head.
        costs ([`Costs`]): for `estimate`, `bench` and model cards.
        oracle (`(base model, output) -> function`): what runs a batch of features through the connectors that were
            needed for this output, for `bench`.
        draw (`(kept) -> Drawing`): what stays of an image, for `overlay`.
        compressor (`(config) -> names`): modules between pixels and language model that make the method what it is:
            LoRA trains them whole, quantisation leaves them alone.
        untaught (`tuple[str, ...]`): those of them that the loss of the language model does not reach: a router.
        base ([`Base`]): for conversion.
        sharding ([`Sharding`]): for FSDP and ZeRO.
        trainers (`tuple[str, ...]`): names of those classes of `hf_vtc.trainers` that are for this method alone.
        baselines ([`Baselines`]): what an evaluation compares the method with.
        recipes (`tuple[str, ...]`): names of the recipes in `hf_vtc/fit/recipes` that `hf-vtc fit` runs in turn; none
            where there is nothing to train.
        shapes (`Mapping[str, Shape]`): sizes of its models, by the end of their name: `"7b"` of AVG-LLaVA becomes
            `avg-llava-7b` for `estimate` and `bench`; `"100m"` is the one that `hf-vtc run` measures.
        processor, image_processor (`type`): what prepares its prompts and images.
    """

    config: type[VtcConfig]
    model: type[PreTrainedModel]
    head: type[PreTrainedModel]
    costs: Costs | None = None
    oracle: Callable[[nn.Module, Any], Callable[[Any], Any]] | None = None
    draw: Callable[[Kept], Drawing] | None = None
    compressor: Callable[[VtcConfig], Sequence[str]] | None = None
    untaught: tuple[str, ...] = ()
    base: Base | None = None
    sharding: Sharding | None = None
    trainers: tuple[str, ...] | None = None
    baselines: Baselines | None = None
    recipes: tuple[str, ...] | None = None
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    processor: type[ProcessorMixin] = VtcProcessor
    image_processor: type[BaseImageProcessor] = VtcImageProcessor

    @property
    def model_type(self) -> str:
        return self.config.model_type

    @property
    def name(self) -> str:
        """As in names of files and in `method="vico"`."""
        return self.model_type.removeprefix(PREFIX)

    @property
    def is_training_free(self) -> bool:
        """Whether the method adds nothing to a base that would have to be trained."""
        return self.recipes == ()

    def need(self, part: str, tool: str) -> Any:
        """A part of the record.

        Args:
            part (`str`): its name.
            tool (`str`): what cannot do without it, for the message.

        Raises:
            ValueError: the record lacks it.
        """
        found = getattr(self, part)
        if found is None:
            raise ValueError(
                f"The record of {self.model_type!r} has no `{part}`, which {tool} needs. Add it where the method is "
                f"registered; {type(self).__name__} in hf_vtc/methods/record.py says what it is."
            )
        return found


RECORDS: dict[str, Record] = {}
"""The record of each method, by `model_type`."""


def register(record: Record) -> Record:
    """Make a method known to the Auto classes of transformers and to every tool.

    Raises:
        ValueError: the `model_type` is no name of a method, or is that of another one.
    """
    if not is_method(record.model_type):
        raise ValueError(f"`model_type` of a method must begin with {PREFIX!r}, got {record.model_type!r}.")
    if RECORDS.get(record.model_type, record).config is not record.config:
        raise ValueError(f"Two methods are called {record.model_type!r}. Give one of them another `model_type`.")
    RECORDS[record.model_type] = record
    AutoConfig.register(record.model_type, record.config, exist_ok=True)
    AutoModel.register(record.config, record.model, exist_ok=True)
    # of one mapping on transformers 5, of two on 4.57
    for auto_class in (AutoModelForImageTextToText, AutoModelForVision2Seq, *_MORE_AUTO_CLASSES):
        auto_class.register(record.config, record.head, exist_ok=True)
    AutoProcessor.register(record.config, record.processor, exist_ok=True)
    # the older of two spellings that transformers 5 takes: "slow" means that it works on PIL images
    AutoImageProcessor.register(record.config, slow_image_processor_class=record.image_processor, exist_ok=True)
    return record


def record_named(name: str) -> Record:
    """The record of a method, such as `"vico"`.

    Raises:
        ValueError: there is none.
    """
    if PREFIX + name not in RECORDS:
        names = ", ".join(sorted(record.name for record in RECORDS.values()))
        raise ValueError(f"The method must be one of {names}, got {name!r}.")
    return RECORDS[PREFIX + name]


def find_record(config: PretrainedConfig | Mapping[str, Any]) -> Record | None:
    """The record of a model's method, None for a model of another package.

    Args:
        config: of the model, or the content of its `config.json`.

    Raises:
        ValueError: it is a method of hf_vtc, but not one that is known here.
    """
    model_type = config.get("model_type") if isinstance(config, Mapping) else config.model_type
    if is_method(model_type) and model_type not in RECORDS:
        raise ValueError(
            f"{model_type!r} is the name of a method of hf_vtc of which there is no record here, only of "
            f"{', '.join(sorted(RECORDS))}. Upgrade hf_vtc, or register the method by `hf_vtc.methods.register`."
        )
    return RECORDS.get(str(model_type))


def record_of(config: PretrainedConfig | Mapping[str, Any]) -> Record:
    """The record of a model's method; see `find_record`.

    Raises:
        ValueError: the model is none of ours.
    """
    record = find_record(config)
    if record is None:
        model_type = config.get("model_type") if isinstance(config, Mapping) else config.model_type
        raise ValueError(f"`model_type` must be one of {', '.join(sorted(RECORDS))}, got {model_type!r}.")
    return record
