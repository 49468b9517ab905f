"""The door to transformers: what its versions call by different names.

Seen on transformers 4.57.6 to 5.24.0. `host_tower_vtc.py`, `host_decoder_vtc.py` and `host_processor_vtc.py` have what
leans on towers, decoders and processors; nothing else in `models/` uses a private name of a host.

A choice looks for what the older versions have, or compares with the release that brought the newer: a name that a
later version renames must fail loudly, and not select what was written for an older one.
"""

import dataclasses
from collections.abc import Container

import transformers
from transformers import Cache, LlamaForCausalLM, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import TransformersKwargs

from .window_vtc import release_of

RELEASE = release_of(transformers.__version__)

_OUTPUT_FIELDS = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}

# transformers 5.24 renamed the cache in every signature and output; up to 5.23 it has the older name
CACHE_NAME = "past_key_values" if "past_key_values" in _OUTPUT_FIELDS else "cache"

# transformers 5 loads the installed code of a registered class, whatever `auto_map` and `trust_remote_code` say
PREFERS_INSTALLED_CODE = RELEASE >= (5, 0)

# transformers 4 builds each part of a model in the dtype of its own config, which no later one does beside the model's
PARTS_HAVE_OWN_DTYPE = RELEASE < (5, 0)

# a head as in every stock decoder, in the words of the installed version
HEAD_TP_PLAN = dict(LlamaForCausalLM._tp_plan)


# models whose tower sees every image at its own size, as a grid of patches, and has the connector in it, and the first
# version of transformers that has them
GRID_BASES = {"qwen2_5_vl": "4.49", "qwen3_vl": "4.57", "qwen3_5": "5.2"}


def grid_base_of(tower_type: str) -> str | None:
    """The model, one of `GRID_BASES`, to which a tower of this `model_type` belongs; None for other towers."""
    # a tower of 4.57 has the name of its model
    base = tower_type.removesuffix("_vision")
    return base if base in GRID_BASES else None


def counts_seconds(base: str) -> bool:
    """Whether positions of one of `GRID_BASES` tell when in a video a frame is; the prompts of others say it."""
    return base == "qwen2_5_vl"


def require_base(base: str, known: Container[str]) -> None:
    """Raise an ImportError for one of `GRID_BASES` that is not among those that the installed transformers knows."""
    if base not in known:
        raise ImportError(
            f"{base} needs transformers >= {GRID_BASES[base]}, installed is {transformers.__version__}. Upgrade it: "
            f"`pip install 'transformers>={GRID_BASES[base]}'`."
        )


# what every stock forward takes beyond its named arguments: for attention, losses and outputs
FORWARD_ARGUMENTS = frozenset(TransformersKwargs.__annotations__) | {
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "cache_position",
    "num_items_in_batch",
    "shift_labels",
}


def named_cache(cache: Cache | None) -> dict[str, Cache | None]:
    """The keyword argument or output field in which the installed transformers carries a cache."""
    return {CACHE_NAME: cache}


def cache_of(outputs: BaseModelOutputWithPast) -> Cache | None:
    """The cache in what a model of the installed transformers gave back."""
    return getattr(outputs, CACHE_NAME)


def given_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache that a caller gave under one of its two names.

    Raises:
        ValueError: two different caches were given.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("`past_key_values` and `cache` are two names of one argument. Give one of them.")
    return cache if past_key_values is None else past_key_values


def is_recurrent(config: PretrainedConfig) -> bool:
    """Whether some layers of a decoder keep a state instead of keys and values, as three of four of Qwen3.5's do."""
    return "linear_attention" in (vars(config).get("layer_types") or ())


def position_axes(config: PretrainedConfig) -> tuple[int, ...]:
    """Leading axes of a decoder's positions: `(3,)` of time, height and width where its rotary embedding has sections
    for them, `()` where positions count tokens."""
    # under its name of 4.57, or that of 5.x
    rope = vars(config).get("rope_parameters") or vars(config).get("rope_scaling") or {}
    return (3,) if "mrope_section" in rope else ()


# what engines that run stock models call their own attention: vLLM 0.32, and SGLang by its documentation
_ENGINES = ("vllm", "sglang")


def engine_of(text_config: PretrainedConfig) -> str | None:
    """The engine whose backend for models of transformers builds a decoder, None for transformers itself."""
    attention = text_config._attn_implementation
    return attention if attention in _ENGINES else None
