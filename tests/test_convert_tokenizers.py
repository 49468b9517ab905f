"""Tokenizers of LLaVA-type checkpoints: sentencepiece, the placeholder, chat templates."""

import json
import struct

import pytest
import torch
from factories import tiny_tokenizer
from llava_checkpoints import (
    official_state,
    stock_model,
    write_official,
)
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from hf_vtc.convert import convert, load_official
from hf_vtc.convert.assets import load_tokenizer
from hf_vtc.models.chat_templates_vtc import chat_template_for


def write_sentencepiece(folder, words):
    """`tokenizer.model` of Llama's kind, byte by byte, so that no library is needed to make it; returns its size."""

    def number(value):
        low, rest = value & 127, value >> 7
        return bytes([low | 128]) + number(rest) if rest else bytes([low])

    def part(idx, content):
        return number(idx << 3 | 2) + number(len(content)) + content

    def setting(idx, value):
        return number(idx << 3) + number(value)

    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(word, -float(rank), 1) for rank, word in enumerate(words)]
    content = b"".join(
        part(1, part(1, word.encode()) + number(2 << 3 | 5) + struct.pack("<f", score) + setting(3, kind))
        for word, score, kind in pieces
    )
    # byte-pair encoding with bytes to fall back on; a space before the text, spaces kept
    content += part(2, setting(3, 2) + setting(4, len(pieces)) + setting(35, 1))
    content += part(3, part(1, b"identity") + setting(3, 1) + setting(4, 0) + setting(5, 1))
    (folder / "tokenizer.model").write_bytes(content)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(pieces)


SENTENCEPIECE_WORDS = ["\u2581", *"abehlnot", "\u2581t", "he", "\u2581the"]
needs_sentencepiece = pytest.mark.skipif(
    not (is_sentencepiece_available() and is_protobuf_available()),
    reason="a tokenizer.model is read by sentencepiece and protobuf, which hf_vtc does not need otherwise",
)


@pytest.mark.window
@needs_sentencepiece
def test_a_sentencepiece_tokenizer_is_converted(tmp_path):
    base = stock_model()
    folder = write_official(tmp_path / "llava", base, vocab_size=len(SENTENCEPIECE_WORDS) + 259)
    base.resize_token_embeddings(write_sentencepiece(folder, SENTENCEPIECE_WORDS))
    save_file(official_state(base), folder / "model.safetensors", metadata={"format": "pt"})
    convert(folder, tmp_path / "dst", "llavolta")
    # 4.57 copies it; nobody needs it any more
    (tmp_path / "dst" / "tokenizer.model").unlink(missing_ok=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "dst")
    tokenizer, model = processor.tokenizer, AutoModelForImageTextToText.from_pretrained(tmp_path / "dst")
    assert processor.image_token_id == model.config.image_token_id == len(SENTENCEPIECE_WORDS) + 259
    ids = tokenizer("the hello<image>")["input_ids"]
    pieces = ["<s>", "\u2581the", "\u2581", "he", "l", "l", "o", "<image>"]
    assert tokenizer.convert_ids_to_tokens(ids) == pieces
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the hello"


@pytest.mark.window
@pytest.mark.parametrize("absent", (["sentencepiece"], ["protobuf"], ["sentencepiece", "protobuf"]), ids=" ".join)
def test_a_sentencepiece_tokenizer_that_cannot_be_read_names_the_remedy(tmp_path, monkeypatch, absent):
    folder = write_official(tmp_path / "llava", stock_model())
    write_sentencepiece(folder, SENTENCEPIECE_WORDS)
    for name in ("sentencepiece", "protobuf"):
        monkeypatch.setattr(f"hf_vtc.convert.assets.is_{name}_available", lambda name=name: name not in absent)
    with pytest.raises(ImportError, match=f"`pip install {' '.join(absent)}`.*image_token_id"):
        convert(folder, tmp_path / "dst", "llavolta")
    # with the other file nothing more is needed
    tiny_tokenizer().save_pretrained(folder)
    assert load_tokenizer(folder) is not None


@pytest.mark.window
def test_the_tokenizer_of_an_official_folder_gets_the_placeholder(tmp_path):
    tokenizer = tiny_tokenizer()
    base = stock_model()
    base.resize_token_embeddings(len(tokenizer))
    folder = write_official(tmp_path / "llava", base, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    report = convert(folder, tmp_path / "dst", "llavolta", compress_layer_idx=1, compress_stride=4)
    assert report.has_processor and any("chat template" in note for note in report.notes)
    processor = AutoProcessor.from_pretrained(tmp_path / "dst")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "dst")
    assert processor.image_token_id == model.config.image_token_id == len(tokenizer)
    assert processor.image_processor.image_mean == [0.1, 0.2, 0.3]
    from PIL import Image

    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": Image.new("RGB", (50, 30))}, {"type": "text", "text": "hi"}],
        }
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 16
    with torch.no_grad():
        assert model(**inputs).num_visual_tokens.tolist() == [4]
    with pytest.raises(ValueError, match="not clear"):
        load_official(folder, "llavolta", image_token_id=5)


def rendered(decoder_type, messages, **options):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template_for(decoder_type, "<image>")
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": "This."},
    {"role": "user", "content": "And?"},
]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def test_vicuna_template():
    text = rendered("llama", CHAT, add_generation_prompt=True)
    assert text == f"{SYSTEM} USER: <image>\nWhat? ASSISTANT: This.<|im_end|>USER: And? ASSISTANT:"
    own = rendered("llama", [{"role": "system", "content": "Be brief."}, *CHAT[:1]], add_generation_prompt=True)
    assert own == "Be brief. USER: <image>\nWhat? ASSISTANT:"


def test_mistral_template():
    text = rendered("mistral", CHAT, add_generation_prompt=True)
    assert text == "[INST] <image>\nWhat? [/INST] This.<|im_end|>[INST] And? [/INST]"


def test_other_decoders_get_chatml():
    assert rendered("qwen2", CHAT[:1]) == "<|im_start|>user\n<image>\nWhat?<|im_end|>\n"


def test_templates_mark_what_is_trained():
    tokenizer = tiny_tokenizer()
    for decoder_type in ("llama", "mistral"):
        tokenizer.chat_template = chat_template_for(decoder_type, "<image>")
        encoded = tokenizer.apply_chat_template(
            CHAT[:2], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        marked = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"]) if mask]
        assert tokenizer.decode(marked) == " This.<|im_end|>"
