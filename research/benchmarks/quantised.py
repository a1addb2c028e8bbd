"""Memory and agreement of quantised models: the table in docs/loading.md.

    python -m research.benchmarks.quantised

The embedded checkpoint is loaded in bfloat16 and by each quantiser that is installed, on a CPU. The table has the
megabytes of its weights, the mean and the largest distance of its logits from bfloat16's (one minus the cosine of a
token's logits, over questions about held-out scenes), the share of tokens whose prediction equals bfloat16's, the
accuracy of its answers, and the largest mean distance of small random models, one for every projector.
"""

import logging
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoProcessor, BitsAndBytesConfig, CLIPVisionConfig, Qwen2Config, TorchAoConfig

from ms_resampler import TINY, MSResamplerConfig, MSResamplerForConditionalGeneration
from ms_resampler.projectors_ms_resampler import PROJECTORS, SCOPED_PROJECTORS
from ms_resampler.tiny.evaluate import questions_of, scores_of, unanswered
from ms_resampler.tiny.scenes import FAMILIES
from ms_resampler.training.conversations import images_of, messages_of

SCENES = 8  # of each family of questions
EVERY = [*SCOPED_PROJECTORS, *PROJECTORS]


def quantisers() -> dict[str, Callable[[], Any]]:
    """The installed quantisers, by their names in the table."""
    found: dict[str, Callable[[], Any]] = {
        "bitsandbytes, 8 bits": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "bitsandbytes, 4 bits (nf4)": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "bitsandbytes, 4 bits (fp4)": lambda: BitsAndBytesConfig(load_in_4bit=True),
    }
    if find_spec("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

        dtypes: Any = torch  # whose narrow types the checker does not know
        int4 = IntxWeightOnlyConfig(weight_dtype=dtypes.int4, granularity=PerGroup(32))
        found["torchao, int8 weights"] = lambda: TorchAoConfig(Int8WeightOnlyConfig())
        found["torchao, int4 weights in groups of 32"] = lambda: TorchAoConfig(int4)
    return found


def megabytes(model: Any) -> float:
    """The weights of a model as it is saved."""
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        return sum(file.stat().st_size for file in Path(saved).glob("*.safetensors")) / 1e6


def main() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at every product that it is in float16
    processor = AutoProcessor.from_pretrained(TINY)
    asked = [one for family in FAMILIES for one in questions_of(family, "test", SCENES)]
    whole = MSResamplerForConditionalGeneration.from_pretrained(TINY, dtype=torch.bfloat16).eval()
    expected = said(whole, processor, asked)
    print("| weights | MB | mean distance | largest | same next token | accuracy | every projector |")
    print("|---|---|---|---|---|---|---|")
    for name, config in {"bfloat16": lambda: None, **quantisers()}.items():
        model = MSResamplerForConditionalGeneration.from_pretrained(
            TINY, quantization_config=config(), dtype=torch.bfloat16
        )
        logits = said(model, processor, asked)
        distances = (1 - cosine_similarity(logits, expected, dim=-1)).clamp(min=0)
        same = (logits.argmax(-1) == expected.argmax(-1)).float().mean()
        right = sum(scores_of(model, processor, asked, batch_size=len(asked))) / len(asked)
        print(
            f"| {name} | {megabytes(model):.1f} | {distances.mean():.1e} | {distances.max():.1e} | {same:.1%} "
            f"| {right:.1%} | {max(map(distance_with, EVERY, repeat(config))):.1e} |",
            flush=True,
        )


@torch.no_grad()
def said(model: Any, processor: Any, asked: list[Any]) -> torch.Tensor:
    """Logits (n, vocabulary) at every token of the questions, one at a time."""
    logits = []
    for scene, question, shown in asked:
        record = unanswered(scene, question, shown, blind=False)
        inputs = processor.apply_chat_template(
            [messages_of(record)],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"images": [images_of(record)]},
        )
        logits.append(model(**inputs).logits[0].float())
    return torch.cat(logits)


@torch.no_grad()
def distance_with(kind: str, quantiser: Callable[[], Any]) -> float:
    """The mean distance of a small random model with a projector."""
    torch.manual_seed(0)
    half = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}
    tokens = [4, 4] if kind == "mlp" else [2, 2]
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256}
    config = MSResamplerConfig(
        vision_config=CLIPVisionConfig(image_size=56, patch_size=14, **half),
        text_config=Qwen2Config(vocab_size=512, num_key_value_heads=4, **half),
        projector_config={"projector_type": kind, "query_grid": tokens, "visual_tokens": tokens, **sizes},
        image_token_id=511,
    )
    ids = torch.tensor([[5, *[511] * (tokens[0] * tokens[1]), *range(10, 20)]])
    images = torch.randn(1, 3, 56, 56)
    with tempfile.TemporaryDirectory() as folder:
        MSResamplerForConditionalGeneration(config).save_pretrained(folder)
        ours, whole = (
            MSResamplerForConditionalGeneration.from_pretrained(
                folder, quantization_config=config, dtype=torch.bfloat16
            )(input_ids=ids, pixel_values=images).logits.float()
            for config in (quantiser(), None)
        )
    return max(0.0, 1 - cosine_similarity(ours, whole, dim=-1).mean().item())


if __name__ == "__main__":
    main()
