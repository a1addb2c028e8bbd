"""`ms-resampler plan`: what a recipe takes of memory and time on given hardware, before it runs."""

import argparse
import math
from typing import Any

from ..assembly import Components, make_config, text_config_of, tower_config_of
from ..configuration_ms_resampler import MSResamplerConfig
from ..folders import model_or_embedded
from ..towers_ms_resampler import pair
from .command import add_recipe_changes, changed_recipe
from .memory import BatchShape, Sizes, device_bytes, step_sizes
from .recipes import RECIPES, Recipe
from .run import share_batch
from .step_time import Measurement, measure

GB = 1e9
CONTEXT = 1e9  # what CUDA and its libraries take before the first tensor, about


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `plan`."""
    parser.add_argument("recipe", choices=RECIPES, metavar="RECIPE", help="see ms-resampler train --list")
    parser.add_argument("--model", help="folder or Hub name of the model; only its configuration is read")
    parser.add_argument("--vision", help="instead of a model: folder or Hub name of a vision tower")
    parser.add_argument("--llm", help="and of a language model")
    parser.add_argument("--visual-tokens", type=int, default=144, help="of these two (default: 144)")
    parser.add_argument("--gpus", type=int, default=1, help="devices over all machines (default: 1)")
    parser.add_argument("--memory", type=float, default=80, help="GB of each device (default: 80)")
    parser.add_argument("--launcher", choices=["ddp", "fsdp2", "zero2", "zero3"], help="default: ddp for one device")
    parser.add_argument("--device-batch-size", type=int, help="records on a device at a time")
    parser.add_argument("--length", type=int, help="tokens of a record (default: the longest the recipe takes)")
    parser.add_argument("--records", type=int, help="of the data, for the time of the whole run")
    parser.add_argument("--measure", action="store_true", help="run a few steps here, with random weights")
    add_recipe_changes(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan."""
    recipe, config = changed_recipe(arguments), model_config(arguments)
    launcher = arguments.launcher or ("ddp" if arguments.gpus == 1 else "fsdp2")
    device_batch, accumulation = share_batch(recipe, arguments.gpus, arguments.device_batch_size)
    shape = BatchShape(device_batch, arguments.length or recipe.max_length, config.tower.image_size)
    if shape.length > recipe.max_length:
        raise ValueError(f"The recipe takes records of {recipe.max_length} tokens at most: change --max-length, too.")
    sizes = step_sizes(config, recipe, shape, launcher)
    kinds = device_bytes(sizes, recipe, launcher, arguments.gpus)
    print(parameter_table(sizes, recipe))
    print()
    print(memory_table(kinds, shape, arguments.memory))
    print()
    print(tokens(config, recipe, shape))
    if arguments.measure:
        measurement = measure(config, recipe, shape, accumulation)
        print(measured(measurement, kinds, recipe, arguments))
    return 0


def model_config(arguments: argparse.Namespace) -> Any:
    """The model's configuration, or one made of a tower's and a language model's."""
    if arguments.model:
        return MSResamplerConfig.from_pretrained(model_or_embedded(arguments.model))
    if not (arguments.vision and arguments.llm):
        raise ValueError("Name a --model, or a --vision tower and an --llm.")
    components = Components(arguments.vision, arguments.llm, {"visual_tokens": arguments.visual_tokens})
    return make_config(components, tower_config_of(arguments.vision), text_config_of(arguments.llm), image_token_id=0)


def parameter_table(sizes: Sizes, recipe: Recipe) -> str:
    """Parts, parameters and learning rates."""
    rows = [f"{'part':12}{'parameters':>14}{'trainable':>14}  rate"]
    for part, count in sizes.parts.items():
        rate = getattr(recipe.rates, part)
        total = count["trainable"] + count["frozen"]
        rows.append(f"{part:12}{total / 1e6:>12,.1f} M{count['trainable'] / 1e6:>12,.1f} M  {rate or 'frozen'}")
    return "\n".join(rows)


def memory_table(kinds: dict[str, float], shape: BatchShape, memory: float) -> str:
    """Gigabytes on each device, and whether they fit."""
    notes = {
        "gathered": "layers gathered, or buckets of gradients",
        "activations": f"{shape.records} records of {shape.length} tokens at a time",
    }
    rows = [f"{'memory':12}{'GB a device':>14}"]
    rows += [f"{kind:12}{size / GB:>14.2f}  {notes.get(kind, '')}".rstrip() for kind, size in kinds.items() if size]
    total = sum(kinds.values())
    spare = memory - (total + CONTEXT) / GB
    verdict = (
        f"fits into {memory:g} GB, {spare:.1f} to spare (CUDA itself takes about 1)"
        if spare >= 0
        else (f"does not fit into {memory:g} GB: lower --device-batch-size, or take --liger or more --gpus")
    )
    return "\n".join([*rows, f"{'total':12}{total / GB:>14.2f}  {verdict}"])


def tokens(config: Any, recipe: Recipe, shape: BatchShape) -> str:
    """Tokens of a step, and what the projector saves."""
    patches = config.native_patch_grid[0] * config.native_patch_grid[1]
    rows, columns = config.token_grid(pair(shape.image_size))
    return (
        f"A step has {recipe.batch_size} records, up to {recipe.batch_size * shape.length:,} tokens. An image is "
        f"{rows * columns} visual tokens of {patches} patches: {1 - rows * columns / patches:.0%} fewer."
    )


def measured(measurement: Measurement, kinds: dict[str, float], recipe: Recipe, arguments: argparse.Namespace) -> str:
    """What was measured here, beside the estimate, and what a run would take on so many such devices."""
    records = arguments.records
    peak, estimate = measurement.peak_bytes / GB, sum(kinds.values()) / GB
    lines = [f"Measured here, on one {measurement.device}: {peak:.2f} GB at most."]
    if arguments.gpus == 1:
        lines[0] += f" The estimate is {estimate:.2f} GB."
    lines.append(
        f"On {arguments.gpus} of these a step takes {measurement.step_seconds:.2f} s, their communication left out."
    )
    steps = recipe.steps or (records and math.ceil(recipe.epochs * records / recipe.batch_size))
    if steps:
        lines.append(f"{steps:,} steps take {duration(steps * measurement.step_seconds)}.")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever fits."""
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
