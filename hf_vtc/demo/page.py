"""The page: controls, and what they do. The model answers one question at a time; others wait in a queue."""

import base64
import html
import io
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# gradio reads it when it is imported
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

try:
    import gradio as gr
except ImportError:
    raise ImportError("The demo page needs gradio: pip install 'hf_vtc[demo]'.") from None
from PIL import Image
from transformers import PreTrainedModel

from ..models.image_processing_vtc import VtcImageProcessor
from .prompts import Prompt

__all__ = ["build_page", "launch"]

# questions that may wait; whoever comes later is told to try again
_MOST_WAITING = 256
_LONGEST_QUESTION = 2000
# parameters below which a first token costs about the same however many tokens there are
_SMALL_MODEL = 50e6
# seconds between looks for uploads to remove, and their age then
_CACHE_SECONDS = (600, 3600)
_WORDS_OF_BUDGETS = (
    "**Visual tokens** are what the language model sees of a picture. On the left it sees all, on the right as "
    "many as the budget allows. The time is that to the first token of the answer, without loading and tiling of the "
    "picture: the median of three tries where one takes less than a second."
)


def build_page(
    model: PreTrainedModel,
    processor: Any,
    examples: Sequence[Mapping[str, str]] = (),
    note: str = "",
    max_new_tokens: int = 32,
) -> "gr.Blocks":
    """A page that asks a model.

    Args:
        model: of hf_vtc, in eval mode.
        processor: its processor.
        examples (`Sequence[Mapping]`): with "image", a path, and "question"; the page starts with the first one.
        note (`str`): what users should know of this model, in Markdown.
        max_new_tokens (`int`): longest answer, in tokens.
    """
    name = Path(model.config.name_or_path).name
    size = f"{model.num_parameters() / 1e6:,.1f} M parameters, on {model.device}"
    if model.num_parameters() < _SMALL_MODEL:
        note = f"{note}\n\nSo small a model spends its time on fixed costs: tokens show the gain here, times do not."
    first = examples[0] if examples else {"image": None, "question": "What is in this picture?"}
    with gr.Blocks(title=f"{name}, full and compressed", analytics_enabled=False, delete_cache=_CACHE_SECONDS) as page:
        gr.Markdown(f"# {name}: the same question with fewer visual tokens\n{size}. {note}")
        with gr.Row():
            with gr.Column():
                picture = gr.Image(first["image"], type="filepath", label="Picture", sources=["upload"], height=320)
                # as it came: what gradio decodes, it refuses in words that are no sentence
                picture.preprocess = lambda upload: upload and upload.path
            with gr.Column():
                question = gr.Textbox(first["question"], label="Question", lines=2, max_length=_LONGEST_QUESTION)
                share = gr.Slider(1, 100, 50, step=1, label="Budget: percent of the visual tokens")
                # the number beside it can be emptied, which gradio refuses in words of its own
                share.preprocess = lambda percent: percent
                auto = gr.Checkbox(False, label="Let the method decide instead (auto)")
                ask = gr.Button("Ask", variant="primary")
        with gr.Row():
            full = _side("Every visual token")
            kept = _side("Compressed")
        if examples:
            rows = [[each["image"], each["question"]] for each in examples]
            labels = [f"{Path(image).name}: {text}" for image, text in rows]
            gr.Examples(rows, [picture, question], label="Pages to ask about", example_labels=labels)
        gr.Markdown(_WORDS_OF_BUDGETS)

        def answer(path: str | None, text: str, percent: float | None, decides: bool) -> list[Any]:
            if not decides and not _is_percent(percent):
                raise gr.Error("Choose a budget from 1 to 100 percent.", title="No budget", print_exception=False)
            return _answer(model, processor, path, text, "auto" if decides else percent / 100, max_new_tokens)

        _listen(answer, [picture, question, share, auto], [*full, *kept], ask)
    return page.queue(max_size=_MOST_WAITING, default_concurrency_limit=1)


