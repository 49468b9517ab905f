"""Checkpoint folders as nobody should publish them: 200 and more, each damaged in one way drawn from a fixed seed.

`hostile_folders(seed, number)` yields recipes; `Hostile.write(folder, sound)` copies a sound folder and damages the
copy. What may be damaged is every file that a conversion or an export reads: settings, index, weights, tokenizer,
templates, card, and the entries of the folder themselves.
"""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SEED = 20261127
NUMBER = 240
# stands in a file outside of the folder, and nowhere else
SECRET = "nobody-may-read-this"

# in place of any value of a JSON file; the text becomes JSON as it stands
VALUES = (
    *("null", "true", "-1", "0", "1", "3", "-0.5", "NaN", "Infinity", "1e308", "1e-320", "1000000000000"),
    *('""', '"a"', '"\\u0000"', '"../../outside"', '"/etc/passwd"', "[]", "{}", "[[[[]]]]", "[null]", '{"": null}'),
    *("9" * 5000, "[" * 100_000, '"' + "x" * 1_000_000 + '"', '"\\ud800"', '["a", 1, null, {}]', '"__class__"'),
)
NAMES = ("../outside.safetensors", "/etc/passwd", "", ".", "..", "a/b.safetensors", "C:x", "a\\b", "a\0b", "x" * 300)
OUTSIDE = ("../../outside", "/dev/zero", "/dev/tty", "/proc/self/mem", "/etc/passwd", "..", ".")


@dataclass(frozen=True)
class Hostile:
    """One damage: a name for messages, and what does it."""

    name: str
    damage: Callable[[Path], None]

    def write(self, folder: Path, sound: Path) -> Path:
        shutil.copytree(sound, folder)
        self.damage(folder)
        return folder


def hostile_folders(seed: int = SEED, number: int = NUMBER) -> Iterator[Hostile]:
    """The kinds in turn, each time with other choices."""
    kinds = (_settings, _settings, _settings, _json_text, _weights, _index, _entry, _pickle, _card)
    for idx in range(number):
        draw = random.Random(f"{seed} {idx}")
        kind = kinds[idx % len(kinds)]
        # the damage draws again from the same place, so that it is the same wherever it is done
        yield Hostile(f"{idx}{kind.__name__}", _bound(kind, draw.getrandbits(64)))


def _bound(kind: Callable[[Path, random.Random], None], seed: int) -> Callable[[Path], None]:
    return lambda folder: kind(folder, random.Random(seed))


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every place of a JSON value, as keys and indices."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from _places(part, (*path, key))


def _settings(folder: Path, draw: random.Random) -> None:
    """One value of one file of settings is another."""
    files = [file for file in sorted(folder.glob("*.json")) if "index" not in file.name]
    # most of what matters is in the first
    file = folder / "config.json" if draw.random() < 0.6 else draw.choice(files)
    content = json.loads(file.read_text())
    parts = draw.choice(sorted(_places(content), key=str))
    owner = content
    for part in parts[:-1]:
        owner = owner[part]
    if draw.random() < 0.15:
        del owner[parts[-1]]
        file.write_text(json.dumps(content))
        return
    owner[parts[-1]] = "hostile value"
    file.write_text(json.dumps(content).replace('"hostile value"', draw.choice(VALUES)))


def _json_text(folder: Path, draw: random.Random) -> None:
    """A file of JSON is none."""
    file = draw.choice(sorted(folder.glob("*.json")))
    text = file.read_bytes()
    file.write_bytes(
        draw.choice(
            (
                b" " * 20_000_000,
                b"{" + b"\n" * 20_000_000 + b"}",
                b'{"a":' * 100_000,
                b"[" * 1_000_000,
                b"",
                b"\xff\xfe{}",
                b"null",
                b"[]",
                text[: draw.randrange(1, len(text))],
                text + text,
                b'{"model_type": "internvl_chat"}',
                b'{"model_type": ["vtc_vico"], "architectures": 3}',
                draw.randbytes(100),
            )
        )
    )


