"""`ms-resampler chat`: a question about pictures or a video, answered in the terminal."""

import argparse
import json
from functools import partial
from typing import Any

from .arguments import add_reducer_arguments, add_tiles_argument, budget, reducer_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `chat`."""
    parser.add_argument("question", help="what to ask")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; repeat for several")
    parser.add_argument("--video", metavar="FILE", help="a video, which needs PyAV")
    frames = parser.add_mutually_exclusive_group()
    frames.add_argument("--num-frames", type=int, metavar="N", help="frames of the video that are read (default: 16)")
    frames.add_argument("--fps", type=float, metavar="N", help="frames a second that are read instead")
    parser.add_argument("--model", help="folder or Hub repository (default: the embedded checkpoint)")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument(
        "--visual-tokens",
        type=budget,
        metavar="N",
        help="visual tokens per picture or video: a count such as 36, or 4x9, or auto (default: the model's)",
    )
    parser.add_argument(
        "--visual-tokens-total", type=int, metavar="N", help="visual tokens of all pictures together, shared among them"
    )
    add_tiles_argument(parser)
    add_reducer_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer, in tokens")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the bare answer")


def run(arguments: argparse.Namespace) -> int:
    """Answers the question; streams the words unless JSON is requested."""
    if not arguments.image and arguments.video is None:
        raise ValueError("Give a picture with --image, or a video with --video.")
    from transformers.utils import logging

    from ms_resampler.answers import ask
    from ms_resampler.folders import model_or_embedded

    logging.disable_progress_bar()
    answer = ask(
        arguments.question,
        arguments.image,
        arguments.model,
        revision=arguments.revision,
        visual_tokens=arguments.visual_tokens,
        visual_tokens_total=arguments.visual_tokens_total,
        tiles=arguments.tiles,
        video=arguments.video,
        num_frames=arguments.num_frames,
        fps=arguments.fps,
        reducer=reducer_of(arguments),
        max_new_tokens=arguments.max_new_tokens,
        scopes=arguments.json,
        on_text=None if arguments.json else partial(print, end="", flush=True),
    )
    if arguments.json:
        told = {"answer": answer.text, "model": model_or_embedded(arguments.model)}
        told |= about_pictures([*arguments.image, *([arguments.video] if arguments.video else [])], answer)
        print(json.dumps(told | {"milliseconds": round(answer.milliseconds)}))
    else:
        print()
    return 0


def about_pictures(files: list[str], answer: Any) -> dict[str, Any]:
    """Visual tokens and, if there are scopes, their mean weights: over all pictures, and for each."""
    counts, together = answer.visual_tokens, sum(answer.visual_tokens)
    images = [{"file": file, "visual_tokens": count} for file, count in zip(files, counts, strict=True)]
    if answer.scope_weights is None:
        return {"visual_tokens": together, "images": images}
    means = dict.fromkeys(answer.scope_weights[0], 0.0)
    for image, weights in zip(images, answer.scope_weights, strict=True):
        image["scope_weights"] = {scope: round(weight, 4) for scope, weight in weights.items()}
        for scope, weight in weights.items():
            means[scope] += weight * image["visual_tokens"] / together
    rounded = {scope: round(mean, 4) for scope, mean in means.items()}
    return {"visual_tokens": together, "scope_weights": rounded, "images": images}
