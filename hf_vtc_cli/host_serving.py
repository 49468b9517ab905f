"""The door to the server of transformers: where it looks models up, and what a request may ask.

Seen on transformers 5.23.0 and 5.24.0. The server looks classes up by their names in tables of transformers' own and
not in those of registered classes, so these tables learn of ours, in the process of the server alone.
"""

from typing import Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from hf_vtc.methods import RECORDS


def know_methods() -> None:
    """Let the server find the classes of every method, as models of text and images."""
    for method in RECORDS.values():
        setattr(transformers, method.head.__name__, method.head)
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[method.config.model_type] = method.head.__name__


def take_budgets() -> None:
    """Let requests for chat completions have a field `vtc_budget`, as `generate` takes it."""
    from fastapi import HTTPException
    from transformers.cli.serving import chat_completion

    stock = chat_completion.ChatCompletionHandler

    class Parameters(stock._valid_params_class, total=False):
        vtc_budget: Any

    class ChatCompletionHandler(stock):
        _valid_params_class = Parameters

        async def handle_request(self, body: dict, request_id: str) -> Any:
            try:
                return await super().handle_request(body, request_id)
            except ValueError as error:
                # a budget that no count fits, an image that cannot be read
                raise HTTPException(status_code=422, detail=str(error)) from error

        def _build_generation_config(self, body: dict, *args: Any, **kwargs: Any) -> Any:
            config = super()._build_generation_config(body, *args, **kwargs)
            if body.get("vtc_budget") is not None:
                config.vtc_budget = body["vtc_budget"]
            return config

    chat_completion.ChatCompletionHandler = ChatCompletionHandler
