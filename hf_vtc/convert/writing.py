"""A converted model as files, written shard by shard, and the report on it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from .checkpoint import Checkpoint, streamed
from .plan import Plan, Renamed, fresh_tensors, match
from .shards import CheckpointReader, ShardWriter


@dataclass
class ConversionReport:
    """What `convert` did.

    Args:
        source (`Path`): the folder that was read.
        destination (`Path`): the folder that was written.
        layout (`str`): layout of the source.
        method (`str`): method of the result.
        dtype (`torch.dtype`): of the written floating tensors.
        num_copied (`int`): source tensors that were carried over.
        missing_keys (`list[str]`): tensors (new names) that the source should have had; none of them is needed.
        unused_keys (`list[str]`): tensors (source names) that have no place in the result.
        fresh_keys (`list[str]`): tensors (new names) that were initialised, because the source has no such part.
        num_fresh_parameters (`int`): numbers in `fresh_keys`.
        num_bytes (`int`): size of the written tensors.
        has_processor (`bool`): whether tokenizer and processor were written too.
        notes (`list[str]`): what the caller should know.
    """

    source: Path
    destination: Path
    layout: str
    method: str
    dtype: torch.dtype
    num_copied: int
    missing_keys: list[str]
    unused_keys: list[str]
    fresh_keys: list[str]
    num_fresh_parameters: int
    num_bytes: int
    has_processor: bool
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """The report in words, a line per fact."""
        lines = [
            f"{self.layout} -> {self.method}: {self.destination}",
            f"copied: {self.num_copied} tensors; written: {self.num_bytes / 1e6:,.1f} MB of weights",
        ]
        if self.fresh_keys:
            lines.append(f"initialised: {len(self.fresh_keys)} tensors, {self.num_fresh_parameters:,} parameters")
        if self.missing_keys:
            lines.append(f"missing in the source, never used: {', '.join(self.missing_keys)}")
        if self.unused_keys:
            lines.append(f"not used: {', '.join(self.unused_keys)}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def write_model(
    checkpoint: Checkpoint,
    plan: Plan,
    folder: Path,
    destination: Path,
    dtype: torch.dtype | None,
    max_shard_size: int,
    save_code: bool,
) -> ConversionReport:
    """Write what is planned to an empty folder, shard by shard.

    Args:
        checkpoint (`Checkpoint`): the source.
        plan (`Plan`): of the conversion.
        folder (`Path`): where the files are written, which `destination` will be.
        destination (`Path`): for the report.
        dtype (`torch.dtype`, *optional*): of the written floating tensors. Default: as stored.
        max_shard_size (`int`): bytes of one file.
        save_code (`bool`): whether to write the model's source files too.
    """
    matched = match(plan, checkpoint.shapes(), str(checkpoint.folder))
    dtype = dtype or checkpoint.reader.main_dtype()
    writer = ShardWriter(folder, max_shard_size)
    for names in checkpoint.reader.by_shard(matched.used):
        _copy_shard(checkpoint.reader, writer, {name: matched.used[name] for name in names}, dtype)
    num_fresh = 0
    for name, tensor in fresh_tensors(matched, dtype):
        num_fresh += tensor.numel()
        writer.add(name, tensor)
    writer.close()
    _write_config(plan, matched.skeleton, dtype, folder, save_code)
    checkpoint.write_assets(plan, folder, save_code)
    notes = list(plan.notes)
    if checkpoint.tokenizer is None:
        notes.append("The source has no tokenizer: the model alone was written, without a processor.")
    return ConversionReport(
        source=checkpoint.folder,
        destination=destination,
        layout=plan.layout,
        method=checkpoint.method,
        dtype=dtype,
        num_copied=len(matched.used),
        missing_keys=matched.missing,
        unused_keys=matched.unused,
        fresh_keys=matched.fresh,
        num_fresh_parameters=num_fresh,
        num_bytes=writer.total_bytes,
        has_processor=checkpoint.tokenizer is not None,
        notes=notes + [f"{name} was left out: {reason}." for name, reason in plan.ignored.items()],
    )


def _copy_shard(
    reader: CheckpointReader, writer: ShardWriter, used: Mapping[str, Renamed], dtype: torch.dtype
) -> None:
    """Write what comes from one shard; when this returns, nothing leans on its mapped file any more."""
    for name, tensor in streamed(reader, used, dtype):
        writer.add(name, tensor)
    writer.flush()


def _write_config(plan: Plan, skeleton: PreTrainedModel, dtype: torch.dtype, folder: Path, save_code: bool) -> None:
    config = plan.config
    config.architectures = [plan.model_class.__name__]
    config.dtype = dtype
    if save_code:
        config.auto_map = config.remote_code_map()
        custom_object_save(skeleton, folder)
    config.save_pretrained(folder)
