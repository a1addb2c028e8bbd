"""Answerers: a loaded model, or one behind an OpenAI-compatible address."""

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

Budget = int | str | tuple[int, int]


class Answerer(Protocol):
    """Encodes pictures once, and answers prompts about them greedily."""

    def encode(self, pictures: Sequence[Any]) -> list[Any]:
        """Encodes pictures for `answer`. Raises ValueError if one cannot be read."""

    def answer(self, prompts: Sequence[str], pictures: Sequence[Sequence[Any]], max_new_tokens: int) -> list[str]:
        """The replies to prompts, each preceded by some encoded pictures."""

    def visual_tokens(self, encoded: Any) -> int | None:
        """The number of visual tokens of an encoded picture; None if unknown."""


class EncodedPicture(NamedTuple):
    """A picture's visual tokens (M, T), their text, and those of them that the reducer mustdrop always keeps."""

    tokens: Any
    text: str
    key_set: Any = None


class LocalModel:
    """An MS-Resampler model and its processor.

    budget: visual tokens per picture; tiles: see MSResamplerProcessor; reducer: see `set_reducer`. None is the model's
    own.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        budget: Budget | None = None,
        reducer: Mapping[str, Any] | None = None,
        tiles: Any = None,
    ):
        if reducer is not None:
            model.set_reducer(**reducer)
        self.model, self.processor = model.eval(), processor
        asked = {"visual_tokens": budget, "tiles": tiles}
        self.options = {name: value for name, value in asked.items() if value is not None}

    @classmethod
    def load(
        cls,
        model_id: str,
        revision: str | None,
        budget: Budget | None,
        device: Any,
        reducer: Mapping[str, Any] | None = None,
        tiles: Any = None,
    ) -> "LocalModel":
        """Loads a model from a folder or Hub repository on a device; packed on the CPU."""
        from transformers.utils import logging

        from .. import MSResamplerForConditionalGeneration, MSResamplerProcessor

        logging.disable_progress_bar()
        processor = MSResamplerProcessor.from_pretrained(model_id, revision=revision)
        model = MSResamplerForConditionalGeneration.from_pretrained(model_id, revision=revision, dtype="auto")
        return cls(model.eval().to(device).pack_weights(), processor, budget, reducer, tiles)

    def encode(self, pictures: Sequence[Any]) -> list[Any]:
        """What the model made of each picture: its visual tokens (M, T), and which of them the reducer always keeps."""
        import torch

        inputs = self.processor(images=list(pictures), return_tensors="pt", **self.options)
        inputs = inputs.to(self.model.device, self.model.dtype)
        with torch.inference_mode():
            images = self.model.get_image_features(**inputs, return_dict=True)
        key_sets = images.key_sets or [None] * len(images.pooler_output)
        token, texts = self.processor.image_token, []
        for number, tokens in enumerate(images.pooler_output):
            whole = self.processor.replace_image_token(inputs, number)
            texts.append(whole if whole.count(token) == len(tokens) else token * len(tokens))  # fewer after a reducer
        return list(map(EncodedPicture, images.pooler_output, texts, key_sets))

    def answer(self, prompts: Sequence[str], pictures: Sequence[Sequence[Any]], max_new_tokens: int) -> list[str]:
        """Greedy replies, decoded as one batch."""
        import torch

        from ..modeling_ms_resampler import MSResamplerImageFeatures

        inputs = self.tokenize(prompts, pictures).to(self.model.device)
        features = [picture for group in pictures for picture in group]
        key_sets = [picture.key_set for picture in features if picture.key_set is not None]
        images = MSResamplerImageFeatures(pooler_output=[p.tokens for p in features], key_sets=key_sets or None)
        encoded = {"mm_encoder_outputs": {"image": images}}
        with torch.inference_mode():
            ids = self.model.generate(
                **inputs,
                **(encoded if features else {}),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
            )
        replies = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [reply.strip() for reply in replies]

    def tokenize(self, prompts: Sequence[str], pictures: Sequence[Sequence[Any]]) -> Any:
        """Tokenized prompts, with an image token for each visual token of a picture.

        The processor itself would process every picture again for every question about it.
        """
        token = self.processor.image_token
        # An image token in a question is plain text.
        prompts = [prompt.replace(token, token.strip("<>")) for prompt in prompts]
        messages = [
            [{"role": "user", "content": [*[{"type": "image"}] * len(group), {"type": "text", "text": prompt}]}]
            for prompt, group in zip(prompts, pictures, strict=True)
        ]
        texts = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        expanded = []
        for text, group in zip(texts, pictures, strict=True):
            first, *others = text.split(token)
            assert len(others) == len(group), f"the chat template wrote {len(others)} images for {len(group)}"
            parts = (picture.text + other for picture, other in zip(group, others, strict=True))
            expanded.append(first + "".join(parts))
        beginning = self.processor.tokenizer.bos_token
        has_beginning = beginning is not None and expanded[0].startswith(beginning)
        return self.processor.tokenizer(
            expanded,
            padding=True,
            add_special_tokens=not has_beginning,
            return_tensors="pt",
            return_token_type_ids=False,
        )

    def visual_tokens(self, encoded: Any) -> int | None:
        """Counted."""
        return len(encoded.tokens)


class ServedModel:
    """A model behind an OpenAI-compatible address, as `transformers serve`, vLLM and SGLang offer it.

    The budget is sent with every request, in the form that `transformers serve` passes to the processor: one entry for
    each picture, since a bare grid would be read as the counts of two pictures.
    """

    def __init__(
        self, url: str, model: str, budget: Budget | None = None, timeout_seconds: float = 600, tiles: Any = None
    ):
        self.url, self.model, self.timeout_seconds = url.rstrip("/"), model, timeout_seconds
        self.budget, self.tiles = budget, tiles

    def encode(self, pictures: Sequence[Any]) -> list[str]:
        """The pictures as data URLs. Raises ValueError if one is not a picture."""
        return [data_url(picture) for picture in pictures]

    def answer(self, prompts: Sequence[str], pictures: Sequence[Sequence[Any]], max_new_tokens: int) -> list[str]:
        """Replies to requests that are sent concurrently. Raises ValueError if the server refuses one."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt, urls: self._ask(prompt, urls, max_new_tokens), prompts, pictures))

    def _ask(self, prompt: str, urls: Sequence[str], max_new_tokens: int) -> str:
        images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": [*images, {"type": "text", "text": prompt}]}],
            "temperature": 0.0,
            "max_tokens": max_new_tokens,
        }
        options = {"visual_tokens": self.budget and [self.budget] * len(urls), "tiles": self.tiles}
        asked = {name: value for name, value in options.items() if urls and value is not None}
        if asked:
            body["chat_template_kwargs"] = asked
        request = urllib.request.Request(
            f"{self.url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_seconds) as answer:
                message = json.load(answer)["choices"][0]["message"]
        except urllib.error.HTTPError as error:
            with error:
                said = error.read().decode(errors="replace")[:300]
            raise ValueError(f"{self.url} answered {error.code}: {said}") from error
        return (message["content"] or "").strip()

    def visual_tokens(self, encoded: Any) -> int | None:
        """Only the server knows."""
        return None


def data_url(picture: Any) -> str:
    """A picture (path, bytes, base64) as a data URL. Raises ValueError if it is not one that can be read."""
    import io

    from PIL import Image, UnidentifiedImageError

    if isinstance(picture, str):
        picture = base64.b64decode(picture)
    content = picture.read_bytes() if isinstance(picture, Path) else picture
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            kind = image.get_format_mimetype() or "image/png"
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"The picture cannot be read: {error}") from error
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