def _weights(folder: Path, draw: random.Random) -> None:
    """A safetensors file whose header lies."""
    file = draw.choice(sorted(folder.glob("*.safetensors")))
    content = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), bytes(content[8 + length :])
    name = draw.choice([name for name in header if name != "__metadata__"])
    what = draw.randrange(12)
    if what == 0:
        file.write_bytes(struct.pack("<Q", draw.choice((0, 2**63, 2**40, length + 1, length - 1))) + content[8:])
        return
    if what == 1:
        file.write_bytes(content[: draw.randrange(len(content))])
        return
    if what == 2:
        for _ in range(20):
            content[draw.randrange(8 + length)] = draw.randrange(256)
        file.write_bytes(content)
        return
    if what == 3:
        for entry in header.values():
            entry.pop("shape", None)
    elif what == 4:
        header[name]["shape"] = draw.choice(([2**40, 2**40], [-1], [0], [], [1.5], ["a"], None, [1] * 1000))
    elif what == 5:
        header[name]["dtype"] = draw.choice(("F4", "I64", "BOOL", "X", None, 3, "F8_E4M3", "U16"))
    elif what == 6:
        header[name]["data_offsets"] = draw.choice(([0, 0], [0, 2**62], [-4, 0], [8, 4], [0], None))
    elif what == 7:
        header[draw.choice(("__class__", "a" * 100_000, "", "lm_head.weight\0"))] = header.pop(name)
    elif what == 8:
        del header[name]
    elif what == 9:
        header["__metadata__"] = draw.choice(({"format": "tf"}, {"format": 3}, [], "x"))
    elif what == 10:
        body = body + b"\0" * 1000
    else:
        header[name] = "not a tensor"
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


def _index(folder: Path, draw: random.Random) -> None:
    """An index that names other files, or something else."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = ["lm_head.weight"]
    weight_map: Any = dict.fromkeys(names, draw.choice((*NAMES, "config.json", "model-00001-of-00001.safetensors")))
    weight_map = draw.choice((weight_map, weight_map, weight_map, {}, [], "x", {"a": None}, {"a": ["b"]}, {"a": 3}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _entry(folder: Path, draw: random.Random) -> None:
    """An entry that is no file: a link out of the folder, a pipe, a folder."""
    names = [file.name for file in folder.iterdir() if file.is_file()] + [
        "README.md",
        "chat_template.jinja",
        "generation_config.json",
    ]
    file = folder / draw.choice(sorted(set(names)))
    file.unlink(missing_ok=True)
    what = draw.randrange(4)
    if what == 0:
        os.mkfifo(file)
    elif what == 1:
        file.mkdir()
    else:
        file.symlink_to(draw.choice(OUTSIDE))


class _Trap:
    """Leaves a file beside the folder when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def _pickle(folder: Path, draw: random.Random) -> None:
    """Weights as a pickle that runs code, or claims what it does not hold."""
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    content: Any = draw.choice(
        (
            {"lm_head.weight": _Trap(folder.parent / "sprung")},
            {"lm_head.weight": torch.zeros(1).expand(2**20, 2**20)},
            {"lm_head.weight": torch.zeros(2, 2).to_sparse()},
            {"lm_head.weight": torch.zeros(2, 2, device="meta")},
            {"lm_head.weight": torch.quantize_per_tensor(torch.zeros(2, 2), 1.0, 0, torch.qint8)},
            {3: torch.zeros(2)},
            {"a": {"b": torch.zeros(2)}},
            [torch.zeros(2)],
            "text",
        )
    )
    torch.save(content, file)
    if draw.random() < 0.3:
        raw = bytearray(file.read_bytes())
        for _ in range(30):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        file.write_bytes(raw)


def _card(folder: Path, draw: random.Random) -> None:
    """A card that is none, or whose metadata grow without end."""
    levels = "\n".join(f"x{idx}: &x{idx} [{', '.join([f'*x{idx - 1}'] * 9)}]" for idx in range(1, 12))
    metadata = draw.choice(
        (
            f"x0: &x0 [a]\n{levels}",
            "tags: &a [*a]",
            "tags: {a: b}",
            "tags: [1, null]",
            "license: [[[[",
            "- a\n- b",
            "!!python/object/apply:os.system ['touch sprung']",
            "base_model: 3",
            "model-index: 3",
        )
    )
    (folder / "README.md").write_text(draw.choice((f"---\n{metadata}\n---\n# A\n", "\0" * 1000, "", "---\n---\n")))
