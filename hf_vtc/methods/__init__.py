"""Every method that hf_vtc offers: importing this package registers them. A method is its pair of files in `models`
and its record here."""

from pkgutil import iter_modules

from .. import models
from . import avg_llava, cdpruner, convllava, llavolta, vico, visionzip, vistog
from .record import (
    RECORDS,
    Base,
    Costs,
    Record,
    Sharding,
    find_record,
    record_named,
    record_of,
    register,
)

__all__ = [
    "RECORDS",
    "Base",
    "Costs",
    "Record",
    "Sharding",
    "avg_llava",
    "cdpruner",
    "convllava",
    "find_record",
    "llavolta",
    "record_named",
    "record_of",
    "register",
    "vico",
    "visionzip",
    "vistog",
]


def _refuse_methods_without_record() -> None:
    """Tools go by the records alone: what has none would be unknown to them without a word."""
    prefix = "configuration_"
    pairs = {file.name.removeprefix(prefix) for file in iter_modules(models.__path__) if file.name.startswith(prefix)}
    # of the base, which is no method
    pairs.discard("vtc")
    missing = sorted(pairs - {record.name for record in RECORDS.values()})
    if missing:
        raise ImportError(
            f"hf_vtc/models has {' and '.join(missing)}, of which there is no record. Write hf_vtc/methods/"
            f"{missing[0]}.py, which registers it, and import it in hf_vtc/methods/__init__.py."
        )


_refuse_methods_without_record()
