"""What a conversion does, decided from configs and headers before any weight is read.

A layout (one file each) turns a `config.json` into a `Plan`: the new config and a pure map of names. `match` holds the
plan against the tensors that are really there.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from ..models.configuration_vtc import with_both_ropes

Shape = tuple[int, ...]

# in the new names
CONNECTOR = "model.multi_modal_projector"
# fields of sub-configs that say how a model was run or found, not what it is
_NO_ARCHITECTURE = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_name_or_path",
    "add_cross_attention",
    "architectures",
    "attn_implementation",
    "auto_map",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "dtype",
    "finetuning_task",
    "id2label",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "num_labels",
    "prefix",
    "problem_type",
    "pruned_heads",
    "return_dict",
    "sep_token_id",
    "task_specific_params",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tie_word_embeddings",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "use_bfloat16",
}


# fields that say how often something is built, each time with tensors of its own
_COUNTS = {
    "depth",
    "depths",
    "n_routed_experts",
    "num_experts",
    "num_hidden_layers",
    "num_layers",
    "num_local_experts",
    "num_stages",
}


def unchanged(tensor: torch.Tensor) -> tuple[torch.Tensor]:
    """The transform of a tensor that only changes its name."""
    return (tensor,)


def in_thirds(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split fused query, key and value rows: `(3C, ...)` to three of `(C, ...)`."""
    if tensor.shape[0] % 3:
        raise ValueError(f"the rows of query, key and value must be a multiple of 3, got {tensor.shape[0]}")
    return tensor.chunk(3)


class Renamed(NamedTuple):
    """New names of one stored tensor, and the function that makes the new tensors, one per name."""

    names: tuple[str, ...]
    transform: Callable[[torch.Tensor], Sequence[torch.Tensor]] = unchanged


class Source(NamedTuple):
    """What a layout may look at: the small files of a checkpoint, and the headers of its weights.

    Args:
        config (`Mapping`): content of `config.json`.
        stored (`Mapping[str, Any]`): its tensors by name, those of a tower in a folder of its own included.
        image_token_id (`int`): id of the placeholder, beyond the vocabulary where that has none.
        equal (`Callable[[str, str], bool]`): whether two of its tensors hold the same values.
        image_processor (`Mapping`): settings of its image processor, empty if unknown.
        tower (`Mapping`): content of the `config.json` of a tower in a folder of its own, empty if there is none.
        tied (`bool`, *optional*): whether head and embeddings share a weight; None if names and values must tell.
        chat_template (`str`, *optional*): of the source's processor.
        video_processor (`Mapping`): settings of its video processor, empty if unknown.
    """

    config: Mapping[str, Any]
    stored: Mapping[str, Any]
    image_token_id: int
    equal: Callable[[str, str], bool]
    image_processor: Mapping[str, Any] = {}
    tower: Mapping[str, Any] = {}
    tied: bool | None = None
    chat_template: str | None = None
    video_processor: Mapping[str, Any] = {}


class ProcessorSettings(NamedTuple):
    """Fields of the processor that fits a planned model.

    Args:
        images (`Mapping`): fields of `VtcImageProcessor`.
        fields (`Mapping`): fields of `VtcProcessor`, such as `image_token` and `count_rule`.
    """

    images: Mapping[str, Any]
    fields: Mapping[str, Any] = {}


@dataclass
class Plan:
    """One conversion.

    Args:
        layout (`str`): name of the source layout.
        config (`PretrainedConfig`): of the result.
        model_class (`type`): of the result.
        rename (`Callable[[str], Renamed | None]`): pure map of names, None for a name of no use.
        ignored (`dict[str, str]`): source name -> why it is left out on purpose (a head tied to the embeddings).
        fresh_modules (`tuple[str, ...]`): submodules that the source lacks and that are initialised.
        optional (`Callable[[str], bool]`): whether a new name may be missing though the source has its module.
        processor (`ProcessorSettings`): of images and prompts.
        is_base (`bool`): whether the source compresses nothing, so that the result knows what the source knew and
            whatever it has besides is fresh.
        notes (`list[str]`): what the caller should know.
    """

    layout: str
    config: PretrainedConfig
    model_class: type[PreTrainedModel]
    rename: Callable[[str], Renamed | None]
    processor: ProcessorSettings
    ignored: dict[str, str] = field(default_factory=dict)
    fresh_modules: tuple[str, ...] = ()
    optional: Callable[[str], bool] = lambda name: False
    is_base: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass
