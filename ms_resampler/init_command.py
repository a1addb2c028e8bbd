"""`ms-resampler init`: a model folder from a vision tower, a language model and a fresh projector."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from .chat import budget
from .configuration_ms_resampler import MSResamplerProjectorConfig
from .folders import whole_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `init`."""
    parser.add_argument("--vision", required=True, metavar="ID", help="folder or Hub repository of the vision tower")
    parser.add_argument("--llm", required=True, metavar="ID", help="folder or Hub repository of the language model")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where to put the model: a new folder")
    parser.add_argument("--projector", metavar="TYPE", help="the projector's type (default: ms_resampler)")
    parser.add_argument(
        "--visual-tokens", type=budget, metavar="N", help="visual tokens a picture: a count, or a grid such as 12x12"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=assignment,
        metavar="FIELD=VALUE",
        help="another field of the projector, its value as JSON: hidden_size=512, scope_sigmas=[0.5,2]; repeatable",
    )
    parser.add_argument(
        "--vision-feature-layer",
        type=int,
        nargs="+",
        metavar="N",
        help="tower layers to read, joined if several (default: the last but one; a ConvNeXt's last)",
    )
    parser.add_argument("--image-token", default="<image>", metavar="TOKEN", help="reused if the tokenizer knows it")
    parser.add_argument(
        "--chat-template", metavar="NAME", help="chatml, vicuna or a file (default: the language model's own)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the projector's weights (default: 0)")


def assignment(text: str) -> tuple[str, Any]:
    """A field and its value: "hidden_size=512" -> ("hidden_size", 512); what is no JSON is a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def run(arguments: argparse.Namespace) -> int:
    """Assembles the model, saves it whole or not at all, and prints what it is."""
    import torch
    from transformers.utils import logging

    from .assembly import Components, assemble

    if arguments.out.exists():
        raise ValueError(f"{arguments.out} is there already: give a new folder, or remove it.")
    logging.set_verbosity_error()
    torch.manual_seed(arguments.seed)
    layers = arguments.vision_feature_layer
    components = Components(
        vision=arguments.vision,
        llm=arguments.llm,
        projector=projector_fields(arguments),
        vision_feature_layer=layers[0] if layers and len(layers) == 1 else layers,
        image_token=arguments.image_token,
        chat_template=arguments.chat_template,
    )
    assembled = assemble(components)
    with whole_folder(arguments.out) as folder:
        assembled.model.save_pretrained(folder)
        assembled.processor.save_pretrained(folder)
    print(parameter_table(assembled.model))
    print("\n".join(assembled.notes))
    print(f"The model is in {arguments.out}. Next: ms-resampler data check DATA.json --model {arguments.out}")
    return 0


def projector_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of the projector that the command line names. Raises ValueError if one is unknown."""
    named = {"projector_type": arguments.projector, "visual_tokens": arguments.visual_tokens}
    fields = {name: value for name, value in named.items() if value is not None} | dict(arguments.set)
    if isinstance(fields.get("visual_tokens"), tuple):
        fields["visual_tokens"] = list(fields["visual_tokens"])
    try:
        MSResamplerProjectorConfig(**fields)
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return fields


def parameter_table(model: Any) -> str:
    """Parameters and size of each part, and which stage of training changes it."""
    parts = {
        "vision tower": (model.model.vision_tower, "frozen", "frozen"),
        "projector": (model.model.projector, "trained", "trained"),
        "language model": (model.model.language_model, "frozen", "trained"),
        "output head": (model.lm_head, "frozen", "trained"),
    }
    rows: list[tuple[str, ...]] = [("", "parameters", "size", "align", "instruct")]
    seen: set[int] = set()
    for name, (part, *stages) in parts.items():
        own = [p for p in part.parameters() if id(p) not in seen]  # a head may be tied to the embeddings
        seen.update(map(id, own))
        rows.append((name, *size_of(own), *(stages if own else ["tied", "tied"])))
    rows.append(("together", *size_of(model.parameters()), "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(aligned(row, widths) for row in rows)


def size_of(parameters: Any) -> tuple[str, str]:
    """How many parameters, and megabytes on disk."""
    counted = [(p.numel(), p.numel() * p.element_size()) for p in parameters]
    numbers, bytes_ = (sum(column) for column in zip(*counted, strict=True)) if counted else (0, 0)
    return f"{numbers:,}", f"{bytes_ / 1e6:,.2f} MB"


def aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    """A line of a table: names to the left, numbers to the right, words to the left."""
    name, parameters, size, align, instruct = (
        cell.rjust(width) if column in (1, 2) else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return f"{name}  {parameters}  {size}  {align}  {instruct}".rstrip()
