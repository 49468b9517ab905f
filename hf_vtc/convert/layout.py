"""What a layout of published checkpoints is: how it is recognised, what it can become, and how."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..methods import Record
from .plan import Plan, Renamed, Source

Config = Mapping[str, Any]
Stored = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """One layout. `config` is the content of a `config.json`, `stored` the tensors of the checkpoint by name.

    Args:
        title (`str`): its name for messages.
        image_token (`str`): how the placeholder is spelt.
        matches (`(config) -> bool`): whether a `config.json` is of this layout.
        methods (`(config, stored) -> dict[str, Record]`): what such a checkpoint can become, by name.
        rename (`(name) -> Renamed | None`): pure map of names, None for one that the layout does not have.
        plan (`(source, target, overrides) -> Plan`): the conversion, where `overrides` are fields of the new config
            that replace those of the file. Raises a `ValueError` for a setting that has no counterpart here.
        stored_image_token_id (`(config) -> int | None`): id of the placeholder, if the file says it.
        vocab_size (`(config) -> int | None`): rows of the embeddings where the placeholder has none, else None.
        tower_name (`(config, stored) -> str | None`): folder or repository of a tower of its own, None if all that is
            needed of it is part of the checkpoint.
        model_classes (`tuple[str, ...]`): classes of transformers that are bases in memory as well.
    """

    title: str
    image_token: str
    matches: Callable[[Config], bool]
    methods: Callable[[Config, Stored], dict[str, Record]]
    rename: Callable[[str], Renamed | None]
    plan: Callable[[Source, Record, Mapping[str, Any]], Plan]
    stored_image_token_id: Callable[[Config], int | None] = lambda config: config.get("image_token_id")
    vocab_size: Callable[[Config], int | None] = lambda config: None
    tower_name: Callable[[Config, Stored], str | None] = lambda config, stored: None
    model_classes: tuple[str, ...] = ()
