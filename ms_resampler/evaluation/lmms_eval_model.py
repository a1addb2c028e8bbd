"""The model class that lmms-eval finds by an entry point of this package (group `lmms_eval.models`).

lmms_eval --model ms_resampler --model_args pretrained=REPO,visual_tokens=36 --tasks pope --batch_size 16
"""

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from .answering import LocalModel

NAME = "ms_resampler"


def manifest() -> ModelManifest:
    """What lmms-eval's registry asks for."""
    return ModelManifest(NAME, simple_class_path=f"{__name__}.MSResamplerForLmmsEval")


class MSResamplerForLmmsEval(lmms):
    """Answers lmms-eval's requests greedily, in batches; pictures come before the text.

    visual_tokens, tiles: a count, or a grid such as "4x9". Raises ValueError for unknown arguments.
    """

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        visual_tokens: int | str | None = None,
        tiles: int | str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        **unknown: Any,
    ):
        super().__init__()
        unknown.pop("max_batch_size", None)  # lmms-eval passes it to every model
        if unknown:
            raise ValueError(f"The model ms_resampler does not know {', '.join(sorted(unknown))}.")
        accelerator = Accelerator()
        self._rank, self._world_size, self.accelerator = (
            accelerator.process_index,
            accelerator.num_processes,
            accelerator,
        )
        self.batch_size = int(batch_size)
        place = device if device and accelerator.num_processes == 1 else accelerator.device
        self.answerer = LocalModel.load(pretrained, revision, grid(visual_tokens), place, tiles=grid(tiles))

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Replies, cut at the first of the request's `until` texts."""
        replies: list[str | None] = [None] * len(requests)
        # Longest first; only requests with the same length limit share a batch.
        limits = [int(request.args[1].get("max_new_tokens", 128)) for request in requests]
        order = sorted(range(len(requests)), key=lambda place: (limits[place], -len(requests[place].args[0])))
        while order:
            batch = [place for place in order[: self.batch_size] if limits[place] == limits[order[0]]]
            order = order[len(batch) :]
            texts = self._answer([requests[place] for place in batch], limits[batch[0]])
            for place, text in zip(batch, texts, strict=True):
                replies[place] = text
                self.cache_hook.add_partial("generate_until", requests[place].args[:2], text)
        assert all(reply is not None for reply in replies)
        return [str(reply) for reply in replies]

    def _answer(self, requests: Sequence[Instance], max_new_tokens: int) -> list[str]:
        prompts, options, to_visual, documents, tasks, splits = zip(
            *(request.args for request in requests), strict=True
        )
        pictures = [
            self.answerer.encode(images) if (images := visual(self.task_dict[task][split][document])) else []
            for visual, document, task, split in zip(to_visual, documents, tasks, splits, strict=True)
        ]
        replies = self.answerer.answer(prompts, pictures, max_new_tokens)
        return [cut(reply, option.get("until", [])) for reply, option in zip(replies, options, strict=True)]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not supported: the tasks of the published tables generate."""
        raise NotImplementedError("The model ms_resampler answers generate_until tasks only.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("The model ms_resampler answers generate_until tasks only.")


def grid(given: int | str | None) -> int | tuple[int, int] | None:
    """A count as it is, and a grid such as "4x9" as (4, 9)."""
    if not isinstance(given, str):
        return given
    rows, columns = map(int, given.split("x"))
    return rows, columns


def cut(reply: str, stops: str | Sequence[str]) -> str:
    """A reply up to the first of some texts."""
    for stop in [stops] if isinstance(stops, str) else stops:
        reply = reply.split(stop)[0] if stop else reply
    return reply.strip()
