"""The loss of training: the head is computed only where a token is learned, and other logits never exist."""

from types import MethodType
from typing import Any

from torch import Tensor

from ..modeling_ms_resampler import MSResamplerCausalLMOutputWithPast
from .collate import IGNORED


def skip_unlearned(model: Any) -> None:
    """Makes a MSResamplerForConditionalGeneration's forward return only the loss, without logits."""

    def forward(self: Any, labels: Tensor, num_items_in_batch: Any = None, **inputs: Any) -> Any:
        outputs = self.model(prompt_mask=labels == IGNORED, **inputs)
        hidden = outputs.last_hidden_state[:, :-1]
        targets = self.words_only(labels, outputs.kept_positions)[:, 1:]
        learned = targets != IGNORED
        loss = self.loss_function(
            logits=self._logits(hidden[learned]),
            labels=None,
            vocab_size=self.config.text_config.vocab_size,
            num_items_in_batch=num_items_in_batch,
            shift_labels=targets[learned],
        )
        return MSResamplerCausalLMOutputWithPast(loss=loss)

    model.forward = MethodType(forward, model)
