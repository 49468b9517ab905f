"""`hf-vtc demo`: a page in the browser that asks a model, full and compressed."""

from typing import Annotated

import typer

from .options import DebugOption, DeviceOption, DtypeOption, ModelOption, check_dtype, status
from .package import NOTE_ON_TINY_MODELS, SHIPPED_PAGES, checkpoint_path, is_shipped, pages_of

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def demo(
    model: ModelOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets others in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")] = 7860,
    max_upload: Annotated[int, typer.Option(min=1, metavar="MB", help="Largest picture that may be uploaded.")] = 20,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    debug: DebugOption = False,
) -> None:
    """Open a local page: picture, question, budget; full and compressed side by side, and what was kept.

    Only this machine reaches it unless --host says otherwise. Needs: pip install 'hf_vtc[demo]'.
    """
    check_dtype(dtype)
    path = checkpoint_path(model)
    with status("Loading gradio ..."):
        from hf_vtc.demo import build_page, launch

    from .answers import find_device, load

    find_device(device)
    with status(f"Loading {path} ..."):
        loaded = load(path, device, dtype)
    page = build_page(*loaded, examples_of(path), note_on(path), max_new_tokens)
    address = launch(page, host, port, max_upload, block=False)
    who = "Only this machine reaches it" if host in _LOOPBACK else "EVERYONE WHO REACHES THIS MACHINE CAN USE IT"
    typer.echo(f"{address} ({who}; Ctrl-C ends it)")
    page.block_thread()


def examples_of(path: str) -> list[dict[str, str]]:
    """Pages and a question about each, for a model that comes with hf_vtc; others may read no forms."""
    if not (is_shipped(path) and SHIPPED_PAGES.is_file()):
        return []
    return [{"image": page["image"], "question": page["questions"][-1]["question"]} for page in pages_of(None, None)]


def note_on(path: str) -> str:
    """What users should know of a model, empty for one of their own."""
    return NOTE_ON_TINY_MODELS if is_shipped(path) else ""
