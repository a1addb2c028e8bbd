"""Assembles a model from a pretrained vision tower and a pretrained language model, with a new projector.

Weights are moved, not copied: each is loaded once, in the dtype of the language model.
"""

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import cached_file

from .chat_format import ChatFormat, image_aware, packaged_template, thinking_off
from .configuration_ms_resampler import MSResamplerConfig, MSResamplerProjectorConfig, token_grid
from .folders import model_or_embedded, whole_folder
from .fusion_ms_resampler import PreFusion
from .modeling_ms_resampler import MSResamplerForConditionalGeneration
from .processing_ms_resampler import MSResamplerProcessor
from .projectors_ms_resampler import build_projector
from .towers_ms_resampler import read_tower

# The templates of this package by name, with the tokens that a tokenizer must know to use them.
TEMPLATES = {"chatml": ("<|im_start|>", "<|im_end|>"), "vicuna": ("</s>",), "honeybee": ("</s>",)}
PADDING = ("<|finetune_right_pad_id|>", "<pad>", "<unk>")  # used for padding if the tokenizer declares none
ROWS = 64  # embeddings that must grow are padded to a multiple of this, for fast matrix products


@dataclass(frozen=True)
class Components:
    """What to assemble a model from.

    Fields:
        vision, llm: folders or Hub repositories of the tower (or a whole CLIP or SigLIP) and the language model;
            the language model may be a GGUF file, or an installed package that holds one; it is dequantised.
        projector: fields of MSResamplerProjectorConfig; the budget is 144 tokens by default.
        vision_feature_layer: the tower layers to read; None is the last but one, or the last if shapes differ.
        vision_prefix_tokens: tokens before the tower's patches, which are dropped; None is the number its type has.
        image_token: the placeholder of a visual token; added to the tokenizer, unless this has it as a token of its own
            without another use.
        chat_template: "chatml", "vicuna" or a file; None is the language model's.
        visual_words: words that visual tokens are mixtures of, each one token; None leaves visual tokens free.
    """

    vision: str
    llm: str
    projector: dict[str, Any] = field(default_factory=dict)
    vision_feature_layer: int | list[int] | None = None
    vision_prefix_tokens: int | None = None
    image_token: str = "<image>"
    chat_template: str | None = None
    visual_words: Sequence[str] | None = None


@dataclass(frozen=True)
class Assembled:
    """A model, its processor, and notes on how they were assembled, one sentence each."""

    model: MSResamplerForConditionalGeneration
    processor: MSResamplerProcessor
    notes: list[str]


def init(
    vision: str | Path,
    llm: str | Path,
    out: str | Path,
    *,
    projector: dict[str, Any] | None = None,
    vision_feature_layer: int | list[int] | None = None,
    vision_prefix_tokens: int | None = None,
    image_token: str = "<image>",
    chat_template: str | None = None,
    visual_words: Sequence[str] | None = None,
    seed: int = 0,
) -> Assembled:
    """Assembles a model (see Components) in the new folder `out`; the projector has random weights drawn with `seed`.

    Raises ValueError if the folder exists, a field is wrong or the parts do not fit, OSError if one cannot be loaded.
    """
    components = Components(
        vision=str(vision),
        llm=str(llm),
        projector=projector or {},
        vision_feature_layer=vision_feature_layer,
        vision_prefix_tokens=vision_prefix_tokens,
        image_token=image_token,
        chat_template=chat_template,
        visual_words=visual_words,
    )
    with whole_folder(Path(out)) as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        assembled = assemble(components)
        assembled.model.save_pretrained(folder)
        assembled.processor.save_pretrained(folder)
    return assembled


def assemble(components: Components) -> Assembled:
    """Loads tower and language model, and connects them with a new projector.

    Raises ValueError if the parts do not fit, OSError if one cannot be loaded.
    """
    try:
        MSResamplerProjectorConfig(**components.projector)
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from error
    tower_config, text_config = tower_config_of(components.vision), text_config_of(components.llm)
    make_config(components, tower_config, text_config, image_token_id=0)  # fails early if parts do not fit
    with naming(components.vision):
        image_processor = AutoImageProcessor.from_pretrained(components.vision)
    tokenizer = load_tokenizer(components.llm)
    require_idle(components.image_token, tokenizer)
    template, template_note = choose_template(tokenizer, components)
    tokenizer.chat_template = None  # the processor saves it
    words = None if components.visual_words is None else word_ids(tokenizer, components.visual_words)

    llm = load_llm(components.llm)
    token_note = fit_embeddings(llm, tokenizer, components.image_token)
    tower = load_tower(components.vision, tower_config, llm.dtype)
    token_id = tokenizer.get_vocab()[components.image_token]
    config: Any = make_config(components, tower.config, llm.config, token_id)
    config.visual_words = words
    for part in (config.vision_config, config.text_config):
        if os.path.exists(part._name_or_path):  # a folder of this machine is nobody else's business
            part._name_or_path = ""
    processor = MSResamplerProcessor(
        image_processor,
        tokenizer,
        patch_size=config.patch_size,
        visual_tokens=config.projector_config.visual_tokens,
        video_form=config.projector_config.video_form,
        image_token=components.image_token,
        chat_template=template,
    )
    model = join(config, tower, llm)
    check_logits(model, llm)
    set_generation(model, llm, tokenizer, ChatFormat(template, tokenizer).end_token)
    notes = [template_note, token_note, check_grids(model, processor)]
    return Assembled(model.eval(), processor, notes)


