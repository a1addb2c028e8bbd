"""`ms-resampler train`: runs a recipe on your model and data, or trains the embedded checkpoint again."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from .arguments import add_tiles_argument

PARTS = ("tower", "projector", "llm", "embeddings")
LAUNCHERS = {"ddp": "ddp.yaml", "fsdp2": "fsdp2.yaml", "zero2": "zero2.json", "zero3": "zero3.json"}
TINY_OPTIONS = ("scenes", "start", "projector", "embed")
SMALL_OPTIONS = ("recipe", "out", "seed", "embed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `train`."""
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="its name: see --list")
    parser.add_argument("--list", action="store_true", help="name the recipes, and stop")
    parser.add_argument("--show", action="store_true", help="print the complete recipe with your changes, and stop")
    parser.add_argument("--launcher", choices=LAUNCHERS, help="print the path of accelerate's settings, and stop")
    parser.add_argument("--model", help="folder or Hub name of the model to train")
    parser.add_argument(
        "--data", help="conversations: .json, .jsonl, parquet or arrow file, a folder, or a Hub repository"
    )
    parser.add_argument("--images", type=Path, help="folder that image paths in the data are relative to")
    parser.add_argument("--split", default="train", help="split of a table (default: %(default)s)")
    parser.add_argument("--streaming", action="store_true", help="read a table without storing it")
    parser.add_argument("--out", type=Path, help="folder of the run; the result is OUT/model (default: runs/RECIPE)")
    parser.add_argument("--report-to", choices=["none", "trackio", "tensorboard"], default="none")
    parser.add_argument("--device-batch-size", type=int, help="records on a device at a time (default: at most 16)")
    parser.add_argument(
        "--cache-features", type=Path, metavar="DIR", help="keep the features of a frozen tower on disk, for all epochs"
    )
    add_recipe_changes(parser)
    tiny = parser.add_argument_group("for the recipes tiny and small")
    tiny.add_argument("--scenes", type=int, default=400, help="of tiny: held-out scenes to evaluate on (default: 400)")
    tiny.add_argument(
        "--projector",
        metavar="TYPE",
        help="of tiny: train another projector, such as avg_pool, in the embedded checkpoint",
    )
    tiny.add_argument("--start", type=Path, metavar="DIR", help="of tiny: start from an earlier version in this folder")
    tiny.add_argument("--embed", action="store_true", help="copy the result into this package")


def add_recipe_changes(parser: argparse.ArgumentParser) -> None:
    """Declares the few fields of a recipe that the command line changes."""
    changes = parser.add_argument_group("changes to the recipe")
    changes.add_argument("--steps", type=int, help="steps instead of the recipe's epochs; for tiny, the most per stage")
    changes.add_argument("--epochs", type=float)
    changes.add_argument("--batch-size", type=int, help="records per step, over all devices")
    changes.add_argument(
        "--learning-rate",
        nargs="+",
        metavar="[PART=]RATE",
        help=f"of all trained parts, or of one of {', '.join(PARTS)}; `PART=frozen` freezes it",
    )
    add_tiles_argument(changes)
    changes.add_argument("--max-length", type=int, help="longest record, in tokens")
    changes.add_argument(
        "--truncate", action="store_true", default=None, help="shorten longer records, which are bad otherwise"
    )
    changes.add_argument("--shuffle-buffer", type=int, metavar="N", help="records of a stream shuffled at a time")
    changes.add_argument("--save-steps", type=int, help="steps from one checkpoint to the next")
    changes.add_argument("--workers", type=int, help="processes that prepare batches")
    changes.add_argument("--bad-records", choices=["fatal", "skip"])
    changes.add_argument("--no-bf16", dest="bf16", action="store_false", default=None, help="compute in float32")
    changes.add_argument(
        "--liger",
        action="store_true",
        default=None,
        help="use Liger's fused loss, which stores no logits (needs a GPU)",
    )
    changes.add_argument(
        "--no-activation-checkpointing",
        dest="activation_checkpointing",
        action="store_false",
        default=None,
        help="keep all activations: faster, with more memory",
    )
    changes.add_argument("--lora-rank", type=int, metavar="N", help="rank of a recipe's adapters")
    changes.add_argument("--lora-alpha", type=int, metavar="N", help="their weight: alpha / rank multiplies them")
    changes.add_argument("--lora-dropout", type=float, metavar="P", help="dropout before them")
    changes.add_argument(
        "--lora-targets",
        nargs="+",
        metavar="NAME",
        help="matrices that have them, such as q_proj v_proj (default: all)",
    )
    changes.add_argument("--seed", type=int)


