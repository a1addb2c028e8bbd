"""`ms-resampler chat`: a question about one or several pictures, answered in the terminal."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from .folders import model_or_embedded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `chat`."""
    parser.add_argument("question", help="what to ask")
    parser.add_argument(
        "--image", action="append", required=True, metavar="FILE", help="a picture; repeat it for several"
    )
    parser.add_argument("--model", help="folder or Hub repository (default: the embedded checkpoint)")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument(
        "--visual-tokens",
        type=budget,
        metavar="N",
        help="visual tokens a picture: a count such as 36, or a grid such as 4x9 (default: the model's own)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="length limit of the answer")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the bare answer")


def budget(text: str) -> int | tuple[int, int]:
    """A count or a grid: "36" -> 36, "4x9" -> (4, 9)."""
    rows, by, columns = text.partition("x")
    return (int(rows), int(columns)) if by else int(rows)


def run(arguments: argparse.Namespace) -> int:
    """Answers; the words appear as they are found, unless JSON is asked for."""
    if not arguments.question.strip():
        raise ValueError("The question is empty.")
    if arguments.max_new_tokens < 1:
        raise ValueError("--max-new-tokens must be at least 1.")
    pictures = [picture_of(name) for name in arguments.image]
    model_id = model_or_embedded(arguments.model)
    model, processor = load(model_id, arguments.revision)
    started = time.perf_counter()
    inputs = prepare(model, processor, pictures, arguments.question, arguments.visual_tokens)
    features = encode(model, processor, inputs)
    answer = generate(model, processor, inputs, features, arguments.max_new_tokens, quiet=arguments.json)
    if arguments.json:
        milliseconds = round(1000 * (time.perf_counter() - started))
        about_pictures = describe(model, arguments.image, features)
        print(json.dumps({"answer": answer, "model": model_id, **about_pictures, "milliseconds": milliseconds}))
    return 0


def picture_of(name: str) -> Any:
    """What the processor opens: a URL as it is, else the path of a file. Raises ValueError if there is none."""
    if name.startswith(("http://", "https://")):
        return name
    if not Path(name).is_file():
        raise ValueError(f"There is no picture file {name!r}.")
    return Path(name)


def load(model_id: str, revision: str | None) -> tuple[Any, Any]:
    """Model and processor by this package's own code, on the GPU if there is one, else packed for the CPU."""
    import torch
    from transformers.utils import logging

    from . import MSResamplerForConditionalGeneration, MSResamplerProcessor

    logging.disable_progress_bar()
    processor = MSResamplerProcessor.from_pretrained(model_id, revision=revision)
    model = MSResamplerForConditionalGeneration.from_pretrained(model_id, revision=revision, dtype="auto")
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu").pack_weights(), processor


def prepare(model: Any, processor: Any, pictures: list[Any], question: str, visual_tokens: Any) -> Any:
    """Model inputs of one question after its pictures."""
    content = [{"type": "image", "image": picture} for picture in pictures]
    return processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={} if visual_tokens is None else {"visual_tokens": visual_tokens},
    ).to(model.device, model.dtype)


def encode(model: Any, processor: Any, inputs: Any) -> Any:
    """The pictures' visual tokens and fusion weights; takes the pixels out of the inputs."""
    import torch

    pixels = {key: inputs.pop(key) for key in list(inputs) if key not in processor.tokenizer.model_input_names}
    with torch.inference_mode():
        return model.get_image_features(**pixels, output_scopes=True, return_dict=True)


def generate(model: Any, processor: Any, inputs: Any, features: Any, max_new_tokens: int, quiet: bool) -> str:
    """The answer, printed as it grows unless `quiet`."""
    from transformers import TextStreamer

    streamer = None if quiet else TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = model.generate(
        **inputs,
        mm_encoder_outputs={"image": features},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=streamer,
    )
    new_ids = ids[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new_ids, skip_special_tokens=True).strip()


def describe(model: Any, names: list[str], features: Any) -> dict[str, Any]:
    """Visual tokens and mean fusion weights by scope: of all pictures together, and of each."""
    import torch

    scopes = model.config.projector_config.scope_names

    def means(weights_SM: torch.Tensor) -> dict[str, float]:
        return dict(zip(scopes, [round(w, 4) for w in weights_SM.float().mean(dim=-1).tolist()], strict=True))

    images = [
        {"file": name, "visual_tokens": weights.shape[-1], "scope_weights": means(weights)}
        for name, weights in zip(names, features.scope_weights, strict=True)
    ]
    return {
        "visual_tokens": sum(image["visual_tokens"] for image in images),
        "scope_weights": means(torch.cat(features.scope_weights, dim=-1)),
        "images": images,
    }
