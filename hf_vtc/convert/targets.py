"""What a base becomes: the methods that uncompressed checkpoints can be turned into."""

from collections.abc import Callable, Mapping
from typing import Any

from ..methods import RECORDS, Record
from .plan import CONNECTOR, Plan, ProcessorSettings, Renamed


def targets_of(kind: str) -> dict[str, Record]:
    """The methods that can start from a kind of base, by name."""
    return {
        record.name: record for record in RECORDS.values() if record.base is not None and kind in record.base.kinds
    }


def plan_base(
    target: Record,
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
        target ([`Record`]): the method.
        overrides (`Mapping`): fields of its config that the caller gave.
        layout (`str`): name of the source layout.
        fields (`Mapping`): fields of `VtcConfig` that the source gives, `text_config` among them.
        rename (`Callable[[str], Renamed | None]`): pure map of names of the layout.
        processor (`ProcessorSettings`): what the base needs.
        ignored (`dict[str, str]`): source name -> why it is left out on purpose.
        notes (`list[str]`): what the caller should know about the source.
    """
    base = target.need("base", "conversion")
    new_fields = {**fields, **base.fresh_fields, **overrides}
    # a caller who sets these fields knows what the note says
    fresh = all(new_fields[name] == value for name, value in base.fresh_fields.items())
    fresh_modules = base.fresh_modules
    if new_fields["downsample_ratio"] != fields["downsample_ratio"]:
        fresh_modules = (*fresh_modules, CONNECTOR)
        rename = _without_projector(rename)
        notes = [*notes, "The base's projector follows a pixel shuffle: a plain one is freshly initialised."]
    config = target.config(**new_fields)
    if processor.fields.get("count_rule", "").startswith("unpad_"):
        fields_of_it = {**processor.fields, "count_rule": f"unpad_{config.unpad_rule}"}
        processor = ProcessorSettings(processor.images, fields_of_it)
    return Plan(
        layout=layout,
        config=config,
        model_class=target.head,
        rename=rename,
        processor=processor,
        ignored=ignored,
        fresh_modules=fresh_modules,
        is_base=True,
        notes=notes + ([base.fresh_note] if base.fresh_note and fresh else []),
    )


def _without_projector(rename: Callable[[str], Renamed | None]) -> Callable[[str], Renamed | None]:
    """The same map of names, with no use for a base's projector."""

    def renamed(name: str) -> Renamed | None:
        found = rename(name)
        return None if found is None or found.names[0].startswith(f"{CONNECTOR}.") else found

    return renamed
