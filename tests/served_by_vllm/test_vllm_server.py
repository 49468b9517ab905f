"""vLLM's OpenAI server with the real client: answers, budgets of requests, streams, errors as 400."""

import asyncio

import pytest

pytest.importorskip("vllm", reason="needs an environment with vllm, see docs/serve.md")

import openai
from served import CARDS, ENVIRONMENT, MAX_TOKENS, PAGES, cases, ours

# that has put the folder of the examples on the path
# isort: split
from load_test import load
from local_server import SERVED_NAME, image_part, messages, serving

pytestmark = pytest.mark.vllm

SERVER_BUDGET = 0.5
OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--trust-request-mm-kwargs")


@pytest.fixture(scope="module")
def server():
    budget = ("--mm-processor-kwargs", f'{{"vtc_budget": {SERVER_BUDGET}}}')
    with serving(CARDS / "vico-tiny", *OPTIONS, *budget, **ENVIRONMENT) as started:
        yield started


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.address, api_key="none", max_retries=0, timeout=600)


def ask(client, case, arguments=None, **given):
    extra = {"return_token_ids": True, **given.pop("extra_body", {})}
    if arguments is not None:
        extra["mm_processor_kwargs"] = arguments
    return client.chat.completions.create(
        model=SERVED_NAME,
        messages=given.pop("messages", messages(case.question, *case.images)),
        max_tokens=MAX_TOKENS,
        temperature=0,
        extra_body=extra,
        **given,
    )


@pytest.mark.parametrize("num_prompts", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("budget", [None, "full", 1.0, 0.7, 0.25, 60])
def test_answers_and_counts_are_those_of_generate(client, budget, num_prompts):
    model = ours(CARDS / "vico-tiny")
    for case in cases(num_prompts):
        answer = ask(client, case, None if budget is None or not case.images else {"vtc_budget": budget})
        count, ids = model.answer(case, SERVER_BUDGET if budget is None else budget)
        assert answer.choices[0].token_ids == ids
        assert answer.prompt_token_ids.count(model.model.config.image_token_id) == count
        assert answer.usage.prompt_tokens == len(answer.prompt_token_ids)


def test_streams_give_what_whole_answers_give(client):
    case = cases(1)[0]
    whole = ask(client, case, {"vtc_budget": 0.25})
    chunks = list(ask(client, case, {"vtc_budget": 0.25}, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_structured_output(client):
    answer = ask(client, cases(1)[0], extra_body={"structured_outputs": {"choice": ["red", "blue"]}})
    assert answer.choices[0].message.content in ("red", "blue")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vtc_budget": "auto"}, "`vtc_budget='auto'` cannot be served for vtc_vico"),
        ({"vtc_budget": 1}, "the smallest admissible count is"),
        ({"vtc_budget": 2.5}, "`vtc_budget` must be None or 'auto', 'full'"),
        ({"vtc_budget": True}, "`vtc_budget` must be None or 'auto', 'full'"),
        ({"vtc_budget": [0.5, 0.25]}, "must be one budget for all images of a request"),
        ({"budget": 0.5}, r"no argument `budget` \(did you mean `vtc_budget`\?\)"),
        ({"padding": True}, "no argument `padding`"),
    ],
)
def test_errors_are_our_own_as_400(client, arguments, message):
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, cases(1)[0], arguments)


def test_placeholders_in_texts_and_broken_images_are_refused(client):
    case = cases(1)[0]
    text = {"type": "text", "text": "what does <IMG_CONTEXT> mean?"}
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    for content, message in (
        ([image_part(PAGES[0]), text], "2 image placeholders but 1 images"),
        ([broken], "Failed to load image"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            ask(client, case, messages=[{"role": "user", "content": content}])
    assert ask(client, case).choices[0].message.content


def test_many_requests_at_once_get_the_answers_that_they_should(server):
    wrong, _ = asyncio.run(load(server, 60, 16, ["full", 0.7, 0.5, 0.3]))
    assert not wrong
