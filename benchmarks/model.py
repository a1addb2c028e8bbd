"""The whole model against LLaVA, the same tower and language model in both: CLIP-L/14-336 and Qwen2.5-0.5B's shapes.

    python benchmarks/model.py                           one image, budgets of 144, 64 and 36 visual tokens
    python benchmarks/model.py --images 4 --repeats 3

Weights are random: times do not depend on them. Prints one markdown table: the prompt's tokens, milliseconds to the
first token (image included) and for each further one, medians of interleaved repeats and their spread, relative to
transformers' LlavaForConditionalGeneration with its 576 tokens an image in the same run.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

from ms_resampler import MSResamplerConfig, MSResamplerForConditionalGeneration
from ms_resampler.evaluation.timing import interleaved, machine

WORDS = 64  # tokens of text in the prompt
TOWER = {
    "image_size": 336,
    "patch_size": 14,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
LANGUAGE_MODEL = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def make_models(tower: dict, language_model: dict) -> tuple[nn.Module, nn.Module]:
    """LLaVA and ours, around one tower and one language model."""
    vision, text = CLIPVisionConfig(**tower), Qwen2Config(**language_model)
    image_token = text.vocab_size - 1
    torch.manual_seed(0)
    parts = {"vision_config": vision, "text_config": text, "image_token_id": image_token}
    llava = LlavaForConditionalGeneration(LlavaConfig(**parts)).eval()
    config = MSResamplerConfig(**parts)
    with torch.device("meta"):
        ours = MSResamplerForConditionalGeneration(config).eval()
    ours.model.projector.to_empty(device="cpu").apply(ours._init_weights)
    ours.model.vision_tower, ours.model.language_model = llava.model.vision_tower, llava.model.language_model
    ours.lm_head = llava.lm_head
    return llava, ours


def make_prompt(model: nn.Module, images: int, visual_tokens: int) -> dict[str, Tensor]:
    """Images, each with its placeholders, and words after them."""
    image_token = model.config.image_token_id
    side = model.config.vision_config.image_size
    words = torch.randint(10, 1000, (1, WORDS))
    return {
        "input_ids": torch.cat([torch.full((1, images * visual_tokens), image_token), words], dim=1),
        "attention_mask": torch.ones(1, images * visual_tokens + WORDS, dtype=torch.long),
        "pixel_values": torch.randn(images, 3, side, side),
    }


def make_runs(llava: nn.Module, ours: nn.Module, images: int, budgets: list[int], new_tokens: int) -> dict:
    """For every contender a run that generates so many tokens."""
    vision = ours.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    prompts = {f"LLaVA, {patches}": (llava, make_prompt(llava, images, patches))}
    for budget in budgets:
        side = round(budget**0.5)
        prompt = make_prompt(ours, images, side * side) | {"token_grids": torch.tensor([[side, side]] * images)}
        prompts[f"ours, {budget}"] = ours, prompt

    def run(model: nn.Module, prompt: dict[str, Tensor]) -> Callable[[], object]:
        exact = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        return lambda: model.generate(**prompt, **exact, pad_token_id=0)

    return {name: run(*contender) for name, contender in prompts.items()}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--budgets", type=int, nargs="+", default=[144, 64, 36])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    llava, ours = make_models(TOWER, LANGUAGE_MODEL)
    first, more = (
        interleaved(make_runs(llava, ours, arguments.images, arguments.budgets, tokens), arguments.repeats)
        for tokens in (1, 9)
    )
    print(f"{machine()}; float32, {arguments.images} image(s), {WORDS} words\n")
    print(
        "| model, visual tokens | first token, ms | spread | x LLaVA | each further token, ms |\n|---|---|---|---|---|"
    )
    base = statistics.median(next(iter(first.values())))
    for name, spent in first.items():
        median = statistics.median(spent)
        further = (statistics.median(more[name]) - median) / 8
        print(
            f"| {name} | {median:.0f} | {min(spent):.0f} to {max(spent):.0f} | {median / base:.2f} | {further:.0f} |",
        )


if __name__ == "__main__":
    main()
