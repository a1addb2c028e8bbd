r"""Conversations about images, in LLaVA's format, as batches with labels on the answers only.

A record is `{"id": ..., "image": PIL image, path or bytes (or a list), "conversations": [{"from": "human" | "gpt",
"value": "<image>\nWhat is this?"}, ...]}`; `<image>` marks where an image goes.
"""

import copy
import json
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

from ..chat_format import ChatFormat, Span
from .order import Budget

IGNORED = -100
WORKER_ERROR = re.compile(r"in DataLoader worker process .*^[\w.]*(BadRecord|ValueError|OSError): (.+)", re.M | re.S)
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


class BadRecord(ValueError):
    """A record that cannot be learned from; `kind` says in a word or two why, the message in a sentence."""

    def __init__(self, kind: str, record: dict[str, Any], why: str):
        super().__init__(f"Record {record.get('id')} {why}")
        self.kind = kind


@contextmanager
def errors_of_workers() -> Iterator[None]:
    """Makes ValueErrors of those that a worker of a DataLoader raised, which come as a traceback in text."""
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        told = WORKER_ERROR.search(str(error))
        if told is None:
            raise
        raise ValueError(told[2].strip()) from error


def messages_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    r"""A record's conversation as chat messages. Raises BadRecord if it has another form, or images do not fit.

    "<image>\nWhat?" -> [{"type": "image"}, {"type": "text", "text": "What?"}]
    """
    messages: list[dict[str, Any]] = []
    for turn in turns_of(record):
        content: list[dict[str, str]] = []
        for number, text in enumerate(turn["value"].split("<image>")):
            content += [{"type": "image"}] if number else []
            content += [{"type": "text", "text": text.strip("\n")}] if text.strip("\n") else []
        messages.append({"role": ROLES[turn["from"]], "content": content})
    check_images(record, messages)
    return messages


def turns_of(record: dict[str, Any]) -> list[dict[str, str]]:
    """A record's turns, each of a known role with a text. Raises BadRecord."""
    turns = record.get("conversations")
    if not isinstance(turns, (list, tuple)) or not turns:
        raise BadRecord("no conversation", record, "has no `conversations`, a list of turns.")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadRecord("malformed turn", record, f"has no text in turn {number}: a turn is `from` and `value`.")
        if turn.get("from") not in ROLES:
            known = ", ".join(ROLES)
            raise BadRecord("unknown role", record, f"has a turn {number} of {turn.get('from')!r}; known are {known}.")
        if ROLES[turn["from"]] == "assistant" and not turn["value"].strip():
            raise BadRecord("empty answer", record, f"has an empty answer in turn {number}.")
    return list(turns)