def run(arguments: argparse.Namespace) -> int:
    """Prints what was asked for, or trains and prints where the result is."""
    if arguments.launcher:
        import ms_resampler

        print(Path(ms_resampler.__file__).parent / "training" / "launchers" / LAUNCHERS[arguments.launcher])
    elif arguments.list:
        from ms_resampler.training.recipes import recipe_table

        print(recipe_table())
    elif arguments.recipe is None:
        raise ValueError("Name a recipe; `ms-resampler train --list` shows them.")
    elif arguments.recipe == "tiny":
        run_tiny(arguments)
    elif arguments.recipe == "small":
        run_small(arguments)
    elif misplaced := [option(name) for name in given(arguments) if name in TINY_OPTIONS]:
        raise ValueError(f"{misplaced[0]} is an option of the recipe tiny, and the recipe here is {arguments.recipe}.")
    elif arguments.show:
        print(json.dumps(dataclasses.asdict(changed_recipe(arguments)), indent=2))
    else:
        run_recipe(arguments)
    return 0


def changed_recipe(arguments: argparse.Namespace) -> Any:
    """The recipe with the changes of the command line."""
    from ms_resampler.training.recipes import Recipe, recipe_named

    recipe = recipe_named(arguments.recipe)
    names = {field.name for field in dataclasses.fields(Recipe)}
    changes = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    changes["rates"] = changed_rates(recipe.rates, arguments.learning_rate or [])
    return dataclasses.replace(recipe, **changes, adapters=changed_adapters(recipe, arguments))


def changed_adapters(recipe: Any, arguments: argparse.Namespace) -> Any:
    """The recipe's adapters with the changes of the command line. Raises ValueError for changes to none."""
    targets = arguments.lora_targets and tuple(arguments.lora_targets)
    options = {"rank": arguments.lora_rank, "alpha": arguments.lora_alpha, "dropout": arguments.lora_dropout}
    options["targets"] = targets
    changes = {name: value for name, value in options.items() if value is not None}
    if not changes:
        return recipe.adapters
    if recipe.adapters is None:
        raise ValueError(
            f"--lora-{next(iter(changes))} is for recipes with adapters, such as instruct_lora, and {recipe.name} has "
            "none."
        )
    return dataclasses.replace(recipe.adapters, **changes)


def changed_rates(rates: Any, changes: list[str]) -> Any:
    """["1e-4", "tower=2e-6", "llm=frozen"]: all trained parts at 1e-4, the tower at its own rate, no LLM."""
    for change in changes:
        part, _, value = change.rpartition("=")
        try:
            rate = None if value == "frozen" else float(value)
        except ValueError:
            raise ValueError(
                f"{change!r} is not a learning rate: write 1e-4, projector=1e-4 or tower=frozen."
            ) from None
        if part and part not in PARTS:
            raise ValueError(f"{part!r} is not a part of a model: the parts are {', '.join(PARTS)}.")
        chosen = [part] if part else [name for name, old in vars(rates).items() if old is not None]
        rates = dataclasses.replace(rates, **dict.fromkeys(chosen, rate))
    return rates


def run_recipe(arguments: argparse.Namespace) -> None:
    """Trains your model by a recipe."""
    recipe = changed_recipe(arguments)
    if missing := [name for name in ("model", "data") if getattr(arguments, name) is None]:
        raise ValueError(f"The recipe {arguments.recipe} needs {' and '.join(f'--{name}' for name in missing)}.")
    from ms_resampler.training.run import is_main_process, train

    result = train(
        recipe,
        model=arguments.model,
        data=arguments.data,
        images=arguments.images,
        out=arguments.out,
        split=arguments.split,
        streaming=arguments.streaming,
        device_batch=arguments.device_batch_size,
        features=arguments.cache_features,
        report_to=arguments.report_to,
    )
    if is_main_process():
        print(result)


def given(arguments: argparse.Namespace) -> list[str]:
    """The names of the options that differ from their defaults."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return [name for name, default in vars(parser.parse_args([])).items() if getattr(arguments, name) != default]


def option(name: str) -> str:
    """An option as it is typed."""
    negated = name in ("bf16", "activation_checkpointing")
    return f"--{'no-' if negated else ''}{name.replace('_', '-')}"


def run_tiny(arguments: argparse.Namespace) -> None:
    """Trains the embedded checkpoint again, or another projector in it."""
    for name in given(arguments):
        if name not in ("recipe", "out", "steps", "seed", *TINY_OPTIONS):
            raise ValueError(f"The recipe tiny has its own model and data: it does not accept {option(name)}.")
    options = {"scenes": arguments.scenes, "steps": arguments.steps, "seed": arguments.seed or 0}
    options |= {"start": arguments.start, "embed": arguments.embed}
    if arguments.projector is None:
        from ms_resampler.tiny.stages import train_tiny

        train_tiny(arguments.out or "runs/tiny", **options)
    else:
        from ms_resampler.tiny.peer import train_tiny_projector

        train_tiny_projector(arguments.projector, arguments.out, **options)


def run_small(arguments: argparse.Namespace) -> None:
    """Trains the small model's projector and adapters again."""
    for name in given(arguments):
        if name not in SMALL_OPTIONS:
            raise ValueError(f"The recipe small has its own model and data: it does not accept {option(name)}.")
    from ms_resampler.small.stages import train_small

    print(train_small(arguments.out or "runs/small", seed=arguments.seed or 0, embed=arguments.embed))
