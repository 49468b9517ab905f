"""Answers of vLLM to requests from a file, in a process of its own: one engine per process.

Usage: engine_worker.py REQUESTS, a JSON file of `engine` (arguments of `LLM`), `max_tokens`, and `calls`, lists of
requests that are sent together: `prompt`, `images` (files), `arguments` (of the multimodal processor), `adapter` (a
folder or nothing). Prints a line of JSON: for each call, ids of the prompt and of the answer of each request, or the
text of the error.
"""

import json
import sys

from PIL import Image
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def request_of(given: dict) -> dict:
    request = {"prompt": given["prompt"]}
    if given["images"]:
        request["multi_modal_data"] = {"image": [Image.open(file).convert("RGB") for file in given["images"]]}
        request["mm_processor_kwargs"] = given["arguments"]
    return request


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        asked = json.load(file)
    engine = LLM(dtype="float32", enforce_eager=True, max_model_len=2048, **asked["engine"])
    sampling = SamplingParams(temperature=0, max_tokens=asked["max_tokens"])
    found = []
    for call in asked["calls"]:
        folders = [given.get("adapter") for given in call]
        # the same adapter has the same number in every call
        adapters = [None if folder is None else LoRARequest(folder, 1, folder) for folder in folders]
        try:
            outputs = engine.generate(
                [request_of(given) for given in call],
                sampling,
                lora_request=adapters if any(adapters) else None,
                use_tqdm=False,
            )
        except ValueError as error:
            found.append(str(error))
            continue
        found.append([[list(output.prompt_token_ids), list(output.outputs[0].token_ids)] for output in outputs])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
