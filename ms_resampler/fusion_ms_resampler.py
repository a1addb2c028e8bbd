"""LLaVA-Mini's pre-fusion (Zhang et al., 2025; arXiv 2501.03895): text reads all patches before the language model.

Decoder layers of the language model's kind, trained with the projector, run over [patches, visual tokens, text]. Their
outputs at the visual tokens and at the text's words take the places of both in the language model's input, so that
few visual tokens are enough. Words that are decoded later are not fused.

Shapes are named as in resampler_ms_resampler.py; L is the length of the text.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel


class PreFusion(nn.Module):
    """`fusion_layers` decoder layers with the language model's configuration, without embeddings and final norm."""

    def __init__(self, config):
        super().__init__()
        fields = config.text_config.to_dict() | {"num_hidden_layers": config.projector_config.fusion_layers}
        # One row of embeddings, which are dropped; types of layers are listed for each of the language model's.
        fields |= {"vocab_size": 1, "pad_token_id": None, "layer_types": None}
        made = type(config.text_config).from_dict(fields)
        made._attn_implementation = config.text_config._attn_implementation
        decoder = AutoModel.from_config(made)
        decoder.embed_tokens, decoder.norm = None, nn.Identity()
        self.decoder = decoder

    def forward(
        self, patches_BNT: Tensor, visual_BMT: Tensor, text_BLT: Tensor, words_BL: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fused visual tokens and text; only the words of the text are seen, and have positions."""
        x_BLT = torch.cat([patches_BNT, visual_BMT, text_BLT], dim=1)
        seen_BL = F.pad(words_BL, (x_BLT.shape[1] - words_BL.shape[1], 0), value=True)
        positions_BL = (seen_BL.long().cumsum(1) - 1).masked_fill(~seen_BL, 1)
        fused_BLT = self.decoder(
            inputs_embeds=x_BLT, attention_mask=seen_BL.long(), position_ids=positions_BL, use_cache=False
        ).last_hidden_state
        return fused_BLT[:, patches_BNT.shape[1] :].split([visual_BMT.shape[1], text_BLT.shape[1]], dim=1)


def words_of_prompt(
    image_tokens_BL: Tensor, attention_mask: Tensor | None = None, prompt_mask: Tensor | None = None
) -> Tensor:
    """Where a text (batch, L) has words to fuse: neither image tokens nor padding, and within the prompt.

    `prompt_mask` (batch, up to L) may end before the text does: what follows is an answer.
    """
    words_BL = ~image_tokens_BL
    if attention_mask is not None:
        if attention_mask.ndim == 4:  # of a cache of fixed size: the last word sees all others
            last_BL = attention_mask[:, 0, -1, : words_BL.shape[1]]
            attention_mask = last_BL if last_BL.dtype == torch.bool else last_BL == 0
        words_BL = words_BL & attention_mask.bool()
    if prompt_mask is not None:
        words_BL = words_BL & F.pad(prompt_mask.bool(), (0, words_BL.shape[1] - prompt_mask.shape[1]))
    return words_BL


def fuse(
    fusion: PreFusion,
    patches: list[Tensor],
    visual: list[Tensor],
    text_BLT: Tensor,
    image_tokens_BL: Tensor,
    words_BL: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Visual tokens of every image (M, T), fused with its text, and the text, the mean over its images.

    The mean is LLaVA-Mini's over the frames of a video. Images of the same sizes are batched; a text without images
    stays as it is.
    """
    counts = torch.tensor([len(tokens_MT) for tokens_MT in visual], device=text_BLT.device)
    starts_I, ends_B = counts.cumsum(0) - counts, image_tokens_BL.sum(1).cumsum(0)
    rows_I = (ends_B <= starts_I[:, None]).sum(1)  # the text of each image
    sizes = [(len(patches_NT), len(visual_MT)) for patches_NT, visual_MT in zip(patches, visual, strict=True)]
    fused = list(visual)
    sum_BLT = torch.zeros_like(text_BLT, dtype=torch.float32)
    for size in dict.fromkeys(sizes):
        group = [image for image, other in enumerate(sizes) if other == size]
        rows = rows_I[group]
        inputs = (torch.stack([tensors[image] for image in group]).to(text_BLT) for tensors in (patches, visual))
        visual_BMT, fused_BLT = fusion(*inputs, text_BLT[rows], words_BL[rows])
        for image, tokens_MT in zip(group, visual_BMT, strict=True):
            fused[image] = tokens_MT
        sum_BLT = sum_BLT.index_add(0, rows, fused_BLT.float())
    images_B = torch.zeros_like(ends_B).index_add(0, rows_I, torch.ones_like(rows_I))
    mean_BLT = (sum_BLT / images_B.clamp(min=1)[:, None, None]).to(text_BLT.dtype)
    return fused, torch.where((words_BL & (images_B > 0)[:, None])[..., None], mean_BLT, text_BLT)


__all__ = ["PreFusion", "fuse", "words_of_prompt"]
