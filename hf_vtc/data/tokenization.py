"""One conversation to token ids, those that `apply_chat_template` gives, and to labels of what is learned."""

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import ProcessorMixin
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

logger = logging.get_logger(__name__)

# the label of everything that is not learned, as in torch and transformers
IGNORE_INDEX = -100
# how a template marks what the model writes
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SHOWN_CHARACTERS = 40


class Answer(NamedTuple):
    """One answer in the rendered conversation, in characters.

    `prompt_end`: where generation would start. `spans`: (start, end) of what the model writes. `marked`: whether the
    template itself says so; else the answer ends with the last end token before the span's end.
    """

    message_idx: int
    prompt_end: int
    spans: list[tuple[int, int]]
    marked: bool


class ConversationTokenizer:
    """Token ids and labels of conversations, for any processor of hf_vtc, any tokenizer and any chat template.

    A conversation is rendered and tokenized as a whole, the way `apply_chat_template(tokenize=True)` does it. Learned
    is what the template marks by `{% generation %}`; without marks, what rendering an answer adds to its prompt, up to
    the last end token. Each prompt, tokenized alone as before generation, must be the beginning of the row: then the
    first token that is learned is the one that generation writes.

    Args:
        processor (`VtcProcessor`): its tokenizer and its chat template.
    """

    def __init__(self, processor: ProcessorMixin):
        self.processor = processor
        tokenizer = processor.tokenizer
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._placeholders = [processor.image_token]
        self._placeholder_ids = [processor.image_token_id]
        if processor.video is not None:
            self._placeholders.append(processor.video_token)
            self._placeholder_ids.append(processor.video_token_id)
        special |= {*self._placeholders, *tokenizer.all_special_tokens}
        self._special_ids = set(tokenizer.convert_tokens_to_ids(sorted(special)))
        self._warned = False
        # longest first, so that an error names the whole token
        self._special = re.compile("|".join(map(re.escape, sorted(filter(None, special), key=len, reverse=True))))

    def __call__(
        self, messages: Sequence[dict[str, Any]], replacements: Sequence[str], of_videos: Sequence[str] = ()
    ) -> tuple[list[int], list[int]]:
        """Token ids and labels of one conversation.

        Args:
            messages (`Sequence[dict]`): of a `Conversation`; answers of `weight` 0 are shown and not learned.
            replacements (`Sequence[str]`): what the placeholder of each image becomes.
            of_videos (`Sequence[str]`): what that of each video becomes, with the tokens around it.

        Raises:
            ValueError: a text holds a token of the model, the template leaves something out, or the row would not be
                what generation sees and writes.
        """
        self._refuse_special_tokens(messages)
        chat = [{"role": message["role"], "content": _parts(message["content"])} for message in messages]
        text = self._render(chat)
        replacements = self._in_order(text, replacements, of_videos)
        _refuse_left_out(chat, text)
        learned = [idx for idx, each in enumerate(messages) if each["role"] == "assistant" and each.get("weight") != 0]
        answers = self._answers(chat, text, learned)
        places = {place for answer in answers for place in (answer.prompt_end, *sum(answer.spans, ()))}
        places = sorted(places | {len(text)})
        texts = self._expanded(text, places, replacements)
        # beginnings are compared before placeholders are expanded, of which there may be thousands
        *short, ids = self._encode([*(text[:place] for place in places), texts[len(text)]])
        if self._spread(short[-1], short[-1], replacements) == ids:
            labels = self._labels(short[-1], dict(zip(places, short)), answers)
            return ids, self._spread(short[-1], labels, replacements, IGNORE_INDEX)
        # a tokenizer that reads an image's start token with the text around it
        return ids, self._labels(ids, dict(zip(places, self._encode(list(texts.values())))), answers)

    def _spread(
        self, row: list[int], values: list[int], replacements: Sequence[str], fill: int | None = None
    ) -> list[int]:
        """Values of a row's tokens, with the ids of its replacement, or `fill` as often, for each placeholder."""
        tokens = {text: self.processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in replacements}
        following, spread = iter(replacements), []
        for token, value in zip(row, values):
            inside = tokens[next(following)] if token in self._placeholder_ids else None
            spread += [value] if inside is None else inside if fill is None else [fill] * len(inside)
        return spread

    def _in_order(self, text: str, replacements: Sequence[str], of_videos: Sequence[str]) -> list[str]:
        """Replacements of images and videos as their placeholders stand in the rendered conversation."""
        kinds = dict(zip(self._placeholders, ((replacements, "images"), (of_videos, "videos"))))
        for token, (own, kind) in kinds.items():
            if text.count(token) != len(own):
                raise ValueError(
                    f"The chat template wrote {text.count(token)} times {token} for {len(own)} {kind}. Correct the "
                    "template."
                )
        following = {token: iter(own) for token, (own, _) in kinds.items()}
        return [next(following[found]) for found in re.findall("|".join(map(re.escape, kinds)), text)]

    def _labels(self, row: list[int], encoded: dict[int, list[int]], answers: list[Answer]) -> list[int]:
        """Labels of a row; `encoded` holds the ids of the text up to each place."""
        tokens_before = {place: _num_common(ids, row) for place, ids in encoded.items()}
        labels = [IGNORE_INDEX] * len(row)
        for answer in answers:
            start = tokens_before[answer.prompt_end]
            if start < len(encoded[answer.prompt_end]):
                self._refuse_other_prompt(answer, encoded[answer.prompt_end], row, start)
            for span_idx, (first, last) in enumerate(answer.spans):
                begin, end = tokens_before[first], tokens_before[last]
                if span_idx == 0 and begin > start:
                    raise ValueError(
                        f"Message {answer.message_idx}: generation starts {begin - start} tokens before the chat "
                        "template marks the answer by `generation`, so that these would never be learned. Write them "
                        "into the generation prompt of the template, or mark them as well."
                    )
                begin = max(begin, start)
                if not answer.marked:
                    end = begin + _up_to_last(self.processor.tokenizer.eos_token_id, row[begin:end])
                labels[begin:end] = row[begin:end]
            written = [label for label in labels[start : tokens_before[answer.spans[-1][1]]] if label != IGNORE_INDEX]
            if not written:
                raise ValueError(f"Message {answer.message_idx}: nothing of the answer is left in tokens of its own.")
            if written[-1] not in self._special_ids and not self._warned:
                self._warned = True
                logger.warning(
                    "The chat template writes no end token after an answer, so that a model does not learn to stop. "
                    "Write `eos_token` where answers end, and mark it by `generation` if the template has marks."
                )
        return labels

    def _refuse_other_prompt(self, answer: Answer, prompt: list[int], row: list[int], start: int) -> None:
        in_row, in_prompt = (self.processor.tokenizer.decode(ids[start : start + 3]) for ids in (row, prompt))
        raise ValueError(
            f"Message {answer.message_idx}: generation would be given other tokens before this answer than training: "
            f"{in_prompt!r} there is {in_row!r} here. Remove white space from the beginning of the answer, or correct "
            "the chat template or the tokenizer."
        )

    def _answers(self, chat: list[dict[str, Any]], text: str, learned: list[int]) -> list[Answer]:
        """Where each answer that is learned stands in the rendered conversation."""
        prompts = {}
        for idx, message in enumerate(chat):
            if message["role"] == "assistant":
                prompts[idx] = self._beginning(chat[:idx], text, idx, add_generation_prompt=True)
        spans = self._marked_spans(chat, text)
        if spans is None:
            return [
                Answer(idx, prompts[idx], [(prompts[idx], self._beginning(chat[: idx + 1], text, idx))], marked=False)
                for idx in learned
            ]
        answers = []
        for idx in learned:
            following = min((place for other, place in prompts.items() if other > idx), default=len(text))
            # by their ends, since a span may begin inside of the generation prompt
            own = [span for span in spans if prompts[idx] < span[1] <= following]
            if not own:
                raise ValueError(
                    f"Message {idx}: the chat template marks nothing of this answer by `generation`. Mark it, or give "
                    "the answer `weight` 0."
                )
            answers.append(Answer(idx, prompts[idx], own, marked=True))
        return answers

    def _beginning(
        self, chat: list[dict[str, Any]], text: str, message_idx: int, add_generation_prompt: bool = False
    ) -> int:
        """Characters of the first messages, which must be what the whole conversation begins with."""
        rendered = self._render(chat, add_generation_prompt)
        if not text.startswith(rendered):
            raise ValueError(
                f"The chat template must only append text for each further message, but message {message_idx} or a "
                "later one changes what came before it, or its generation prompt is not how answers begin. Use a "
                "template that leaves earlier turns alone."
            )
        return len(rendered)

    def _marked_spans(self, chat: list[dict[str, Any]], text: str) -> list[tuple[int, int]] | None:
        """(start, end) in characters of what the template marks by `generation`, None if it has no marks."""
        template = self.processor.chat_template
        template = template.get("default") if isinstance(template, dict) else template
        if not template or not _GENERATION.search(template):
            return None
        (rendered,), (spans,) = render_jinja_template(
            conversations=[chat],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self.processor.tokenizer.special_tokens_map,
        )
        bare = self.processor.bare_videos
        if bare(rendered) != text:
            raise RuntimeError("The chat template renders differently when asked for its marks of `generation`.")
        return [(len(bare(rendered[:start])), len(bare(rendered[:end]))) for start, end in spans if end > start]

    def _render(self, chat: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        if not chat:
            # templates look at the first message
            raise ValueError("Message 0 must not be an answer, since nothing comes before it.")
        try:
            # what a template writes around a video is part of what takes the place of its placeholder
            return self.processor.bare_videos(
                self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=add_generation_prompt)
            )
        except TemplateError as error:
            raise ValueError(f"The chat template refuses the conversation: {error}") from error

    def _expanded(self, text: str, places: list[int], replacements: Sequence[str]) -> dict[int, str]:
        """The text up to each place, with `replacements` in place of its placeholders."""
        tokens = "|".join(map(re.escape, self._placeholders))
        following, done, expanded, start = iter(replacements), "", {}, 0
        for place in places:
            done += re.sub(tokens, lambda _: next(following), text[start:place])
            expanded[place], start = done, place
        return expanded

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Ids as `apply_chat_template` makes them: the tokenizer adds its own tokens unless the template did."""
        tokenizer = self.processor.tokenizer
        written = tokenizer.bos_token is not None and texts[-1].startswith(tokenizer.bos_token)
        adds = not written and tokenizer.init_kwargs.get("add_special_tokens", True)
        return tokenizer(texts, add_special_tokens=adds)["input_ids"]

    def _refuse_special_tokens(self, messages: Sequence[dict[str, Any]]) -> None:
        for idx, message in enumerate(messages):
            for part in _parts(message["content"]):
                found = self._special.search(part["text"]) if part["type"] == "text" else None
                if found:
                    raise ValueError(
                        f"Message {idx}: the text holds {found[0]!r}, which is a token of the model and would not be "
                        "read as text. Remove it, or spell it otherwise."
                    )


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _refuse_left_out(chat: list[dict[str, Any]], text: str) -> None:
    """Raise if a text of the conversation is not in what the template made of it."""
    for idx, message in enumerate(chat):
        for part in message["content"]:
            if part["type"] == "text" and part["text"].strip() not in text:
                shown = part["text"].strip()[:_SHOWN_CHARACTERS]
                raise ValueError(
                    f"Message {idx}: the chat template leaves out or changes the text of the `{message['role']}` "
                    f"({shown!r}). Use a template that shows it, or take the text out of the record."
                )


def _num_common(ids: list[int], others: list[int]) -> int:
    """Length of the common beginning."""
    if ids == others[: len(ids)]:
        return len(ids)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, others)))


def _up_to_last(token_id: int | None, ids: list[int]) -> int:
    """Length of `ids` up to and including the last `token_id`, all of it if there is none."""
    return next((end for end in range(len(ids), 0, -1) if ids[end - 1] == token_id), len(ids))