def word_ids(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """The tokens of words as they stand within a sentence.

    Raises ValueError for fewer than two words, for one that comes twice, and for those that are several tokens.
    """
    ids = [tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
    if several := [word for word, tokens in zip(words, ids, strict=True) if len(tokens) != 1]:
        raise ValueError(
            f"{len(several)} visual words are more than one token of the language model: {', '.join(several[:20])}"
            f"{', ...' if len(several) > 20 else ''}. Leave them out."
        )
    tokens = [token for (token,) in ids]
    if len(tokens) < 2 or len(set(tokens)) < len(tokens):
        raise ValueError("Visual words must be two or more different ones.")
    return tokens


@contextmanager
def naming(component: str) -> Iterator[None]:
    """Turns transformers' error in loading a component into one sentence with its name."""
    try:
        yield
    except (OSError, ValueError, struct.error) as error:  # struct.error: a truncated GGUF file
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{component} cannot be loaded: {' '.join(str(error).split())}") from error


def in_transformers_terms(llm: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes for a language model: its name, or the folder and the name of a GGUF file."""
    llm = in_package(llm) or llm
    if not llm.endswith(".gguf"):
        return model_or_embedded(llm), {}
    if not Path(llm).is_file():
        raise ValueError(f"There is no file {llm}.")
    return os.path.dirname(llm) or ".", {"gguf_file": os.path.basename(llm)}


def in_package(name: str) -> str | None:
    """The GGUF file of an installed package, which is not imported; None for any other name, or if a model has it, too.

    Raises ValueError if the package does not hold exactly one.
    """
    spec = find_spec(name) if name.isidentifier() and not Path(name).exists() else None
    if spec is None or not spec.submodule_search_locations or is_on_hub(name):
        return None
    files = sorted(file for place in spec.submodule_search_locations for file in Path(place).rglob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{name} is an installed package, and must hold one .gguf file to be a model; it has {found}.")
    return str(files[0])


def is_on_hub(name: str) -> bool:
    """Whether this names a model on the Hub, or in its cache."""
    try:
        return cached_file(name, "config.json") is not None
    except OSError:
        return False


def load_tokenizer(llm: str) -> Any:
    """The language model's tokenizer, with a padding token. Raises ValueError if it has no token offsets."""
    name, gguf = in_transformers_terms(llm)
    with naming(llm):
        tokenizer = AutoTokenizer.from_pretrained(name, **gguf)
    if not tokenizer.is_fast:
        raise ValueError(f"The tokenizer of {llm} has no fast form (tokenizer.json), which training labels need.")
    if tokenizer.pad_token is None:
        known = tokenizer.get_vocab()
        tokenizer.pad_token = next((token for token in PADDING if token in known), tokenizer.eos_token)
    return tokenizer


def choose_template(tokenizer: Any, components: Components) -> tuple[str, str]:
    """The chat template, and a sentence about it: the one asked for, else the tokenizer's own, else Vicuna's.

    Raises ValueError if there is none that fits.
    """
    name, token = components.chat_template, components.image_token
    if name is None and tokenizer.chat_template is None:
        if tokenizer.eos_token != "</s>":  # that of Llama 1 and 2, and so of Vicuna
            raise ValueError(
                f"The tokenizer of {components.llm} has no chat template: give one with --chat-template "
                f"({', '.join(TEMPLATES)}, or a file)."
            )
        name = "vicuna"
    own = tokenizer.get_chat_template() if name is None else template_text(name, token, tokenizer)
    with_images = image_aware(own, token, tokenizer)
    template = thinking_off(with_images, tokenizer)
    source = "the language model's own" if name is None else name
    prelude = "" if with_images == own else ", with a prelude that takes images"
    thinking = "" if template == with_images else ", with thinking off unless `enable_thinking=True` asks for it"
    chat_format = ChatFormat(template, tokenizer)
    problem = chat_format.check_generation_prompt()
    return template, (
        f"Chat template: {source}{prelude}{thinking}; answers end with {chat_format.end_token}."
        + (f" Training needs another template: {problem}" if problem else "")
    )


def require_idle(image_token: str, tokenizer: Any) -> None:
    """Raises ValueError if the image token has another use; that in the chat template is checked with the template."""
    roles = {token: name for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    known = tokenizer.get_vocab().get(image_token)
    use = f"is the tokenizer's {roles[image_token]}" if image_token in roles else None
    if known is not None and known not in tokenizer.added_tokens_decoder:
        use = "is a piece of ordinary words"
    if use is not None:
        raise ValueError(f"{image_token} {use}, and cannot be the image token: name a new token, or one without a use.")


def template_text(name: str, image_token: str, tokenizer: Any) -> str:
    """A template of this package by name, or from a file. Raises ValueError if the tokenizer lacks its tokens."""
    if name not in TEMPLATES:
        if not Path(name).is_file():
            raise ValueError(f"There is no chat template {name!r}: give {', '.join(TEMPLATES)} or a file.")
        return Path(name).read_text(encoding="utf-8")
    missing = [token for token in TEMPLATES[name] if token not in tokenizer.get_vocab()]
    if missing:
        raise ValueError(f"The chat template {name!r} needs the token {missing[0]}, which the tokenizer does not know.")
    return packaged_template(name).replace("<image>", image_token)


def tower_config_of(vision: str) -> PretrainedConfig:
    """The configuration of a tower, or of the tower in a checkpoint like CLIP's."""
    with naming(vision):
        config = AutoConfig.from_pretrained(model_or_embedded(vision))
    return getattr(config, "vision_config", config)


def text_config_of(llm: str) -> PretrainedConfig:
    """The configuration of a language model. Raises ValueError if it is multimodal or quantized."""
    name, gguf = in_transformers_terms(llm)
    with naming(llm):
        config = AutoConfig.from_pretrained(name, **gguf)
    if config.get_text_config() is not config:
        raise ValueError(
            f"{llm} is a `{config.model_type}` model, which is more than a language model: give one of text only."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{llm} is quantized: give the model in full precision; training can quantize it later.")
    return config


def make_config(
    components: Components, vision: PretrainedConfig, text: PretrainedConfig, image_token_id: int
) -> MSResamplerConfig:
    """The model's configuration; `query_grid` defaults to the grid of the visual tokens."""
    layer = components.vision_feature_layer
    if layer is None:
        layer = -2 if len(set(read_tower(vision).states)) == 1 else -1

    def config_with(projector: dict[str, Any]) -> MSResamplerConfig:
        return MSResamplerConfig(
            vision_config=vision,
            text_config=text,
            projector_config=projector,
            image_token_id=image_token_id,
            vision_feature_layer=layer,
            vision_prefix_tokens=components.vision_prefix_tokens,
            dtype=text.dtype,
        )

    config = config_with(components.projector)
    fields = dict(components.projector)
    if fields.get("projector_type") == "mlp":
        fields.setdefault("visual_tokens", list(config.native_patch_grid))
    budget = fields.get("visual_tokens")
    if budget is not None:
        fields.setdefault("query_grid", list(token_grid(budget, config.native_patch_grid)))
    return config_with(fields)


def load_llm(llm: str) -> PreTrainedModel:
    """The language model with its head, in its stored dtype."""
    name, options = in_transformers_terms(llm)
    if options:
        options["quantization_config"] = GgufConfig(dequantize=True)
    with naming(llm):
        model, info = AutoModelForCausalLM.from_pretrained(name, dtype="auto", output_loading_info=True, **options)
    require_complete(llm, info)
    return model


def load_tower(vision: str, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The tower alone, also from a checkpoint that contains more."""
    with naming(vision):
        model, info = MODEL_MAPPING[type(config)].from_pretrained(
            vision, config=config, dtype=dtype, output_loading_info=True
        )
    require_complete(vision, info)
    return model


def require_complete(name: str, info: dict[str, Any]) -> None:
    """Raises ValueError if weights are missing from the checkpoint; a tower's unused pooler may be."""
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ValueError(f"{name} lacks {len(missing)} weights of its own architecture, such as {missing[0]}.")


@torch.no_grad()
def fit_embeddings(llm: PreTrainedModel, tokenizer: Any, image_token: str) -> str:
    """Adds the image token to the tokenizer, and rows to the embeddings if needed; returns a sentence about it.

    New rows are the mean of the old ones, so that new tokens are neither likely nor unlikely.
    """
    known = image_token in tokenizer.get_vocab()
    # Also if it is known: one that the tokenizer finds in normalised text could be typed.
    tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)], special_tokens=True)
    rows = llm.get_input_embeddings().weight.shape[0]
    about = f"Image token: {image_token}, id {tokenizer.get_vocab()[image_token]}, {'reused' if known else 'added'}"
    if len(tokenizer) <= rows:
        return f"{about}; the {rows:,} rows of embeddings have room for it."
    llm.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=ROWS, mean_resizing=False)
    for table in (llm.get_input_embeddings(), llm.get_output_embeddings()):
        for tensor in table.parameters():
            tensor[rows:] = tensor[:rows].mean(dim=0, dtype=torch.float32).to(tensor.dtype)
    return f"{about}; embeddings grew from {rows:,} to {llm.config.vocab_size:,} rows."


def join(
    config: MSResamplerConfig, tower: PreTrainedModel, llm: PreTrainedModel
) -> MSResamplerForConditionalGeneration:
    """A model made of a loaded tower, a loaded language model and a new projector."""
    with torch.device("meta"):
        model = MSResamplerForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model = llm.base_model
    model.lm_head = llm.get_output_embeddings()
    model.model.projector = build_projector(config).to(llm.dtype)
    model.model.projector.apply(model.model._init_weights)
    if model.model.fusion is not None:
        model.model.fusion = PreFusion(config)
    return model


def set_generation(model: Any, llm: PreTrainedModel, tokenizer: Any, end_token: str) -> None:
    """The language model's generation settings, which also stop at the template's end token and ban the image token."""
    settings = llm.generation_config
    ends = settings.eos_token_id if settings.eos_token_id is not None else tokenizer.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    end = tokenizer.get_vocab()[end_token]
    settings.eos_token_id = [end, *(other for other in ends if other != end)]
    settings.pad_token_id = tokenizer.pad_token_id
    settings.suppress_tokens = [model.config.image_token_id]
    model.generation_config = settings


@torch.no_grad()
def check_logits(model: MSResamplerForConditionalGeneration, llm: PreTrainedModel) -> None:
    """Raises ValueError if the language model alone says something else: families may do more after their head."""
    ids = torch.arange(3)[None]
    ours, alone = (each(input_ids=ids, use_cache=False).logits.float() for each in (model, llm))
    if (ours - alone).abs().max() > 0.05 * alone.abs().max():
        raise ValueError(
            f"The language model `{llm.config.model_type}` makes its logits in a way that is not known here, and would "
            "answer wrongly; use another, such as llama, qwen3, gemma, phi or gpt2."
        )


@torch.no_grad()
def check_grids(model: MSResamplerForConditionalGeneration, processor: MSResamplerProcessor) -> str:
    """Checks that the projector can make its visual tokens from a square picture; returns a sentence about them.

    Raises ValueError if the patches do not allow the token grid.
    """
    config: Any = model.config
    square = processor.image_processor([Image.new("RGB", (512, 512))])
    if "spatial_shapes" in square:
        height, width = map(int, square["spatial_shapes"][0])
    else:
        height, width = config.patch_grid(square["pixel_values"][0].shape[-2:])
    patches = height, width
    rows, columns = token_grid(config.projector_config.visual_tokens, patches)
    features = torch.zeros(1, patches[0] * patches[1], config.feature_width, dtype=model.dtype)
    model.model.projector(features, patches, (rows, columns))
    note = f"Visual tokens: {rows} x {columns} = {rows * columns} of {patches[0]} x {patches[1]} patches."
    if patches != config.native_patch_grid:
        native = " x ".join(map(str, config.native_patch_grid))
        note += f" The tower was made for {native}: its positions are interpolated."
    return note


def parameter_table(model: MSResamplerForConditionalGeneration) -> str:
    """Parameters and size of each part, and which stage of training changes it."""
    parts = {
        "vision tower": (model.model.vision_tower, "frozen", "frozen"),
        "projector": (model.model.projector, "trained", "trained"),
        **({} if model.model.fusion is None else {"pre-fusion": (model.model.fusion, "trained", "trained")}),
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
    aligned = [
        [cell.rjust(width) if column in (1, 2) else cell.ljust(width) for column, (cell, width) in enumerate(cells)]
        for cells in (zip(row, widths, strict=True) for row in rows)
    ]
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def size_of(parameters: Iterable[torch.nn.Parameter]) -> tuple[str, str]:
    """How many parameters, and megabytes on disk."""
    counts = [(p.numel(), p.nbytes) for p in parameters]
    return f"{sum(count for count, _ in counts):,}", f"{sum(size for _, size in counts) / 1e6:,.2f} MB"