def launch(
    page: "gr.Blocks",
    host: str = "127.0.0.1",
    port: int = 7860,
    max_upload_mb: int = 20,
    block: bool = True,
) -> str:
    """Serve a page; without tunnel, and on this machine alone unless `host` says otherwise.

    Args:
        host (`str`): `"127.0.0.1"`: only programs of this machine reach it; `"0.0.0.0"`: everyone who reaches this
            machine.
        port (`int`): from 0 to 65535; 0: one that is free.
        max_upload_mb (`int`): largest file of a picture, in MB.
        block (`bool`): return when the page has ended, and not when it has started.

    Returns:
        Its address.

    Raises:
        OSError: the port is taken.
    """
    _, address, _ = page.launch(
        server_name=host,
        server_port=port or _free_port(host),
        max_file_size=f"{max_upload_mb}mb",
        theme=_theme(),
        css=_CSS,
        share=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        footer_links=[],
        show_error=True,
        quiet=True,
        prevent_thread_lock=True,
    )
    if block:
        page.block_thread()
    return address


# fonts of this machine: gradio's own themes ask a server for theirs
def _theme() -> Any:
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


# what is too wide for a telephone is broken there, and not cut off
_CSS = "footer {display: none !important} .prose, textarea {overflow-wrap: anywhere}"


def _side(title: str) -> tuple[Any, ...]:
    """One of two columns: answer, facts, picture."""
    with gr.Column():
        gr.Markdown(f"## {title}")
        return (
            gr.Textbox(label=f"{title}: answer", lines=2, interactive=False),
            gr.Textbox(label=f"{title}: tokens and time", lines=1, interactive=False),
            gr.HTML(label=f"{title}: what the language model sees"),
        )


def _listen(answer: Callable[..., list[Any]], inputs: list[Any], outputs: list[Any], ask: Any) -> None:
    """Ask when the button says so, and again when the budget moves."""
    _, question, share, auto = inputs
    # one question at a time, whatever asks it
    common = {"concurrency_id": "model", "concurrency_limit": 1}
    gr.on([ask.click, question.submit], answer, inputs, outputs, api_name="ask", **common)

    def answer_again(path: str | None, text: str, percent: float | None, decides: bool, before: str) -> list[Any]:
        # a budget that moves before anything was asked, or where nothing can be asked, says nothing
        if not before or not path or not (text or "").strip() or not (decides or _is_percent(percent)):
            return [gr.skip() for _ in outputs]
        return answer(path, text, percent, decides)

    # of moves that follow each other fast, the last one counts
    again = {"trigger_mode": "always_last", "show_progress": "minimal", "api_visibility": "private", **common}
    for event in (share.change, auto.change):
        event(answer_again, [*inputs, outputs[0]], outputs, **again)
    auto.change(lambda decides: gr.update(interactive=not decides), auto, share, api_visibility="private")


def _is_percent(value: Any) -> bool:
    return isinstance(value, (int, float)) and 1 <= value <= 100


def _answer(
    model: PreTrainedModel, processor: Any, path: str | None, text: str, budget: Any, max_new_tokens: int
) -> list[Any]:
    """Answer, facts and picture, without and with compression."""
    if not path:
        raise gr.Error("Choose a picture first.", title="No picture", print_exception=False)
    if not (text or "").strip():
        raise gr.Error("Write a question first.", title="No question", print_exception=False)
    try:
        prompt = Prompt(model, processor, _decoded(path), text.strip())
        sides = []
        for each in ("full", budget):
            run = prompt.answer(each, max_new_tokens)
            facts = f"{run['num_kept']} of {run['num_reserved']} visual tokens, {run['ttft_ms']:.0f} ms"
            if each != "full":
                facts += f", {run['compression_ratio']:.2f} x fewer"
            sides += [run["answer"], facts, _figure(prompt.overlay(each), f"What the language model sees: {facts}")]
        return sides
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        raise gr.Error(
            str(error) or type(error).__name__, title="This cannot be asked", print_exception=False
        ) from error


def _figure(picture: Image.Image, text: str) -> str:
    """A picture as HTML, with words for those who do not see it; gradio's own has none."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    source = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{source}" alt="{html.escape(text)}" style="width: 100%; height: auto">'


def _decoded(path: str) -> Image.Image:
    """An upload as a picture.

    Raises:
        ValueError: it is none, or far too large.
    """
    try:
        return VtcImageProcessor().fetch_images(path)
    # a bomb is no error of input, and decoders report damage by exceptions of every kind
    except Exception as error:
        # the place where it lies on this machine is nobody's business
        said = str(error).replace(path, "the upload")
        raise ValueError(f"This picture cannot be read: {said} Give a PNG or JPEG.") from error


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
