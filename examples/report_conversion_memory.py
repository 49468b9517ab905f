"""Report how much memory a conversion takes beyond an idle process, against the largest shard that it reads.

Writes a checkpoint in the layout of LLaVA-1.5 (LLaMA decoder of width 2048, CLIP ViT-L/14 at 336 pixels, bfloat16) to
a temporary folder, in shards, converts it in a process of its own, prints the report and removes everything:

    python examples/report_conversion_memory.py

Needs Linux, for its account of a process's memory, and twice the size of the checkpoint on the disk (`TMPDIR` says
where).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH, FFN, VOCAB = 2048, 5632, 32000
GOAL = 1.5
_POLL_SECONDS = 0.01


def decoder_tensors(num_layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a LLaMA decoder of `num_layers` layers."""
    yield "model.embed_tokens.weight", (VOCAB, WIDTH)
    for layer in range(num_layers):
        base = f"model.layers.{layer}"
        for part in "qkvo":
            yield f"{base}.self_attn.{part}_proj.weight", (WIDTH, WIDTH)
        yield f"{base}.mlp.gate_proj.weight", (FFN, WIDTH)
        yield f"{base}.mlp.up_proj.weight", (FFN, WIDTH)
        yield f"{base}.mlp.down_proj.weight", (WIDTH, FFN)
        yield f"{base}.input_layernorm.weight", (WIDTH,)
        yield f"{base}.post_attention_layernorm.weight", (WIDTH,)
    yield "model.norm.weight", (WIDTH,)
    yield "lm_head.weight", (VOCAB, WIDTH)


def vision_tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the projector and of CLIP ViT-L/14 at 336 pixels."""
    for layer, width in ((0, 1024), (2, WIDTH)):
        yield f"model.mm_projector.{layer}.weight", (WIDTH, width)
        yield f"model.mm_projector.{layer}.bias", (WIDTH,)
    base = "model.vision_tower.vision_tower.vision_model"
    yield f"{base}.embeddings.class_embedding", (1024,)
    yield f"{base}.embeddings.patch_embedding.weight", (1024, 3, 14, 14)
    yield f"{base}.embeddings.position_embedding.weight", (577, 1024)
    for layer in range(24):
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{base}.encoder.layers.{layer}.self_attn.{part}.weight", (1024, 1024)
            yield f"{base}.encoder.layers.{layer}.self_attn.{part}.bias", (1024,)
        for part, shape in (("fc1", (4096, 1024)), ("fc2", (1024, 4096))):
            yield f"{base}.encoder.layers.{layer}.mlp.{part}.weight", shape
            yield f"{base}.encoder.layers.{layer}.mlp.{part}.bias", shape[:1]
        for part in ("layer_norm1", "layer_norm2"):
            for leaf in ("weight", "bias"):
                yield f"{base}.encoder.layers.{layer}.{part}.{leaf}", (1024,)
    for part in ("pre_layrnorm", "post_layernorm"):
        for leaf in ("weight", "bias"):
            yield f"{base}.{part}.{leaf}", (1024,)


def num_layers_for(num_bytes: float) -> int:
    """Decoder layers of a checkpoint of about `num_bytes` in 16 bits."""

    def size_of(tensors: Iterator[tuple[str, tuple[int, ...]]]) -> int:
        return 2 * sum(torch.Size(shape).numel() for _, shape in tensors)

    fixed = size_of(decoder_tensors(0)) + size_of(vision_tensors())
    per_layer = size_of(decoder_tensors(1)) - size_of(decoder_tensors(0))
    # LLaVolta shortens the sequence before layer 2
    return max(2, round((num_bytes - fixed) / per_layer))


def write_checkpoint(folder: Path, num_bytes: float, shard_bytes: float) -> list[Path]:
    """Write the checkpoint and its index; returns the shards."""
    num_layers = num_layers_for(num_bytes)
    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "tie_word_embeddings": False,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 1024,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in (*decoder_tensors(num_layers), *vision_tensors()):
        size = 2 * torch.Size(shape).numel()
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += size
    files, weight_map = [], {}
    for index, names in enumerate(shards):
        file = folder / f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in names}, file)
        weight_map |= {name: file.name for name, _ in names}
        files.append(file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


def memory_of_process() -> dict[str, int]:
    """Bytes of this process by kind: `VmRSS` now, `VmHWM` at most, `RssAnon` without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if line.startswith(("VmRSS", "VmHWM", "RssAnon")))
    return {name: int(value.split()[0]) * 1024 for name, value in fields.items()}


def measure(source: str, destination: str, max_shard_size: str | None) -> dict[str, int]:
    """Convert in this process; bytes at most beyond those after the imports."""
    from hf_vtc.convert import convert

    options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    before = memory_of_process()
    # the kernel forgets the peak of the imports
    Path("/proc/self/clear_refs").write_text("5")
    anonymous, done = [before["RssAnon"]], threading.Event()

    def watch() -> None:
        while not done.wait(_POLL_SECONDS):
            anonymous.append(memory_of_process()["RssAnon"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        convert(source, destination, "llavolta", save_code=False, **options)
    finally:
        done.set()
        watcher.join()
    return {
        "baseline": before["VmRSS"],
        "extra": memory_of_process()["VmHWM"] - before["VmRSS"],
        "extra_anonymous": max(anonymous) - before["RssAnon"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=2.0, help="of the checkpoint, in 10^9 bytes")
    parser.add_argument("--shard-gb", type=float, default=0.5, help="largest shard of the checkpoint, in 10^9 bytes")
    parser.add_argument("--max-shard-size", help="of the result, such as 500MB. Default: that of `convert`")
    parser.add_argument("--measure", nargs=2, metavar=("SRC", "DST"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(*arguments.measure, arguments.max_shard_size)))
        return
    if not os.access("/proc/self/clear_refs", os.W_OK):
        parser.error("this report needs Linux: it reads and resets /proc/self.")
    with tempfile.TemporaryDirectory(prefix="vtc_memory_") as scratch:
        source, destination = Path(scratch) / "source", Path(scratch) / "converted"
        source.mkdir()
        sizes = [
            file.stat().st_size for file in write_checkpoint(source, arguments.size_gb * 1e9, arguments.shard_gb * 1e9)
        ]
        command = [sys.executable, __file__, "--measure", str(source), str(destination)]
        if arguments.max_shard_size:
            command += ["--max-shard-size", arguments.max_shard_size]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            sys.exit(result.stderr)
        measured = json.loads(result.stdout.splitlines()[-1])
        written = [file.stat().st_size for file in destination.glob("*.safetensors")]
    ratio = measured["extra"] / max(sizes)
    print(f"read: {sum(sizes) / 1e9:.2f} GB in {len(sizes)} shards, the largest {max(sizes) / 1e9:.3f} GB")
    print(f"written: {sum(written) / 1e9:.2f} GB in {len(written)} shards, the largest {max(written) / 1e9:.3f} GB")
    print(f"idle after the imports: {measured['baseline'] / 1e9:.3f} GB")
    print(
        f"beyond that at most: {measured['extra'] / 1e9:.3f} GB, {measured['extra_anonymous'] / 1e9:.3f} GB of it not "
        "mapped from files"
    )
    print(f"{ratio:.2f} times the largest shard (goal: below {GOAL})")
    sys.exit(ratio >= GOAL)


if __name__ == "__main__":
    main()
