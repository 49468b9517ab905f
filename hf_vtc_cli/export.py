"""`hf-vtc export` and `hf-vtc push`: folders that carry their code."""

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    BaseModelOption,
    CheckOption,
    DebugOption,
    LicenseOption,
    MaxShardSizeOption,
    OverwriteOption,
    status,
)
from .package import checkpoint_path


def export(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Model of hf_vtc: a folder, or an id of the Hub.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    check: CheckOption = True,
    base_model: BaseModelOption = None,
    license: LicenseOption = None,
    max_shard_size: MaxShardSizeOption = "5GB",
    overwrite: OverwriteOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a self-contained folder: weights, processor, card, and the code that they need."""
    path = checkpoint_path(src)

    from hf_vtc.hub import export as export_folder

    from .answers import config_of

    # before anything is loaded or written
    config_of(path)
    with status(f"Exporting {src} ..."):
        folder = export_folder(
            path,
            dst,
            check=check,
            base_model=base_model,
            license=license,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )
    proof = "proven in a process without hf_vtc" if check else "not checked"
    typer.echo(f"{folder} ({proof})")


def push(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Model of hf_vtc: a folder, or an id of the Hub.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="Repository on the Hub: name or owner/name.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Visibility of a new repository; of an old one it stays.")
    ] = None,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Branch, made if it does not exist.")] = None,
    message: Annotated[str, typer.Option(help="First line of the commit.")] = "Upload model, processor and code",
    check: CheckOption = True,
    base_model: BaseModelOption = None,
    license: LicenseOption = None,
    max_shard_size: MaxShardSizeOption = "5GB",
    debug: DebugOption = False,
) -> None:
    """Export and upload as one commit; prints the address of that commit. Needs `hf auth login` or HF_TOKEN."""
    path = checkpoint_path(src)

    from hf_vtc.hub import push as push_folder

    from .answers import config_of

    # before anything is loaded or written
    config_of(path)
    with status(f"Pushing {src} to {repo_id} ..."):
        address = push_folder(
            path,
            repo_id,
            private=private,
            revision=revision,
            commit_message=message,
            check=check,
            base_model=base_model,
            license=license,
            max_shard_size=max_shard_size,
        )
    typer.echo(address)
