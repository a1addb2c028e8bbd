"""`ms-resampler plan`: estimates the memory and time of a recipe."""

import argparse

from .train import LAUNCHERS, add_recipe_changes, changed_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `plan`."""
    parser.add_argument("recipe", metavar="RECIPE", help="name of the recipe: see ms-resampler train --list")
    parser.add_argument("--model", help="folder or Hub name of the model; only its configuration is read")
    parser.add_argument("--vision", help="instead of --model: folder or Hub name of a vision tower")
    parser.add_argument("--llm", help="with --vision: folder or Hub name of a language model")
    parser.add_argument(
        "--visual-tokens", type=int, default=144, help="visual tokens per image for --vision and --llm (default: 144)"
    )
    parser.add_argument("--gpus", type=int, help="GPUs over all machines (default: this machine, as it is)")
    parser.add_argument("--memory", type=float, help="GB of each GPU (default: 80)")
    parser.add_argument("--launcher", choices=LAUNCHERS, help="default: ddp for one device, fsdp2 for several")
    parser.add_argument("--device-batch-size", type=int, help="records on a device at a time")
    parser.add_argument("--length", type=int, help="tokens of a record (default: the recipe's longest)")
    parser.add_argument("--records", type=int, help="records in the data, for the time of the whole run")
    parser.add_argument("--measure", action="store_true", help="time a few steps here, with random weights")
    add_recipe_changes(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan."""
    from ms_resampler.training.estimate import plan

    made = plan(
        changed_recipe(arguments),
        model=arguments.model,
        vision=arguments.vision,
        llm=arguments.llm,
        visual_tokens=arguments.visual_tokens,
        gpus=arguments.gpus,
        memory=arguments.memory,
        launcher=arguments.launcher,
        device_batch=arguments.device_batch_size,
        length=arguments.length,
        records=arguments.records,
        measure=arguments.measure,
    )
    print(made)
    return 0
