"""What `run.py` computes inside of one environment: answers of the shipped checkpoints, for a batch of two pages.

    python tests/window/check.py record FILE MODELS       write ids and logits
    python tests/window/check.py compare FILE MODELS      compare with them, and print the largest difference as JSON
    python tests/window/check.py remote FILE MODELS       the same by the code beside the weights, without hf_vtc
    python tests/window/check.py export MODELS FOLDER     write every checkpoint with its code

MODELS holds a folder per checkpoint.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

PAGES = Path(__file__).resolve().parents[2] / "examples" / "images"
# prompts of two lengths, so that the batch is padded
QUESTIONS = {"form_1.png": "What number is in the red box?", "form_2.png": "Where is the orange box?"}
BUDGETS = ("auto", "full", 0.5)
MAX_NEW_TOKENS = 8


def checkpoints(models: Path) -> list[Path]:
    """Folders of the methods that read the example pages; their uncompressed base is none of them."""
    configs = sorted(models.glob("*-tiny/config.json"))
    types = {config.parent: json.loads(config.read_text(encoding="utf-8"))["model_type"] for config in configs}
    return [folder for folder, model_type in types.items() if model_type.startswith("vtc_")]


def answers(folder: Path, remote: bool) -> dict[str, torch.Tensor]:
    """New ids and their logits for every budget; a refused budget is a tensor without elements."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=remote)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=remote, dtype=torch.float32).eval()
    package = "transformers_modules" if remote else "hf_vtc"
    assert type(model).__module__.split(".")[0] == type(processor).__module__.split(".")[0] == package

    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for question in QUESTIONS.values()
    ]
    images = [[Image.open(PAGES / name)] for name in QUESTIONS]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    results = {}
    for budget in BUDGETS:
        name = f"{folder.name} {budget}"
        try:
            output = model.generate(
                **inputs,
                vtc_budget=budget,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        except ValueError as error:
            assert "`vtc_budget`" in str(error), error
            results[f"{name} refused"] = torch.zeros(0)
            continue
        results[f"{name} ids"] = output.sequences[:, inputs["input_ids"].shape[1] :].contiguous()
        results[f"{name} logits"] = torch.stack(output.logits, dim=1)
    return results


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, list[str]]:
    """Largest difference of logits, and the names of all ids and refusals that are not the expected ones."""
    wrong = sorted(found.keys() ^ expected.keys())
    largest = 0.0
    for name in found.keys() & expected.keys():
        if found[name].shape != expected[name].shape:
            wrong.append(name)
        elif name.endswith(" ids") and not torch.equal(found[name], expected[name]):
            wrong.append(name)
        elif name.endswith(" logits"):
            # a NaN is no small difference
            difference = (found[name] - expected[name]).abs().max().nan_to_num(nan=torch.inf).item()
            largest = max(largest, difference)
    return largest, wrong


def main() -> None:
    action, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    if action == "export":
        from hf_vtc import hub

        models, target = map(Path, arguments)
        for folder in checkpoints(models):
            hub.export(folder, target / folder.name, check=False)
        return
    file, models = map(Path, arguments)
    if action == "remote":
        sys.modules["hf_vtc"] = None
    else:
        import hf_vtc  # noqa: F401  registers the models
    found = {}
    for folder in checkpoints(models):
        found |= answers(folder, remote=action == "remote")
    if action == "record":
        save_file(found, file)
        return
    largest, wrong = differences(found, load_file(file))
    print(json.dumps({"checkpoints": len(checkpoints(models)), "largest": largest, "wrong": wrong}))


if __name__ == "__main__":
    main()
