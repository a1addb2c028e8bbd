"""MS-Resampler: the multi-scope visual resampler for multimodal LLMs.

Importing this package registers its classes with transformers' Auto classes, so that a checkpoint loads with
or without `trust_remote_code`.
"""

from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_ms_resampler import MSResamplerConfig, MSResamplerProjectorConfig
from .modeling_ms_resampler import MSResamplerForConditionalGeneration, MSResamplerModel, MSResamplerPreTrainedModel
from .processing_ms_resampler import MSResamplerProcessor

AutoConfig.register("ms_resampler", MSResamplerConfig)
AutoModel.register(MSResamplerConfig, MSResamplerModel)
for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM):
    auto_class.register(MSResamplerConfig, MSResamplerForConditionalGeneration)
AutoProcessor.register(MSResamplerConfig, MSResamplerProcessor)

__version__ = "0.1.0"
TINY = str(Path(__file__).parent / "checkpoints" / "tiny")
"""The folder of the embedded checkpoint."""

__all__ = [
    "TINY",
    "MSResamplerConfig",
    "MSResamplerForConditionalGeneration",
    "MSResamplerModel",
    "MSResamplerPreTrainedModel",
    "MSResamplerProcessor",
    "MSResamplerProjectorConfig",
]