def check_images(record: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    """Raises BadRecord if there are not as many images as placeholders, or an answer holds one."""
    shown = [message["role"] for message in messages for part in message["content"] if part["type"] == "image"]
    images = len(images_of(record))
    if len(shown) != images:
        raise BadRecord("image count", record, f"has {len(shown)} <image> placeholders, but {images} images.")
    if "assistant" in shown:
        raise BadRecord("image in an answer", record, "has an <image> in an answer, which only speaks.")


def images_of(record: dict[str, Any]) -> list[Any]:
    """A record's images, as a list."""
    images = record.get("image")
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


class ConversationCollator:
    """Makes model inputs and labels of a list of records, through the processor's own chat template.

    `plain` is the form of LLaVA's first stage: images, caption and a newline, without question or template.
    A record of more than `max_length` tokens is a bad one, unless `truncate` cuts it, which never cuts images; `cut`
    has the ids of those of the last batch, each with a sentence.
    Raises BadRecord, with the record's id, for a record that has no such form or leaves nothing to learn.
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
        """One record: `input_ids`, `attention_mask` and `labels` (L,), and the image processor's (images, ...)."""
        render = self._render_plain if self.plain else self._render_chat
        text, spans = render(record, messages_of(record))
        row = self._process(record, text)
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

    def _render_chat(self, record: dict[str, Any], messages: list[dict[str, Any]]) -> tuple[str, list[Span]]:
        try:
            return self.chat_format.render_with_answers(messages)
        except ValueError as error:
            raise BadRecord("chat template", record, f"does not fit the chat template: {error}") from error

    def _render_plain(self, record: dict[str, Any], messages: list[dict[str, Any]]) -> tuple[str, list[Span]]:
        answers = [part["text"] for m in messages if m["role"] == "assistant" for part in m["content"]]
        images = self.processor.image_token * len(images_of(record))
        if len(answers) != 1 or not images:
            why = f"needs images and one caption to be plain, and has {len(images_of(record))} and {len(answers)}."
            raise BadRecord("not plain", record, why)
        text = f"{images}{answers[0].strip()}\n"
        return text, [(len(images), len(text))]

    def _process(self, record: dict[str, Any], text: str) -> dict[str, Any]:
        """What the processor makes of a record's text and images, as it does for `generate`."""
        images, bos = images_of(record), self.processor.tokenizer.bos_token
        if text.count(token := self.processor.image_token) != len(images):
            raise BadRecord(
                "image count", record, f"has {text.count(token)} {token} in its text, but {len(images)} images."
            )
        for image in images:
            if isinstance(image, Path) and not image.is_file():
                raise BadRecord("missing image", record, f"has no image at {image}.")
        try:
            return dict(
                self.processor(
                    text=[text],
                    images=[images] if images else None,
                    # as transformers has it: a template writes the start of the text itself, or the tokenizer does
                    add_special_tokens=not (bos and text.startswith(bos)),
                    return_offsets_mapping=True,
                    return_text_replacement_offsets=True,
                )
            )
        except ValueError as error:
            raise BadRecord("unreadable image", record, f"cannot be read: {error}") from error

    def _fit(self, record: dict[str, Any], ids: Tensor, learned: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that may stay. Raises BadRecord if they are too many, or an image's would be cut."""
        if len(ids) <= self.max_length:
            return ids, learned
        if not self.truncate:
            raise BadRecord("too long", record, f"has {len(ids)} tokens, more than {self.max_length}.")
        if (ids[self.max_length :] == self.processor.image_token_id).any():
            why = f"has images beyond token {self.max_length} of its {len(ids)}, which cannot be cut."
            raise BadRecord("too long", record, why)
        self.cut[str(record.get("id"))] = f"has {len(ids)} tokens, of which {self.max_length} stay."
        return ids[: self.max_length], learned[: self.max_length]


def moved(spans: list[Span], replacements: list[list[dict[str, Any]]]) -> list[Span]:
    """Character ranges of a text, in the text whose image tokens were multiplied."""
    grown = [(r["span"][1], r["new_span"][1] - r["span"][1]) for r in (replacements[0] if replacements else [])]
    ends, shifts = [end for end, _ in grown], [0, *(shift for _, shift in grown)]
    return [tuple(place + shifts[bisect_right(ends, place)] for place in span) for span in spans]


def learned_tokens(offsets: Sequence[Span], spans: Sequence[Span]) -> np.ndarray:
    """Which tokens share a character with one of the spans; offsets are each token's (start, end) in the text.

    A token of no characters (a lone prefix space) counts if it stands before a character of a span. Those that a
    tokenizer puts around a text have none either, at 0.
    """
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    characters = np.zeros(max(ends.max(initial=0), max((end for _, end in spans), default=0)) + 2, dtype=np.int64)
    for start, end in spans:
        characters[start + 1 : end + 1] = 1
    before = characters.cumsum()  # learned characters in front of each place
    width = np.where((ends == starts) & (starts > 0), 1, 0)
    return before[ends + width] > before[starts]


class BatchMaker:
    """Collates (record, budget) pairs of one step into model inputs, labels, and `record_ids`.

    `collator(processor)` makes inputs and labels of records, and raises ValueError, with its id, for a bad one.
    `bad_records` "skip" leaves these out. Which were left out, and which were cut, is written into skipped.jsonl and
    cut.jsonl in `folder`, one JSON object a line.

    A batch without any image gets one more row, a blank picture without labels, whose gradient is zero: tower and
    projector then run in every process at every step, as sharded training requires.
    """

    def __init__(self, collator: Callable[[Any], ConversationCollator], processor: Any, bad_records: str, folder: Path):
        self.collator = collator
        self.processor = processor
        self.bad_records = bad_records
        self.folder = folder

    def __call__(self, samples: Sequence[tuple[dict[str, Any], Budget | None]]) -> dict[str, Any]:
        budget = samples[0][1]
        assert all(other == budget for _, other in samples), "a batch crosses from one step into the next"
        collate = self.collator(self._processor(budget))
        rows, ids, has_images = [], [], False
        for record, _ in samples:
            try:
                rows.append(collate.encode(record))
            except BadRecord as error:
                if self.bad_records == "fatal":
                    raise
                self._note("skipped", str(record["id"]), str(error))
                continue
            ids.append(str(record["id"]))
            has_images |= bool(images_of(record))
        if not has_images:
            rows.append(collate.encode(blank_record()))
            rows[-1]["labels"][:] = IGNORED
        for record_id, why in collate.cut.items():
            self._note("cut", record_id, why)
        return collate.join(rows) | {"record_ids": ids}

    def _processor(self, budget: Budget | None) -> Any:
        if budget is None:
            return self.processor
        processor = copy.copy(self.processor)
        processor.images_kwargs = {"visual_tokens": budget}
        return processor

    def _note(self, what: str, record_id: str, why: str) -> None:
        with (self.folder / f"{what}.jsonl").open("a") as file:
            file.write(json.dumps({"id": record_id, "why": why}) + "\n")


def blank_record() -> dict[str, Any]:
    """A white picture, and an answer that is not to be learned."""
    said = [{"from": "human", "value": "<image>\n"}, {"from": "gpt", "value": "."}]
    return {"id": "blank", "image": Image.new("RGB", (64, 64), "white"), "conversations": said}
