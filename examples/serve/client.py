"""Ask a server about an image, at the server's budget and at one of the request.

python examples/serve/client.py examples/images/form_1.png "how many digits are there?" --budget 0.25

The server must allow budgets of requests: `--trust-request-mm-kwargs`.
"""

import argparse
import json
from pathlib import Path

import openai
from local_server import messages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("question")
    parser.add_argument("--budget", type=json.loads, help="a share such as 0.25, a number of tokens, or '\"full\"'")
    parser.add_argument("--address", default="http://localhost:8000/v1")
    arguments = parser.parse_args()
    client = openai.OpenAI(base_url=arguments.address, api_key="none")
    extra = {} if arguments.budget is None else {"mm_processor_kwargs": {"vtc_budget": arguments.budget}}
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=messages(arguments.question, arguments.image),
        stream=True,
        stream_options={"include_usage": True},
        extra_body=extra,
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        elif chunk.usage:
            print(f"\n{chunk.usage.prompt_tokens} tokens in the prompt, visual ones among them")


if __name__ == "__main__":
    main()
