"""MS-Resampler: the multi-scope visual resampler for multimodal LLMs.

Importing this package registers its classes with transformers' Auto classes, so that a checkpoint loads with
or without `trust_remote_code`. The functions behind the commands are imported when first used, since most need extras.
"""

from importlib import import_module
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_ms_resampler import MSResamplerConfig, MSResamplerProjectorConfig
from .folders import EMBEDDED
from .modeling_ms_resampler import MSResamplerForConditionalGeneration, MSResamplerModel, MSResamplerPreTrainedModel
from .processing_ms_resampler import MSResamplerProcessor

AutoConfig.register("ms_resampler", MSResamplerConfig)
AutoModel.register(MSResamplerConfig, MSResamplerModel)
for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM):
    auto_class.register(MSResamplerConfig, MSResamplerForConditionalGeneration)
AutoProcessor.register(MSResamplerConfig, MSResamplerProcessor)

__version__ = "0.1.0"
TINY = str(EMBEDDED)
"""The folder of the embedded checkpoint."""

# Each command's function, and the module that defines it; docs/python.md has an example of each.
FUNCTIONS = {
    "ask": "answers",
    "build_pictures": "pictures.suite",
    "build_small": "small.parts",
    "check_card": "hub_upload.card",
    "check_data": "training.data_check",
    "convert": "conversion.convert",
    "evaluate": "evaluation.run",
    "export": "hub_upload.staging",
    "init": "assembly",
    "merge": "training.merge",
    "plan": "training.estimate",
    "pull": "hub_upload.check",
    "push_space": "hub_upload.space",
    "push_to_hub": "hub_upload.push",
    "serve": "demo",
    "train": "training.run",
    "verify": "hub_upload.check",
    "write_card": "hub_upload.card",
}

__all__ = [
    "TINY",
    "MSResamplerConfig",
    "MSResamplerForConditionalGeneration",
    "MSResamplerModel",
    "MSResamplerPreTrainedModel",
    "MSResamplerProcessor",
    "MSResamplerProjectorConfig",
    *FUNCTIONS,
]


def __getattr__(name: str) -> Any:
    """A command's function, imported when it is first used."""
    if name not in FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{FUNCTIONS[name]}", __name__), name)
