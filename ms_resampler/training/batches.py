"""From positions of the schedule to batches: budgets of visual tokens, bad records, and text without a picture."""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .data import IGNORED, images_of
from .schedule import Budget

Record = dict[str, Any]


class BatchMaker:
    """Collates (record, budget) pairs of one step into model inputs, labels, and `record_ids`.

    `collator(processor)` makes inputs and labels of records, and raises ValueError, with its id, for a bad one.
    `bad_records` "skip" leaves these out and writes them into the file `skipped`, one JSON object a line.

    A batch without any image gets one more row, a blank picture without labels, whose gradient is zero: tower and
    projector then run in every process at every step, as sharded training requires.
    """

    def __init__(self, collator: Callable[[Any], Callable], processor: Any, bad_records: str, skipped: Path):
        self.collator = collator
        self.processor = processor
        self.bad_records = bad_records
        self.skipped = skipped

    def __call__(self, samples: Sequence[tuple[Record, Budget | None]]) -> dict[str, Any]:
        budget = samples[0][1]
        assert all(other == budget for _, other in samples), "a batch crosses from one step into the next"
        collate = self.collator(self._processor(budget))
        records = [record for record, _ in samples]
        try:
            return self._batch(records, collate)
        except ValueError:
            if self.bad_records == "fatal":
                raise
        return self._batch([record for record in records if self._is_good(record, collate)], collate)

    def _processor(self, budget: Budget | None) -> Any:
        if budget is None:
            return self.processor
        processor = copy.copy(self.processor)
        processor.images_kwargs = {"visual_tokens": budget}
        return processor

    def _batch(self, records: list[Record], collate: Callable) -> dict[str, Any]:
        blank = not any(images_of(record) for record in records)
        batch = dict(collate([*records, blank_record()] if blank else records))
        if blank:
            batch["labels"][-1] = IGNORED
        return batch | {"record_ids": [str(record["id"]) for record in records]}

    def _is_good(self, record: Record, collate: Callable) -> bool:
        try:
            collate([record])
        except ValueError as error:
            with self.skipped.open("a") as file:
                file.write(json.dumps({"id": str(record["id"]), "why": str(error)}) + "\n")
            return False
        return True


def blank_record() -> Record:
    """A white picture, and an answer that is not to be learned."""
    said = [{"from": "human", "value": "<image>\n"}, {"from": "gpt", "value": "."}]
    return {"id": "blank", "image": Image.new("RGB", (64, 64), "white"), "conversations": said}
