"""Conversations about images as batches, with labels on the answers only."""

import copy
import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..chat_format import ChatFormat, Span, thinking_off
from .conversations import BadRecord, Conversation, conversation_of, name_of, naming
from .order import Budget

IGNORED = -100
WORKER_ERROR = re.compile(r"in DataLoader worker process .*^[\w.]*(BadRecord|ValueError|OSError): (.+)", re.M | re.S)


@contextmanager
def errors_of_workers() -> Iterator[None]:
    """Turns errors of a DataLoader worker, which arrive as the text of a traceback, back into ValueErrors."""
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        told = WORKER_ERROR.search(str(error))
        if told is None:
            raise
        raise ValueError(told[2].strip()) from error


class ConversationCollator:
    """Makes model inputs and labels from a list of records with the processor's chat template.

    `plain` is the format of LLaVA's first stage: images, caption and a newline, without question or template.
    A record of more than `max_length` tokens is bad, unless `truncate` shortens it, which never removes image tokens;
    `cut` has the ids of those in the last batch, each with a sentence.
    Raises BadRecord, with the record's id, for a record in another format or without anything to train on.
    """

    def __init__(self, processor, max_length: int, plain: bool = False, truncate: bool = False):
        self.processor = processor
        self.max_length = max_length
        self.plain = plain
        self.truncate = truncate
        self.cut: dict[str, str] = {}
        if processor.tokenizer.pad_token_id is None:
            raise ValueError("The tokenizer has no token for padding: set its `pad_token`.")
        if processor.chat_template is None and not plain:
            raise ValueError("The processor has no chat template: set its `chat_template`, or train on plain captions.")
        self.chat_format = ChatFormat(processor.chat_template or "", processor.tokenizer)

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        self.cut = {}
        return self.join([self.encode(record) for record in records])

    def join(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Encoded records as one batch, padded on the right."""
        fills = {"input_ids": self.processor.tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        batch = {name: pad_sequence([row.pop(name) for row in rows], True, fill) for name, fill in fills.items()}
        images = dict.fromkeys(name for row in rows for name in row)
        return batch | {name: torch.cat([row[name] for row in rows if name in row]) for name in images}

    def encode(self, record: dict[str, Any]) -> dict[str, Tensor]:
        """One record: `input_ids`, `attention_mask` and `labels` (L,), and the image processor's (images, ...).

        Raises BadRecord, whatever is wrong with the record.
        """
        with naming(record):
            conversation = conversation_of(record, self.processor.image_token)
            render = self._render_plain if self.plain else self._render_chat
            text, spans = render(record, conversation)
            row = self._process(record, text, conversation.images)
            spans = moved(spans, row.pop("text_replacement_offsets"))
            is_learned = torch.from_numpy(learned_tokens(row.pop("offset_mapping")[0], spans))
            ids, learned = self._fit(record, torch.tensor(row.pop("input_ids")[0]), is_learned)
            if not learned.any():
                raise BadRecord("nothing to learn", record, "has no answer to learn from.")
            row.pop("attention_mask")
            return {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "labels": ids.masked_fill(~learned, IGNORED),
                **{name: torch.from_numpy(np.stack(values)) for name, values in row.items()},
            }

    def blank(self) -> dict[str, Tensor]:
        """A blank picture and an answer, without labels."""
        row = self.encode(blank_record())
        return row | {"labels": torch.full_like(row["labels"], IGNORED)}

    def _render_chat(self, record: dict[str, Any], conversation: Conversation) -> tuple[str, list[Span]]:
        try:
            return self.chat_format.render_with_answers(conversation.messages)
        except ValueError as error:
            raise BadRecord("chat template", record, f"does not fit the chat template: {error}") from error

    def _render_plain(self, record: dict[str, Any], conversation: Conversation) -> tuple[str, list[Span]]:
        answers = [
            "".join(part["text"] for part in message["content"])
            for message in conversation.messages
            if message["role"] == "assistant"
        ]
        images = self.processor.image_token * len(conversation.images)
        if len(answers) != 1 or not images:
            why = f"needs images and one caption to be plain, and has {len(conversation.images)} and {len(answers)}."
            raise BadRecord("not plain", record, why)
        text = f"{images}{answers[0].strip()}\n"
        return text, [(len(images), len(text))]

    def _process(self, record: dict[str, Any], text: str, images: list[Any]) -> dict[str, Any]:
        """What the processor makes of a record's text and images, as it does for `generate`."""
        if text.count(token := self.processor.image_token) != len(images):
            why = f"has {text.count(token)} {token} in its text, but {len(images)} images."
            raise BadRecord("image count", record, why)
        for image in images:
            if isinstance(image, Path) and not os.path.isfile(image):
                raise BadRecord("missing image", record, f"has no image at {image}.")
        try:
            return dict(
                self.processor(
                    text=[text],
                    images=[images] if images else None,
                    return_offsets_mapping=True,
                    return_text_replacement_offsets=True,
                )
            )
        except ValueError as error:
            raise BadRecord("unreadable image", record, f"cannot be read: {error}") from error

    def _fit(self, record: dict[str, Any], ids: Tensor, learned: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens within the length limit. Raises BadRecord if there are too many, or an image would be cut."""
        if len(ids) <= self.max_length:
            return ids, learned
        if not self.truncate:
            raise BadRecord("too long", record, f"has {len(ids)} tokens, more than {self.max_length}.")
        if (ids[self.max_length :] == self.processor.image_token_id).any():
            why = f"has images beyond token {self.max_length} of its {len(ids)}, which cannot be cut."
            raise BadRecord("too long", record, why)
        self.cut[name_of(record)] = f"has {len(ids)} tokens, of which {self.max_length} stay."
        return ids[: self.max_length], learned[: self.max_length]


def moved(spans: list[Span], replacements: list[list[dict[str, Any]]]) -> list[Span]:
    """Translates character ranges of a text to the text with expanded image tokens."""
    grown = [(r["span"][1], r["new_span"][1] - r["span"][1]) for r in (replacements[0] if replacements else [])]
    ends, shifts = [end for end, _ in grown], [0, *(shift for _, shift in grown)]
    return [tuple(place + shifts[bisect_right(ends, place)] for place in span) for span in spans]


def learned_tokens(offsets: Sequence[Span], spans: Sequence[Span]) -> np.ndarray:
    """Which tokens share a character with one of the spans; offsets are each token's (start, end) in the text.

    A token without characters (a lone prefix space) counts if it stands before a character of a span. Tokens that a
    tokenizer adds around a text have none either, at offset 0.
    """
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    characters = np.zeros(max(ends.max(initial=0), max((end for _, end in spans), default=0)) + 2, dtype=np.int64)
    for start, end in spans:
        characters[start + 1 : end + 1] = 1
    before = characters.cumsum()  # number of trained characters before each position
    width = np.where((ends == starts) & (starts > 0), 1, 0)
    return before[ends + width] > before[starts]


def mend_template(processor: Any) -> str | None:
    """Makes the text before trained answers equal to the generation prompt; returns a sentence about what it changed.

    If the chat template makes them differ (thinking before an answer), the processor gets the same template with
    thinking switched off, if that helps. Returns None if nothing was changed.
    """
    template, tokenizer = processor.chat_template, processor.tokenizer
    problem = None if template is None else ChatFormat(template, tokenizer).check_generation_prompt()
    if problem is None:
        return None
    processor.chat_template = thinking_off(template, tokenizer)
    if processor.chat_template == template:
        return f"Training and generation prompts differ: {problem} Give the processor another chat template."
    return f"The chat template is used and saved with thinking switched off: {problem}"


class BatchMaker:
    """Collates (record, budget) pairs of one step into model inputs, labels, and `record_ids`.

    `collator(processor)` makes inputs and labels of records, and raises ValueError, with its id, for a bad one.
    `bad_records` "skip" leaves these out. Records that were left out or shortened are listed in skipped.jsonl and
    cut.jsonl in `folder`, one JSON object a line.

    A batch without images gets an extra row, a blank picture without labels, whose gradient is zero, so that tower and
    projector run in every process at every step, as sharded training requires.
    """

    def __init__(self, collator: Callable[[Any], ConversationCollator], processor: Any, bad_records: str, folder: Path):
        self.collator = collator
        self.processor = processor
        self.bad_records = bad_records
        self.folder = folder

    def __call__(self, samples: Sequence[tuple[dict[str, Any], Budget | None]]) -> dict[str, Any]:
        budget = samples[0][1]
        assert all(other == budget for _, other in samples), "a batch crosses from one step into the next"
        collate = self.collator(self.processor if budget is None else with_budget(self.processor, budget))
        rows, ids = [], []
        for record, _ in samples:
            try:
                rows.append(collate.encode(record))
            except BadRecord as error:
                if self.bad_records == "fatal":
                    raise
                self._note("skipped", name_of(record), str(error))
            else:
                ids.append(name_of(record))
        if not any("pixel_values" in row for row in rows):
            rows.append(collate.blank())
        for record_id, why in collate.cut.items():
            self._note("cut", record_id, why)
        return collate.join(rows) | {"record_ids": ids}

    def _note(self, what: str, record_id: str, why: str) -> None:
        with (self.folder / f"{what}.jsonl").open("a") as file:
            file.write(json.dumps({"id": record_id, "why": why}) + "\n")


def with_budget(processor: Any, budget: Budget) -> Any:
    """A copy of the processor that gives every image this budget."""
    processor = copy.copy(processor)
    processor.images_kwargs = {"visual_tokens": budget}
    return processor


def blank_record() -> dict[str, Any]:
    """A white picture, and an answer without labels."""
    said = [{"from": "human", "value": "<image>\n"}, {"from": "gpt", "value": "."}]
    return {"id": "blank", "image": Image.new("RGB", (64, 64), "white"), "conversations": said}
