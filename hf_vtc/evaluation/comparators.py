"""Training-free methods beside the one that is evaluated: its own tower, connector and decoder under their steps."""

import copy

import torch

from ..methods import RECORDS, record_named, record_of
from .running import Asker

# what a base is known by, whatever the method on it
_OF_THE_BASE = (
    "vision_config",
    "text_config",
    "image_token_id",
    "video_token_id",
    "frame_split",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "projector_hidden_act",
    "downsample_ratio",
    "ps_version",
    "mm_patch_merge_type",
    "image_grid_pinpoints",
    "unpad_rule",
    "max_map_tiles",
    "tie_word_embeddings",
)

COMPARATORS = tuple(sorted(record.name for record in RECORDS.values() if record.is_training_free))
"""Names of the methods without parts of their own."""


def comparator(asker: Asker, name: str) -> Asker:
    """What asks the model of another asker as a training-free method. Its modules are shared and none is copied.

    Args:
        asker ([`Asker`]): of the model that is evaluated.
        name (`str`): one of `COMPARATORS`.

    Raises:
        ValueError: the method does not fit the model; the message says why, and nothing else.
    """
    ours, record = asker.config, record_named(name)
    if record_of(ours) is record:
        raise ValueError("it is the method itself")
    if not ours.sees_tiles and ours.grid_base is None:
        raise ValueError("the tower sees no tiles")
    fields = {field: copy.deepcopy(getattr(ours, field)) for field in _OF_THE_BASE}
    config = record.config(**fields)
    # some of LLaVA-NeXT's have it, whatever their files say
    config.newline_behind_single_tile = ours.newline_behind_single_tile
    with torch.device("meta"):
        head = record.head(config)
    for own, theirs in ((head, asker.head), (head.model, asker.head.model)):
        parts = dict(theirs.named_children())
        for part, _ in list(own.named_children()):
            if part != "model":
                setattr(own, part, parts[part])
    head.model.image_newline = asker.head.model.image_newline
    head.generation_config = asker.head.generation_config
    return Asker(head.eval(), asker.processor, asker.records, asker.max_new_tokens)