class Match:
    """A plan held against the tensors that are there.

    Args:
        used (`dict[str, Renamed]`): source name -> what becomes of it.
        unused (`list[str]`): source names that the plan has no use for.
        missing (`list[str]`): new names that the source should have had, none of them needed.
        fresh (`list[str]`): new names that are initialised, `missing` included.
        skeleton (`PreTrainedModel`): the new model on the meta device.
    """

    used: dict[str, Renamed]
    unused: list[str]
    missing: list[str]
    fresh: list[str]
    skeleton: PreTrainedModel


def match(plan: Plan, stored: Mapping[str, Shape], origin: str, on_disk: bool = True) -> Match:
    """Check names and shapes of a source against the model that the plan builds.

    Args:
        plan (`Plan`): what is wanted.
        stored (`Mapping[str, tuple]`): source names and shapes.
        origin (`str`): where they come from, for messages.
        on_disk (`bool`): whether `stored` are names of a file. Experts are single tensors there, and fused in memory.

    Raises:
        ValueError: a needed tensor is missing, a shape does not fit, two tensors claim one name, or the new projector
            has no place for a tensor of the base's.
    """
    with torch.device("meta"):
        skeleton = plan.model_class(plan.config)
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    if plan.config.tie_word_embeddings:
        for tied in skeleton._tied_weights_keys:
            expected.pop(tied, None)
    if on_disk:
        expected = dict(_single_experts(expected))

    used, unused, claimed, misfits, lost = {}, [], {}, [], []
    for name, shape in stored.items():
        renamed = None if name in plan.ignored else plan.rename(name)
        if renamed is None or any(new not in expected for new in renamed.names):
            unused.append(name)
            # a part of the connector that the layout knows: without it every visual token differs
            if renamed is not None and any(new.startswith(f"{CONNECTOR}.") for new in renamed.names):
                lost.append(name)
            continue
        misfits += _misfits(name, shape, renamed, expected)
        for new in renamed.names:
            if new in claimed:
                raise ValueError(f"{origin}: {claimed[new]!r} and {name!r} both mean {new!r}. Remove one of them.")
            claimed[new] = name
        used[name] = renamed

    if lost:
        raise ValueError(
            f"{origin} has {', '.join(lost)}, for which the projector of {plan.config.model_type!r} at "
            f"`downsample_ratio` {plan.config.downsample_ratio} has no place: it has a norm only behind a pixel "
            "shuffle. Left out, visual tokens would not be those of the base. Convert a base whose `downsample_ratio` "
            "is below 1."
        )
    absent = [name for name in expected if name not in claimed]
    in_fresh = [name for name in absent if name.startswith(tuple(f"{module}." for module in plan.fresh_modules))]
    missing = [name for name in absent if name not in in_fresh]
    needed = [name for name in missing if not plan.optional(name)]
    if needed:
        raise ValueError(
            f"{origin} lacks {len(needed)} tensors that a {plan.layout} checkpoint must have: {', '.join(needed)} "
            f"(new names). Unused: {', '.join(unused) or 'none'}. Check that config.json and weights fit together."
        )
    if misfits:
        raise ValueError(
            f"{origin} has tensors that do not fit its config.json: {'; '.join(misfits)}. Check that both belong "
            "together."
        )
    return Match(used, unused, missing, [name for name in absent if name in in_fresh or name in missing], skeleton)


