"""`ms-resampler init`: assembles a model from a vision tower, a language model and a new projector."""

import argparse
from pathlib import Path

from .arguments import assignment, count_or_grid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `init`."""
    parser.add_argument("--vision", required=True, metavar="ID", help="folder or Hub repository of the vision tower")
    parser.add_argument(
        "--llm",
        required=True,
        metavar="ID",
        help="folder or Hub repository of the language model, a .gguf file, or an installed package that holds one",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder for the model")
    parser.add_argument("--projector", metavar="TYPE", help="the projector's type (default: ms_resampler)")
    parser.add_argument(
        "--visual-tokens",
        type=count_or_grid,
        metavar="N",
        help="visual tokens per picture: a count, or a grid such as 12x12",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=assignment,
        metavar="FIELD=VALUE",
        help="another field of the projector, its value as JSON: hidden_size=512, scope_sigmas=[0.5,null]; repeatable",
    )
    parser.add_argument(
        "--vision-feature-layer",
        type=int,
        nargs="+",
        metavar="N",
        help="tower layers to read, concatenated if several (default: the last but one; the last of a ConvNeXt)",
    )
    parser.add_argument(
        "--vision-prefix-tokens",
        type=int,
        metavar="N",
        help="tokens before the tower's patches, which are dropped (default: the number its type has)",
    )
    parser.add_argument("--image-token", default="<image>", metavar="TOKEN", help="reused if the tokenizer has it")
    parser.add_argument(
        "--chat-template", metavar="NAME", help="chatml, vicuna or a file (default: the language model's)"
    )
    parser.add_argument(
        "--visual-words", type=Path, metavar="FILE", help="words, one a line, that visual tokens are mixtures of"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the projector's random weights (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Assembles and saves the model, and prints a summary."""
    from transformers.utils import logging

    from ms_resampler.assembly import init, parameter_table

    logging.set_verbosity_error()
    named = {"projector_type": arguments.projector, "visual_tokens": arguments.visual_tokens}
    layers = arguments.vision_feature_layer
    assembled = init(
        arguments.vision,
        arguments.llm,
        arguments.out,
        projector={name: value for name, value in named.items() if value is not None} | dict(arguments.set),
        vision_feature_layer=layers[0] if layers and len(layers) == 1 else layers,
        vision_prefix_tokens=arguments.vision_prefix_tokens,
        image_token=arguments.image_token,
        chat_template=arguments.chat_template,
        visual_words=arguments.visual_words and arguments.visual_words.read_text(encoding="utf-8").split(),
        seed=arguments.seed,
    )
    print(parameter_table(assembled.model))
    print("\n".join(assembled.notes))
    print(f"The model is in {arguments.out}. Next: ms-resampler data check DATA.json --model {arguments.out}")
    return 0
