"""What a model folder holds beside the weights: tokenizer, processor and generation settings."""

from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from ..files import read_json, read_text
from ..models.image_processing_vtc import VtcImageProcessor
from ..models.processing_vtc import VtcProcessor
from .plan import Plan

# ends a turn in the chat format of every InternVL3 model
TURN_END = "<|im_end|>"

# the name of transformers 5 for the class before it, which 5 still knows
_GENERIC_CLASSES = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint folder, None if the folder has none.

    Raises:
        ValueError: its files cannot be read.
        ImportError: there is a sentencepiece model alone, and nothing to read it with.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        _require_sentencepiece(folder)
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    try:
        if settings.get("tokenizer_class") not in _GENERIC_CLASSES:
            # of a config.json that it does not know, 5.0 takes a class without rules for the one named
            return AutoTokenizer.from_pretrained(folder, config=PretrainedConfig(), trust_remote_code=False)
        # without a class name transformers would ask config.json, whose `model_type` it does not know
        spelling = {}
        if isinstance(settings.get("extra_special_tokens"), list):
            # written by transformers 5, for versions before it
            spelling["additional_special_tokens"] = settings["extra_special_tokens"]
            spelling["extra_special_tokens"] = {}
        return PreTrainedTokenizerFast.from_pretrained(folder, **spelling)
    except Exception as error:
        raise ValueError(
            f"The tokenizer of {folder} cannot be loaded ({type(error).__name__}: {error}). Repair its files, or move "
            "them away and give `image_token_id` to convert the model alone."
        ) from error


def _require_sentencepiece(folder: Path) -> None:
    installed = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
    absent = [name for name, found in installed.items() if not found]
    if absent:
        raise ImportError(
            f"The tokenizer of {folder} is a sentencepiece model (`tokenizer.model`) without `tokenizer.json`. To "
            f"convert it, once, {' and '.join(absent)} must be installed: `pip install {' '.join(absent)}`. Or move "
            "the tokenizer's files away and give `image_token_id` to convert the model alone."
        )


def find_image_token_id(
    tokenizer: PreTrainedTokenizerBase | None,
    token: str,
    stored: int | None,
    given: int | None,
    vocab_size: int | None,
    folder: Path,
) -> int:
    """Id of the placeholder: what the caller, the tokenizer and `config.json` say, which must agree.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, *optional*): of the checkpoint; gets the token if it may be added.
        token (`str`): the placeholder of the layout.
        stored (`int`, *optional*): what `config.json` says.
        given (`int`, *optional*): what the caller says.
        vocab_size (`int`, *optional*): rows of the embeddings of a layout whose vocabulary has no placeholder: the
            next free id is taken where nobody says one, which is no row of them. None: it has the placeholder.
        folder (`Path`): of the checkpoint, for messages.

    Raises:
        ValueError: nobody knows it, they disagree, or it lies beyond the next free id.
    """
    known = {"`image_token_id`": given, "config.json": stored}
    if tokenizer is not None:
        known[f"the tokenizer's {token}"] = tokenizer.get_vocab().get(token)
        if vocab_size is not None and token not in tokenizer.get_vocab():
            known["the tokenizer's next free id"] = len(tokenizer)
    known = {who: token_id for who, token_id in known.items() if token_id is not None}
    for who, token_id in known.items():
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise ValueError(f"The id of the image placeholder must be an integer, {who} says {token_id!r}.")
    if not known and vocab_size is not None:
        return vocab_size
    if not known:
        what = f"its tokenizer has no {token} token" if tokenizer is not None else "there is no tokenizer"
        raise ValueError(
            f"The id of the image placeholder is unknown: {folder} does not say it and {what}. Copy the tokenizer of "
            "the official repository into the folder, or give `image_token_id`."
        )
    if len(set(known.values())) > 1:
        said = ", ".join(f"{who} says {token_id}" for who, token_id in known.items())
        raise ValueError(f"The id of the image placeholder is not clear: {said}. Give or keep the right one only.")
    token_id = next(iter(known.values()))
    free = token_id if vocab_size is None else max(vocab_size, 0 if tokenizer is None else len(tokenizer))
    if not 0 <= token_id <= free:
        raise ValueError(
            f"`image_token_id` must be an id of the vocabulary or the next free one, {free}, got {token_id}."
        )
    if tokenizer is not None and token not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    return token_id


def image_processor_settings(folder: Path) -> dict[str, Any]:
    """Settings of the image processor in a folder of any transformers version, empty if there is none."""
    nested, plain = folder / "processor_config.json", folder / "preprocessor_config.json"
    settings = read_json(nested).get("image_processor") if nested.is_file() else None
    if settings is None and plain.is_file():
        settings = read_json(plain)
    return settings or {}


def video_processor_settings(folder: Path) -> dict[str, Any]:
    """Settings of the video processor in a folder of any transformers version, empty if there is none.

    Where videos have no file of their own, those of images are theirs, as in transformers.
    """
    nested, plain = folder / "processor_config.json", folder / "video_preprocessor_config.json"
    settings = read_json(nested).get("video_processor") if nested.is_file() else None
    if settings is None and plain.is_file():
        settings = read_json(plain)
    return settings or image_processor_settings(folder)


def chat_template_of(folder: Path) -> str | None:
    """The chat template in a folder of any transformers version, None if there is none."""
    plain, nested = folder / "chat_template.jinja", folder / "chat_template.json"
    if plain.is_file():
        return read_text(plain)
    return read_json(nested).get("chat_template") if nested.is_file() else None


def build_processor(tokenizer: PreTrainedTokenizerBase, plan: Plan) -> VtcProcessor:
    """The processor that fits a planned model."""
    settings = plan.processor
    fields = {"image_seq_length": plan.config.image_seq_length, **settings.fields}
    video = fields.get("video")
    if video is not None:
        known = tokenizer.get_vocab()
        if video["token"] not in known:
            # no prompt can show a video; the processor says so of each
            fields["video"] = None
        elif known[video["token"]] != plan.config.video_token_id:
            raise ValueError(
                f"The id of the placeholder of videos is not clear: config.json says {plan.config.video_token_id}, "
                f"the tokenizer's {video['token']} says {known[video['token']]}. Keep the right one only."
            )
    return VtcProcessor(VtcImageProcessor(**settings.images), tokenizer, **fields)


def generation_settings(
    folder: Path | None, text_config: Any, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """Content of `generation_config.json`: that of the source, and tokens that end a turn and pad.

    Args:
        folder (`Path`, *optional*): of the source.
        text_config (`PretrainedConfig`): of the decoder.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): of the source.
    """
    file = folder / "generation_config.json" if folder is not None else None
    settings = read_json(file) if file is not None and file.is_file() else {}
    for name in ("_from_model_config", "transformers_version"):
        settings.pop(name, None)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if settings.get(name) is None:
            settings[name] = getattr(text_config, name, None)
    if tokenizer is not None:
        ends = settings["eos_token_id"]
        ends = [] if ends is None else list(ends) if isinstance(ends, list) else [ends]
        turn_end = tokenizer.get_vocab().get(TURN_END, tokenizer.eos_token_id)
        if turn_end is not None and turn_end not in ends:
            ends = [turn_end, *ends]
        settings["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
        if settings["pad_token_id"] is None:
            settings["pad_token_id"] = tokenizer.pad_token_id
    return {name: value for name, value in settings.items() if value is not None}
