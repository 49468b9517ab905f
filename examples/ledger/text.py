"""The tokenizer of the ledger models: byte pairs merged on what is asked and answered, digits one by one."""

import itertools

import digit_forms.text
from transformers import PreTrainedTokenizerFast

from .pages import COLOURS, PAPERS
from .questions import CELLS, TEMPLATES


def corpus() -> list[str]:
    """Every question and answer word, in a fixed order."""
    texts = []
    for _, template in TEMPLATES.values():
        for colour, cell in itertools.product(COLOURS, CELLS):
            texts.append("user\n" + template.format(colour=colour, cell=cell))
    answers = ["yes", "no", *PAPERS]
    return texts + [f"assistant\n{answer}" for answer in answers * 20]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """As that of `digit_forms`, merged on the ledger's texts until every word of them is one token."""
    return digit_forms.text.build_tokenizer(corpus(), vocab_size=1000)
