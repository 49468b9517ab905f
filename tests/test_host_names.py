"""What the package leans on in its hosts is there, and nothing private is used that `host_names.py` does not list."""

import ast
import importlib
import inspect
import re
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from factories import tiny_model
from host_names import HOST_NAMES, OWN_OR_IN_FILES
from transformers import AutoModel

from hf_vtc.models.host_tower_vtc import build_tower
from hf_vtc.models.window_vtc import release_of

ROOT = Path(__file__).resolve().parents[1]
RELEASE = release_of(transformers.__version__)

pytestmark = pytest.mark.window

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
DECODERS = ("llama", "qwen2", "qwen3", "mistral")


@lru_cache
def tower(model_type):
    return build_tower(transformers.CONFIG_MAPPING[model_type](**TINY, image_size=28, patch_size=14))


def tower_layer(model_type):
    return next(iter(next(module for module in tower(model_type).encoder.children())))


@lru_cache
def decoder(model_type):
    config = transformers.CONFIG_MAPPING[model_type](**TINY, num_key_value_heads=1, vocab_size=8, head_dim=8)
    return AutoModel.from_config(config)


# what a path of `host_names.py` begins at; a row of decoders holds for each of them
PLACES = {
    "decoder": [lambda name=name: decoder(name) for name in DECODERS],
    # whose masks come by type of layer
    "layered_decoder": [lambda name=name: decoder(name) for name in ("qwen2", "qwen3")],
    "tower": [
        lambda name=name: tower(name) for name in ("clip_vision_model", "siglip_vision_model", "internvl_vision")
    ],
    "clip_tower": [lambda: tower("clip_vision_model")],
    "siglip_tower": [lambda: tower("siglip_vision_model")],
    "internvl_tower": [lambda: tower("internvl_vision")],
    "clip_layer": [lambda: tower_layer("clip_vision_model")],
    "siglip_layer": [lambda: tower_layer("siglip_vision_model")],
    "internvl_layer": [lambda: tower_layer("internvl_vision")],
    "config": [lambda: tiny_model("vico").config.text_config],
    "hooked_module": [lambda: add_hook_to_module(torch.nn.Identity(), ModelHook())],
}


def checkpointed_encoder():
    model = tiny_model("convllava").train()
    model.gradient_checkpointing_enable()
    return next(module for module in model.model.vision_tower.modules() if hasattr(module, "gradient_checkpointing"))


PLACES["encoder"] = [checkpointed_encoder]


def step(value, word):
    """One word of a path: an attribute, an index, or an attribute that is called without arguments."""
    if word.isdigit():
        return value[int(word)]
    found = getattr(value, word.removesuffix("()"))
    return found() if word.endswith("()") else found


def is_there(name):
    place, path = name.split(":")
    path, parameter = re.fullmatch(r"(.+?)(?:\((\w+)\))?", path).groups()
    starts = PLACES[place] if place in PLACES else [lambda: importlib.import_module(place)]
    for start in starts:
        value = start()
        try:
            for word in path.split("."):
                value = step(value, word)
        except (AttributeError, IndexError, KeyError):
            return False
        if parameter:
            parameters = inspect.signature(value).parameters
            if parameter not in parameters:
                return False
    return True


@pytest.mark.parametrize("row", HOST_NAMES, ids=lambda row: row.name)
def test_the_host_has_what_is_leant_on(row):
    if row.until is not None and row.until < RELEASE or row.since is not None and row.since > RELEASE:
        # the code asks for it in other releases only; that it knows which is what this pins
        return
    assert is_there(row.name), (
        f"{row.name} is gone, on which {' and '.join(row.files)} leans. It was seen on {row.seen}; this is "
        f"transformers {transformers.__version__}. Adapt these files before anything is computed with them."
    )


def test_a_missing_name_is_noticed():
    assert not is_there("transformers:ProcessorMixin._merge_kwargs_renamed")
    assert not is_there("transformers:Trainer.save_model(_internal)")
    assert not is_there("decoder:layers.0.self_attn.q_project")


def private_words():
    """Private names in the package that none of its own statements defines, with the files that hold them."""
    used, defined = defaultdict(set), set()
    for file in sorted((ROOT / "hf_vtc").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            words = []
            if isinstance(node, ast.Attribute):
                is_stored = isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
                (defined.add if is_stored else words.append)(node.attr)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                words += [alias.name for alias in node.names]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                words.append(node.value)
            for word in words:
                if re.match(r"_[a-z]", word, re.IGNORECASE):
                    used[word].add(file.relative_to(ROOT).as_posix())
    return {word: files for word, files in used.items() if word not in defined}


def test_private_names_of_hosts_are_listed_with_their_files():
    allowed = defaultdict(set)
    for row in HOST_NAMES:
        for word in re.findall(r"\b_\w+", row.name):
            allowed[word] |= set(row.files)
    ours = {"_DecoderRun", "_hf_vtc_ops", "_lib", "_proj"}
    found = {
        word: files for word, files in private_words().items() if word not in OWN_OR_IN_FILES | dict.fromkeys(ours)
    }
    strays = {word: sorted(files - allowed[word]) for word, files in found.items() if files - allowed[word]}
    assert not strays, f"Private names of a host, in files that `tests/host_names.py` does not list for them: {strays}"


def test_every_row_is_used_where_it_says():
    for row in HOST_NAMES:
        word = re.findall(r"\w+", row.name)[-1]
        for file in row.files:
            # an index of a list is no word
            assert word.isdigit() or word in (ROOT / file).read_text(encoding="utf-8"), f"{word} is not in {file}."
