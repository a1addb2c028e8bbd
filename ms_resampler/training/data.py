r"""Conversations about images, in LLaVA's format, as batches with labels on the answers only.

A record is `{"id": ..., "image": PIL image or path (or a list), "conversations": [{"from": "human" | "gpt",
"value": "<image>\nWhat is this?"}, ...]}`; `<image>` marks where an image goes.
"""

from collections.abc import Sequence
from typing import Any

import torch

IGNORED = -100
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def messages_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    r"""A record's conversation as chat messages. Raises ValueError, with the record's id, if images do not fit.

    "<image>\nWhat?" -> [{"type": "image"}, {"type": "text", "text": "What?"}]
    """
    messages: list[dict[str, Any]] = []
    for turn in record["conversations"]:
        content: list[dict[str, str]] = []
        for number, text in enumerate(turn["value"].split("<image>")):
            content += [{"type": "image"}] if number else []
            content += [{"type": "text", "text": text.strip("\n")}] if text.strip("\n") else []
        messages.append({"role": ROLES[turn["from"]], "content": content})
    placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placeholders != len(images_of(record)):
        raise ValueError(
            f"Record {record['id']} has {placeholders} <image> placeholders, but {len(images_of(record))} images."
        )
    return messages


def images_of(record: dict[str, Any]) -> list[Any]:
    """A record's images, as a list."""
    images = record.get("image")
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


class ConversationCollator:
    """Makes model inputs and labels of a list of records, through the processor's own chat template.

    Raises ValueError, with the record's id, if a record is longer than `max_length` tokens or has no answer.
    """

    def __init__(self, processor, max_length: int):
        self.processor = processor
        self.max_length = max_length

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [images_of(record) for record in records]
        batch = self.processor.apply_chat_template(
            [messages_of(record) for record in records],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors=None,  # tensors only at the end: transformers finds the answers in lists much faster
            processor_kwargs={"images": images if any(images) else None, "padding_side": "right"},
        ).convert_to_tensors("pt")
        answers = batch.pop("assistant_masks").bool()
        for record, length, answer in zip(records, batch["attention_mask"].sum(-1), answers, strict=True):
            if length > self.max_length:
                raise ValueError(f"Record {record['id']} has {int(length)} tokens, more than {self.max_length}.")
            if not answer.any():
                raise ValueError(f"Record {record['id']} has no answer to learn from.")
        return {**batch, "labels": batch["input_ids"].masked_fill(~answers, IGNORED)}