def require_plausible(config: Mapping[str, Any], num_tensors: int, origin: str | PathLike) -> None:
    """Refuse a `config.json` that asks for more parts than there are tensors: building them would not end.

    Args:
        config (`Mapping`): content of the file.
        num_tensors (`int`): that the checkpoint holds.
        origin (`str` or `PathLike`): its folder, for messages.

    Raises:
        ValueError: it does.
    """
    parts: list[Any] = [config]
    while parts:
        part = parts.pop()
        for name, value in part.items() if isinstance(part, Mapping) else ():
            numbers = value if isinstance(value, list) else [value]
            if name in _COUNTS and any(isinstance(number, int | float) and number > num_tensors for number in numbers):
                raise ValueError(
                    f"config.json of {origin} says `{name}` {str(value)[:40]}, but there are {num_tensors} tensors. "
                    "Check that both belong together."
                )
            parts += numbers


def is_tied(source: Source, text_config: Mapping[str, Any], head: str | None, embeddings: str) -> bool:
    """Whether the head of a checkpoint shares the weight of its input embeddings: `source.tied` where that is known.

    A head that differs from the embeddings is never given up: transformers 5 writes `tie_word_embeddings` unasked.

    Args:
        source (`Source`): the checkpoint.
        text_config (`Mapping`): the part of its config that describes the decoder.
        head (`str`, *optional*): name of the head's weight, None if the checkpoint has none.
        embeddings (`str`): name of the embeddings' weight.
    """
    if source.tied is not None:
        return source.tied
    said = {text_config.get("tie_word_embeddings"), source.config.get("tie_word_embeddings")}
    if head is None:
        return True in said or said == {None}
    return True in said and embeddings in source.stored and source.equal(head, embeddings)


def fresh_tensors(matched: Match, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Initialise what the source lacks, without building the rest of the model.

    The values depend on torch's seed and on the config alone.
    """
    modules = dict.fromkeys(_top_module(name) for name in matched.fresh)
    wanted = set(matched.fresh)
    for module_name in modules:
        module = matched.skeleton.get_submodule(module_name).to_empty(device="cpu")
        for part in module.modules():
            matched.skeleton._init_weights(part)
        for name, tensor in module.state_dict(prefix=f"{module_name}.").items():
            if name in wanted:
                yield name, tensor.to(dtype)


def architecture_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what describes a tower or a decoder, drop generation settings, dtypes and attention kernels of old files.

    What is left out is listed, not what is kept: some decoders read fields that their config does not declare, such
    as `head_dim`.
    `tie_word_embeddings` goes too: the plan decides about it.
    """
    generation = GenerationConfig().to_dict().keys() - {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache"}
    dropped = generation | _NO_ARCHITECTURE
    return {name: value for name, value in with_both_ropes(fields).items() if name not in dropped}


def _misfits(name: str, shape: Shape, renamed: Renamed, expected: Mapping[str, Shape]) -> list[str]:
    try:
        parts = renamed.transform(torch.empty(shape, device="meta"))
    except (ValueError, IndexError) as error:
        return [f"{name} {list(shape)}: {error}"]
    return [
        f"{name} {list(shape)} gives {new} {list(part.shape)}, the config asks for {list(expected[new])}"
        for new, part in zip(renamed.names, parts, strict=True)
        if tuple(part.shape) != expected[new]
    ]


def _single_experts(expected: Mapping[str, Shape]) -> Iterator[tuple[str, Shape]]:
    """transformers 5 fuses the experts of a mixture in memory; its files, as those of 4.x, hold one tensor each."""
    for name, shape in expected.items():
        base, _, leaf = name.rpartition(".")
        if not base.endswith(".mlp.experts"):
            yield name, shape
        elif leaf == "gate_up_proj":
            for expert in range(shape[0]):
                yield f"{base}.{expert}.gate_proj.weight", (shape[1] // 2, shape[2])
                yield f"{base}.{expert}.up_proj.weight", (shape[1] // 2, shape[2])
        else:
            for expert in range(shape[0]):
                yield f"{base}.{expert}.{leaf}.weight", tuple(shape[1:])


def _top_module(name: str) -> str:
    """`model.router.gate.weight` -> `model.router`: parts are initialised as a whole, whatever is kept of them."""
    found = re.match(r"model\.\w+", name)
    return found.group() if found else name.rpartition(".")[0]
