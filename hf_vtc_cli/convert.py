"""`hf-vtc convert`: from published checkpoints to folders of this package."""

from pathlib import Path
from typing import Annotated

import typer

from .options import DebugOption, OverwriteOption, status


def convert(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Official checkpoint: a folder, or an id of the Hub.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    method: Annotated[str | None, typer.Option(help="Such as vico; needed only where several fit.")] = None,
    image_token_id: Annotated[int | None, typer.Option(help="Placeholder, where SRC has no tokenizer.")] = None,
    vision_tower: Annotated[
        str | None,
        typer.Option(metavar="PATH_OR_ID", help="Folder or Hub id of the tower, if SRC names one that is not here."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Such as bfloat16. Default: as stored.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, which bounds the memory too.")] = "2GB",
    code: Annotated[bool, typer.Option(help="Copy the code beside the weights, for trust_remote_code.")] = True,
    overwrite: OverwriteOption = False,
    debug: DebugOption = False,
) -> None:
    """Convert a published checkpoint to a folder that from_pretrained loads."""
    from hf_vtc.convert import convert as convert_folder

    with status(f"Converting {src} ..."):
        report = convert_folder(
            src,
            dst,
            method,
            image_token_id=image_token_id,
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            save_code=code,
            vision_tower=vision_tower,
        )
    typer.echo(report.summary())
