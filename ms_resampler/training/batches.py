"""From positions of the schedule to batches: budgets of visual tokens, bad records, and text without a picture."""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .collate import IGNORED, ConversationCollator, images_of
from .order import Budget

Record = dict[str, Any]


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

    def _batch(self, records: list[Record], collate: ConversationCollator) -> dict[str, Any]:
        blank = not any(images_of(record) for record in records)
        batch = dict(collate([*records, blank_record()] if blank else records))
        if blank:
            batch["labels"][-1] = IGNORED
        for record_id, why in collate.cut.items():
            self._note("cut", record_id, why)
        return batch | {"record_ids": [str(record["id"]) for record in records]}

    def _is_good(self, record: Record, collate: ConversationCollator) -> bool:
        try:
            collate([record])
        except ValueError as error:
            self._note("skipped", str(record["id"]), str(error))
            return False
        return True

    def _note(self, what: str, record_id: str, why: str) -> None:
        with (self.folder / f"{what}.jsonl").open("a") as file:
            file.write(json.dumps({"id": record_id, "why": why}) + "\n")


def blank_record() -> Record:
    """A white picture, and an answer that is not to be learned."""
    said = [{"from": "human", "value": "<image>\n"}, {"from": "gpt", "value": "."}]
    return {"id": "blank", "image": Image.new("RGB", (64, 64), "white"), "conversations": said}
