"""The recipe `words`: the projector learns to say the words of captions, without the language model being run."""

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .collate import ConversationCollator, blank_record
from .conversations import BadRecord, conversation_of, naming


class WordsCollator(ConversationCollator):
    """Pixels, and each picture's share of every visual word (B, words): those in the answers count equally.

    Raises BadRecord for a record without exactly one picture, or without any of the words in its answers.
    """

    def __init__(self, processor: Any, visual_words: list[int]):
        self.processor, self.visual_words = processor, visual_words
        self.cut: dict[str, str] = {}

    def encode(self, record: dict[str, Any]) -> dict[str, Tensor]:
        """One record: `words` (1, words), and the image processor's (1, ...)."""
        with naming(record):
            conversation = conversation_of(record, self.processor.image_token)
            if len(conversation.images) != 1:
                why = f"has {len(conversation.images)} images; words are learned from one picture at a time."
                raise BadRecord("image count", record, why)
            said = [
                part["text"].lower()
                for message in conversation.messages
                if message["role"] == "assistant"
                for part in message["content"]
            ]
            tokens = set(self.processor.tokenizer(f" {' '.join(said)}", add_special_tokens=False).input_ids)
            found = torch.tensor([[float(word in tokens) for word in self.visual_words]])
            if not found.any():
                raise BadRecord("no visual word", record, "has none of the visual words in its answers.")
            row = self._process(record, self.processor.image_token, conversation.images)
            return {"words": found / found.sum(), **self.pixels(row)}

    def pixels(self, row: dict[str, Any]) -> dict[str, Tensor]:
        """What the tower reads, of what the processor makes of a picture and its text."""
        of_text = (*self.processor.tokenizer.model_input_names, "text_replacement_offsets", "offset_mapping")
        return {name: torch.from_numpy(np.stack(values)) for name, values in row.items() if name not in of_text}

    def blank(self) -> dict[str, Tensor]:
        """A white picture without words."""
        row = self._process({"id": "blank"}, self.processor.image_token, [blank_record()["image"]])
        return {"words": torch.zeros(1, len(self.visual_words)), **self.pixels(row)}

    def join(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Encoded records as one batch."""
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


class SayingWords(nn.Module):
    """Tower and projector of a model, and the loss of its visual words.

    The mean over a picture's tokens of the words' shares must be the caption's: cross-entropy.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.config = model.model, model.config

    def forward(
        self,
        words: Tensor,
        pixel_values: Tensor,
        token_grids: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        tilings: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of a batch with the shares `words` (B, words)."""
        images = self.model.get_image_features(
            pixel_values, token_grids, pixel_attention_mask, spatial_shapes, tilings=tilings, return_dict=True
        )
        said = torch.stack([weight_MW.mean(dim=0) for weight_MW in images.word_weights])
        return {"loss": -(words * said.clamp(min=1e-9).log()).sum(dim=-1).mean()}


def learner_of(model: Any, adapted: bool) -> SayingWords:
    """What the recipe trains. Raises ValueError for a model without visual words, and for adapters and sharding."""
    if not model.config.visual_words:
        raise ValueError(
            "The recipe words needs a model whose visual tokens are words: put one together with "
            "`ms-resampler init --visual-words FILE`."
        )
    if adapted:
        raise ValueError("The recipe words does not run the language model, so that it has no adapters to train.")
    if "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED")):
        raise ValueError("The recipe words trains a projector only, which need not be sharded: launch with ddp.")
    return SayingWords(model)
