"""The MS-Resampler processor: images, clips and text to model inputs, one image token for every visual token.

"<image>What is this?" and a budget of 4  ->  "<image><image><image><image>What is this?"
"""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import get_size_dict
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import ImageInput, get_image_size_for_max_height_width, make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin

from .configuration_ms_resampler import AUTO_MAP, is_grid, nearest_grid, patch_grid, token_grid
from .images_ms_resampler import is_rgb_array, open_picture
from .messages_ms_resampler import TYPED, VIDEO_TOKEN, as_typed, understood_messages
from .tiles_ms_resampler import NONE, Grid, Tiling, budgets_for, cut, grids_of, lay_out, read_tilings, share_out
from .videos_ms_resampler import (
    Clip,
    Sampling,
    Video,
    clip_grid,
    clips_in,
    of_steps,
    open_clip,
    read_sampling,
    share_of_frames,
)

BACKENDS = "transformers.image_processing_backends"  # where image processors inherit resizing and cropping from


OPTIONS: dict[str, Any] = {
    "visual_tokens": 144,
    "padding_side": "left",
    "tiles": None,
    "overview_share": 0.25,
    "tiles_apart": False,
    "auto_tokens": (36, 576),
    "newline_token": None,
    "video_form": "frames",
}
OF_IMAGES = ("visual_tokens", "visual_tokens_total", "tiles", "overview_share")  # options that are ours
OF_VIDEOS = ("num_frames", "fps", "do_sample_frames", "video_metadata")  # those of transformers that are read


class Layout(NamedTuple):
    """A picture's Tiling, or None if it is not cut, its token grid, and of a clip the steps that have such a grid."""

    tiling: Any
    grid: Grid
    steps: int = 1


class MSResamplerImagesKwargs(ImagesKwargs, total=False):
    """Image options at call time, beside the image processor's.

    visual_tokens: a count, a (rows, columns) tuple, (steps, rows, columns) of a clip, "auto", or a list with one of
        these for each picture, which is an image or a clip, in the order of the prompts.
    visual_tokens_total: for all pictures of a prompt together (of each list of images, or of a flat one).
    tiles, overview_share: see MSResamplerProcessor.
    """

    visual_tokens: int | str | tuple[int, ...] | list[int | str | tuple[int, ...] | list[int] | None] | None
    visual_tokens_total: int | None
    tiles: int | tuple[int, int] | list[int | tuple[int, int] | list[int]] | None
    overview_share: float | int | None


class MSResamplerProcessorKwargs(ProcessingKwargs, total=False):
    """Options at call time."""

    images_kwargs: MSResamplerImagesKwargs


class MSResamplerProcessor(ProcessorMixin):
    """An image processor and a tokenizer, and the budget of visual tokens.

    Fields:
        patch_size: side of a patch in pixels, the model's `config.patch_size`.
        visual_tokens: the default budget: a count, [rows, columns], None for one token per patch, or "auto": a quarter
            of the picture's patches, within the bounds `auto_tokens`.
        tiles: None; or into how many tiles a picture is cut at its own proportions: at most a count, exactly a grid
            [rows, columns], or one of a list of grids. See tiles_ms_resampler.py.
        overview_share: the share of a count of visual tokens that goes to the overview of a picture in several tiles;
            0 leaves it out.
        newline_token: of LLaVA-NeXT's layout, a token after each row of visual tokens of a picture in tiles, and at the
            end of one that is not cut. Every picture in tiles then has an overview.
        tiles_apart: whether each tile has a budget of its own, as projectors need that are made for one grid.
        video_form: how the model reads clips, its `projector_config.video_form`.
        image_token: the placeholder in the text; of a clip it is <video>.
        max_pixels: images with more are refused before they are decoded.
        padding_side: where the tokenizer pads; generation needs "left".

    Raises ValueError if the tokenizer does not have the image token, or for an unknown option.
    """

    valid_processor_kwargs = MSResamplerProcessorKwargs
    text_kwargs = {"padding": True}

    # Not keyword-only: transformers reads what to save and load from the positional names. Options of calls (OPTIONS)
    # are not named here: transformers lists them in `valid_processor_kwargs` only.
    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=14,
        image_token="<image>",
        max_pixels=100_000_000,
        chat_template=None,
        **options,
    ):
        _refuse_unknown(options, OPTIONS)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.patch_size = patch_size
        self.image_token = image_token
        self.max_pixels = max_pixels
        self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
        self.image_token_id = tokenizer.get_vocab().get(image_token)
        if self.image_token_id is None:
            raise ValueError(
                f"The tokenizer does not know the image token {image_token!r}: add it with tokenizer.add_tokens("
                f"[{image_token!r}], special_tokens=True), then resize the model's embeddings."
            )
        _drop_typed_marks(tokenizer)
        self._set(**OPTIONS | options)

    def _set(self, padding_side: str, auto_tokens: Any, **options: Any) -> None:
        self.tokenizer.padding_side = self.tokenizer.init_kwargs["padding_side"] = padding_side
        self.auto_tokens = tuple(auto_tokens)
        for name, value in options.items():
            setattr(self, name, value)

    @classmethod
    def from_args_and_dict(cls, args, processor_dict: dict[str, Any], **kwargs: Any):
        """As in transformers, but an unused option raises ValueError."""
        if not kwargs.get("return_unused_kwargs"):
            _refuse_unknown(kwargs, {*inspect.signature(cls).parameters, *OPTIONS, *_loading_options(*args)})
        # The tokenizer's file names a default side; only the caller's choice counts.
        options = {name: {**processor_dict, **kwargs}.get(name, default) for name, default in OPTIONS.items()}
        made = super().from_args_and_dict(args, processor_dict, **kwargs)
        (made[0] if isinstance(made, tuple) else made)._set(**options)
        return made

    def to_dict(self) -> dict[str, Any]:
        """What `processor_config.json` has."""
        others = {name: getattr(self, name) for name in OPTIONS if name not in ("visual_tokens", "padding_side")}
        changed = {name: value for name, value in others.items() if value != OPTIONS[name]}
        return super().to_dict() | {"visual_tokens": self.visual_tokens} | changed

    def __call__(
        self, images: ImageInput | None = None, text: str | list[str] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Model inputs for images, clips (`videos`) and prompts, which contain a placeholder for each of these.

        The tokenizer does not repeat a beginning-of-text token that a chat template has written.
        Raises ValueError for unknown options and for inputs that `validate_inputs` refuses.
        """
        self._refuse_unknown_options({name: kwargs[name] for name in kwargs if name not in ("videos", "audio")})
        if "add_special_tokens" not in {**kwargs, **kwargs.get("text_kwargs", {})}:
            written = self._start_of_text()
            starts = tuple(filter(None, (self.tokenizer.bos_token, written)))
            prompts = [text] if isinstance(text, str) else text or ()
            if all(isinstance(prompt, str) for prompt in prompts) and any(p.startswith(starts) for p in prompts):
                kwargs["add_special_tokens"] = False
                text = [prompt if prompt.startswith(starts) else written + prompt for prompt in prompts]
        return super().__call__(images=images, text=text, **kwargs)

    def _start_of_text(self) -> str:
        """The tokens that the tokenizer adds before a text, such as "<s>" or "[gMASK]<sop>"."""
        encoded = self.tokenizer("a", return_special_tokens_mask=True)
        before = encoded["input_ids"][: encoded["special_tokens_mask"].index(0)]
        return "".join(self.tokenizer.convert_ids_to_tokens(before))

    def apply_chat_template(
        self, conversation, chat_template=None, tools=None, documents=None, processor_kwargs=None, **kwargs: Any
    ):
        """The text of a conversation (or of each of several) or, with `tokenize`, its model inputs.

        Messages contain parts of text, images and clips, in the formats of transformers and OpenAI; a token of these
        that is typed in a text stays text. Options of the processor go into `processor_kwargs`.
        Raises ValueError for parts, keys and options that neither template nor processor understands.
        """
        template = self._resolve_chat_template(chat_template)
        if not conversation:
            raise ValueError("The conversation is empty.")
        batched = not isinstance(conversation[0], Mapping)
        chats = [getattr(chat, "messages", chat) for chat in conversation] if batched else [conversation]
        chats = [list(map(_as_images, understood_messages(chat, template, self.image_token))) for chat in chats]
        for name, value in {"tools": tools, "documents": documents}.items():
            if value and not _reads(template, name):
                raise ValueError(f"The chat template does not read `{name}`; leave them out.")
        processor_options, template_options = self._sorted_options(template, processor_kwargs, kwargs)
        contents = [message.get("content") for chat in chats for message in chat]
        sources = sum(
            len(part) > 1 for parts in contents if isinstance(parts, list) for part in parts if "text" not in part
        )
        if sources and processor_options.get("images"):
            raise ValueError(f"Images come in the messages ({sources} do) or in `processor_kwargs`, not in both.")
        written = super().apply_chat_template(
            chats if batched else chats[0],
            chat_template=chat_template,
            tools=as_typed(tools, self.image_token),
            documents=as_typed(documents, self.image_token),
            processor_kwargs=processor_options,
            **template_options,
        )
        if template_options.get("tokenize"):
            return written
        texts = [
            self._with_videos(text, chat) for text, chat in zip(written if batched else [written], chats, strict=True)
        ]
        return texts if batched else texts[0]

    def _with_videos(self, text: str, chat: list[dict[str, Any]]) -> str:
        """The text of a conversation, with the placeholders of clips, which the template knows as images."""
        contents = [message.get("content") for message in chat]
        parts = [part for content in contents if isinstance(content, list) for part in content if "text" not in part]
        before, *after = text.split(self.image_token)
        if len(after) != len(parts):
            return text
        tokens = [VIDEO_TOKEN if isinstance(part.get("image"), Video) else self.image_token for part in parts]
        return before + "".join(token + rest for token, rest in zip(tokens, after, strict=True))

    def _sorted_options(
        self, template: str, processor_kwargs: dict[str, Any] | None, kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Options of the processor, and those of `apply_chat_template` and the template."""
        own = inspect.signature(ProcessorMixin.apply_chat_template).parameters
        for_template = {name: value for name, value in kwargs.items() if name in own or _reads(template, name)}
        for_processor = {name: value for name, value in kwargs.items() if name not in for_template}
        for_processor.pop("enable_thinking", None)  # servers set this for every model; this one does not think
        options = (processor_kwargs or {}) | for_processor
        self._refuse_unknown_options({name: value for name, value in options.items() if name != "images"})
        return options, for_template

    def _refuse_unknown_options(self, options: dict[str, Any]) -> None:
        typed = self.valid_processor_kwargs.__annotations__
        groups = {name: {*typed[name].__annotations__} for name in typed if name.endswith("_kwargs")}
        groups["images_kwargs"] |= set(
            getattr(getattr(self.image_processor, "valid_kwargs", None), "__annotations__", ())
        )
        groups["common_kwargs"] = set().union(*groups.values())
        groups["videos_kwargs"] = set(OF_VIDEOS)
        _refuse_unknown(options, {*typed, *groups, *groups["common_kwargs"]})
        for name, known in groups.items():
            _refuse_unknown(options.get(name) or {}, known)

    @property
    def model_input_names(self) -> list[str]:
        """Names of everything that a call can return; image inputs are those that are not the tokenizer's."""
        return [*super().model_input_names, "token_grids", "tilings", "clips"]

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs: Any):
        """Opens every image (file, URL, base64, bytes, array, PIL) upright and in RGB, keeping nested lists.

        Clips are put among the images, in the order of the prompts, where their placeholders become image tokens.
        """
        images, videos, audio = (None if _is_empty(given) else given for given in (images, videos, audio))
        if videos is not None:
            images, text = self._merged(images, list(map(Video, clips_in(videos))), text)
        if images is not None:
            images = _map_nested(images, self._opener(images, kwargs.get("videos_kwargs", {}) | kwargs))
        _, *others = super().prepare_inputs_layout(images=None, text=text, videos=None, audio=audio, **kwargs)
        return images, *others

    def _opener(self, images: Any, options: Mapping[str, Any]) -> Callable[[Any], Any]:
        """What opens each of nested images and clips, in order."""
        count = sum(isinstance(item, Video) for item in _leaves(images))
        sampling = read_sampling(options) if count else Sampling()
        given = options.get("video_metadata") if count else None
        given = list(given) if isinstance(given, (list, tuple)) else [given] * count
        if len(given) != count:
            raise ValueError(f"Got {len(given)} entries in `video_metadata` for {count} clips; give one for each.")
        metadata = iter(given)

        def opened(item: Any) -> Any:
            if isinstance(item, Video):
                return open_clip(item.source, next(metadata), sampling, self.max_pixels)
            return self.image_processor.fetch_images(open_picture(item, self.max_pixels))

        return opened

    def _merged(self, images: Any, videos: list[Video], text: Any) -> tuple[list, Any]:
        """Images and clips in the order of their placeholders, and the prompts with image tokens for both.

        Raises ValueError if there is not a placeholder for each.
        """
        flat = [] if images is None else _leaves(images)
        if text is None:
            return [*flat, *videos], None
        prompts = [text] if isinstance(text, str) else list(text)
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("`text` must be a string or list of strings.")
        self._check_groups(images, prompts)
        for token, given, what in ((self.image_token, flat, "images"), (VIDEO_TOKEN, videos, "clips")):
            if (count := sum(prompt.count(token) for prompt in prompts)) != len(given):
                raise ValueError(f"Found {count} {token} placeholders for {len(given)} {what}; write one for each.")
        either = re.compile(f"{re.escape(self.image_token)}|{re.escape(VIDEO_TOKEN)}")
        items = {self.image_token: iter(flat), VIDEO_TOKEN: iter(videos)}
        merged = [[next(items[token]) for token in either.findall(prompt)] for prompt in prompts]
        return merged, [prompt.replace(VIDEO_TOKEN, self.image_token) for prompt in prompts]

    def _check_groups(self, images: Any, prompts: Sequence[Any]) -> None:
        """Raises ValueError if lists of images, one for each prompt, do not have as many as there are placeholders."""
        listed = isinstance(images, (list, tuple)) and len(images) == len(prompts)
        if not listed or not isinstance(images[0], (list, tuple)):
            return
        for number, (prompt, group) in enumerate(zip(prompts, images, strict=True), start=1):
            if isinstance(prompt, str) and prompt.count(self.image_token) != len(group):
                raise ValueError(
                    f"Prompt {number} has {prompt.count(self.image_token)} {self.image_token} placeholders, "
                    f"but {len(group)} images were given for it."
                )

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs: Any) -> None:
        """Raises ValueError, with both counts, if the numbers of placeholders and images differ."""
        if audio is not None:
            raise ValueError("MS-Resampler reads images, videos and text; it takes no audio.")
        if text == []:
            raise ValueError("Give at least one prompt, or leave `text` out.")
        groups = [isinstance(item, list) for item in images] if isinstance(images, list) else []
        if any(groups) and not all(groups):
            raise ValueError("Images are one flat list, or one list for each prompt, not a mixture of the two.")
        nested = any(groups) and text is not None
        if nested:
            self._check_groups(images, text)
        if left := sum(prompt.count(VIDEO_TOKEN) for prompt in text or () if isinstance(prompt, str)):
            raise ValueError(f"Found {left} {VIDEO_TOKEN} placeholders in the text, but no videos were given.")
        shown = (
            None
            if images is None
            else _map_nested(images, lambda item: item.frames[0] if isinstance(item, Clip) else item)
        )
        super().validate_inputs(images=shown, text=text, **kwargs)
        if nested and len(groups) != len(text):
            raise ValueError(f"Got {len(groups)} lists of images for {len(text)} prompts; give one for each.")

    def _process_images(self, images, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        options = {name: kwargs.pop(name, None) for name in OF_IMAGES}
        leaves = _leaves(images)
        pictures = leaves if any(isinstance(item, Clip) for item in leaves) else make_flat_list_of_images(images)
        nested = isinstance(images, (list, tuple)) and bool(images) and isinstance(images[0], (list, tuple))
        groups = [len(group) for group in images] if nested else [len(pictures)]
        framed = [item.frames if isinstance(item, Clip) else [item] for item in pictures]
        if self._option("tiles", options) is None:
            inputs = self._look([frame for frames in framed for frame in frames], **kwargs)
            grids, firsts = self._patch_grids(inputs), np.cumsum([0, *map(len, framed)])[:-1]
            lay = [partial(self._lay_out, grids[first]) for first in firsts]
        else:
            framed, tile = [list(map(_as_picture, frames)) for frames in framed], self._tile_size(kwargs)
            lay = [partial(self._lay_tiles, (image.height, image.width), tile, options) for image, *_ in framed]
        lay = [
            partial(self._lay_clip, len(item.frames), place) if isinstance(item, Clip) else place
            for item, place in zip(pictures, lay, strict=True)
        ]
        layouts = self._layouts(lay, groups, options)
        if self._option("tiles", options) is not None:
            resample = kwargs.get("resample", self.image_processor.resample)
            views: list[Any] = []
            for frames, of_picture in zip(framed, layouts, strict=True):
                same = len(frames) // len(of_picture)  # frames of temporal scopes have one layout
                tilings = [layout.tiling for layout in of_picture for _ in range(same)]
                for pair in zip(frames, tilings, strict=True):
                    views += cut(*pair, tile, resample)
            inputs = self.image_processor(views, **kwargs | {"do_resize": False, "do_center_crop": False})
            inputs["tilings"] = np.array([layout.tiling for of_picture in layouts for layout in of_picture])
        inputs["token_grids"] = np.array([layout.grid for of_picture in layouts for layout in of_picture])
        if self.video_form == "scopes" and any(isinstance(item, Clip) for item in pictures):
            pairs = zip(framed, layouts, strict=True)
            inputs["clips"] = np.array([(len(frames), layout.steps) for frames, (layout,) in pairs])
        return inputs, [self._written(item, laid) for item, laid in zip(pictures, layouts, strict=True)]

    def replace_image_token(self, image_inputs: BatchFeature, image_idx: int, **kwargs: Any) -> str:
        """The text that replaces an image's placeholder: its image tokens, with newlines if there are any."""
        rows, columns = (int(side) for side in image_inputs["token_grids"][image_idx])
        tiling = read_tilings([image_inputs["tilings"][image_idx]])[0] if "tilings" in image_inputs else None
        return self._tokens_of(Layout(tiling, (rows, columns)))

    def _tokens_of(self, layout: Layout) -> str:
        """The image tokens of a picture, with newlines if there are any."""
        (rows, columns), newline, count = layout.grid, self.newline_token or "", self._count([layout])
        if layout.tiling is None or not newline:
            return self.image_token * count + newline
        return self.image_token * (count - rows * columns) + (self.image_token * columns + newline) * rows

    def _written(self, item: Any, layouts: list[Layout]) -> str:
        """The text that replaces the placeholder of a picture; of a clip, with the time of each frame or step."""
        if not isinstance(item, Clip):
            return self._tokens_of(layouts[0])
        if self.video_form == "scopes":
            layouts = [layouts[0]._replace(steps=1)] * layouts[0].steps
        times = of_steps(item.times, len(layouts)) if item.times else None
        stamps = [f"{time:.1f}s" for time in times] if times else [""] * len(layouts)
        return "\n".join(stamp + self._tokens_of(layout) for stamp, layout in zip(stamps, layouts, strict=True))

    def _count(self, layouts: list[Layout]) -> int:
        """The visual tokens of a picture."""
        count = 0
        for tiling, grid, steps in layouts:
            overview = 0 if tiling is None else math.prod(tiling.overview)
            apart = tiling is not None and self.tiles_apart
            count += tiling.views * math.prod(grid) if apart else steps * math.prod(grid) + overview
        return count

    def _lay_clip(self, frames: int, place: Callable[[Any], list[Layout]], budget: Any) -> list[Layout]:
        """The layouts of a clip's frames or, of temporal scopes, the one of its steps; `place` lays out one frame."""
        ((tiling, patches, _),) = place(None)
        if is_grid(budget):  # of images, such as the processor's own: for a clip, its number of tokens
            budget = (1, *budget) if frames == 1 else math.prod(budget)
        if self.video_form == "scopes":
            steps, grid = clip_grid(budget, frames, patches, self.auto_tokens)
            return [Layout(tiling and tiling._replace(overview=NONE), grid, steps)]

        able = cache(partial(self._can_have, place))  # frames are alike

        def share(count: int) -> list[int]:
            return share_out(count, [1] * frames, lambda _, one: able(one), "visual_tokens", "frames of the clip")

        budgets = share_of_frames(budget, frames, patches, self.auto_tokens, share)
        return [layout for one in budgets for layout in place(one)]

    def _can_have(self, place: Callable[[Any], list[Layout]], count: int) -> bool:
        """Whether a picture can have so many visual tokens."""
        try:
            return self._count(place(count)) == count
        except ValueError:
            return False

    def _option(self, name: str, options: Mapping[str, Any]) -> Any:
        """An option of a call, or the processor's own."""
        given = options.get(name)
        return getattr(self, name) if given is None else given

    def _layouts(
        self, lay: Sequence[Callable[[Any], list[Layout]]], groups: list[int], options: dict[str, Any]
    ) -> list[list[Layout]]:
        """The layouts of every picture, from functions of a budget; `groups` are the numbers of each prompt."""
        given, total = options.get("visual_tokens"), options.get("visual_tokens_total")
        budgets = given if isinstance(given, list) else [given] * len(lay)
        if len(budgets) != len(lay):
            raise ValueError(
                f"Got {len(budgets)} entries in `visual_tokens` for {len(lay)} images; give one for each, "
                "or a single count or (rows, columns) tuple for all."
            )
        budgets = [self.visual_tokens if budget is None else budget for budget in budgets]
        if total is not None:
            if given not in (None, "auto"):
                raise ValueError('Give `visual_tokens_total`, or `visual_tokens` of each image, not both; "auto" fits.')
            first, budgets = 0, []
            for count in groups:
                budgets += self._share(total, lay[first : first + count], self._option("visual_tokens", options))
                first += count
        return [place(budget) for place, budget in zip(lay, budgets, strict=True)]

    def _share(self, total: int, lay: Sequence[Callable[[Any], list[Layout]]], budget: Any) -> list[int]:
        """A prompt's total shared among its images: evenly, or for "auto" in proportion to what each would have."""
        weights = [self._count(place("auto")) if budget == "auto" else 1 for place in lay]
        able = [partial(self._can_have, place) for place in lay]
        return share_out(total, weights, lambda picture, count: able[picture](count)) if lay else []

    def _lay_out(self, patches: Grid, budget: Any) -> list[Layout]:
        """The layout of a budget over the patches of one view."""
        if budget != "auto":
            return [Layout(None, token_grid(budget, patches))]
        grids = (nearest_grid(count, patches) for count in budgets_for(budget, self.auto_tokens, patches))
        grid = next(filter(None, grids), None)
        if grid is None:
            raise ValueError(
                f"{patches[0]} x {patches[1]} patches have room for none of `auto_tokens` {self.auto_tokens}."
            )
        return [Layout(None, grid)]

    def _lay_tiles(self, image_size: Grid, tile_size: Grid, options: dict[str, Any], budget: Any) -> list[Layout]:
        """The layout of a budget over the tiles of an image of (height, width) pixels."""
        share, patches = self._option("overview_share", options), patch_grid(tile_size, self.patch_size)
        if not 0 <= share < 1:
            raise ValueError(f"`overview_share` is at least 0 and below 1, got {share}.")
        grids = grids_of(self._option("tiles", options))
        sizes = image_size, tile_size, patches, grids
        if not self.tiles_apart:
            laid = lay_out(*sizes, budget, self.auto_tokens, share, share if self.newline_token else 0.0)
            return [Layout(*laid)]
        tiling, _ = lay_out(*sizes, None, self.auto_tokens, share)
        ((_, grid, _),) = self._lay_out(patches, budget)
        return [Layout(Tiling(tiling.tiles, patches, NONE if tiling.overview == NONE else grid), grid)]

    def _tile_size(self, options: Mapping[str, Any]) -> Grid:
        """(height, width) of a tile: what the image processor makes of a square picture."""
        tool = self.image_processor
        if "max_num_patches" in options or getattr(tool, "max_num_patches", None):
            raise ValueError(
                "The tower reads pictures at their own proportions, without tiles: leave out `tiles`, and set "
                "`max_num_patches` for more detail."
            )
        if not options.get("do_resize", tool.do_resize):
            raise ValueError("`tiles` are resized to the tower's size: leave out `do_resize=False`.")
        return self._size_after((64, 64), options)

    def _look(self, images: list, **kwargs: Any) -> BatchFeature:
        """The image processor's outputs."""
        changed = {"size", "crop_size", "do_resize", "do_center_crop"} & set(kwargs)
        reach = None if changed else self._visible_reach()
        return self.image_processor([_crop_to_reach(image, reach) for image in images], **kwargs)

    def _visible_reach(self) -> int | None:
        """The longest aspect ratio that a centre crop keeps; beyond it the ends are dropped anyway. None: no limit."""
        tool = self.image_processor
        edge = (getattr(tool, "size", None) or {}).get("shortest_edge")
        if not edge or not getattr(tool, "do_resize", True):
            return None
        if getattr(tool, "do_center_crop", False):
            return 4 * math.ceil(max(tool.crop_size["height"], tool.crop_size["width"]) / edge)
        return 4 if getattr(tool, "crop_pct", None) and edge < 384 else None  # ConvNeXt's crops small sizes only

    def _patch_grids(self, image_inputs: BatchFeature) -> list[tuple[int, int]]:
        """The patch grid of every image after the image processor."""
        if "spatial_shapes" in image_inputs:
            return [(int(rows), int(columns)) for rows, columns in image_inputs["spatial_shapes"]]
        sizes = [image.shape[-2:] for image in image_inputs["pixel_values"]]
        return [patch_grid(size, self.patch_size) for size in sizes]

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs: Any) -> MultiModalData:
        """The numbers of visual tokens of images of (height, width) pixels, without the images (called by vLLM)."""
        if image_sizes is None:
            return MultiModalData()
        self._refuse_unknown_options(kwargs)
        options = getattr(self, "images_kwargs", {}) | kwargs.pop("images_kwargs", {}) | kwargs
        if self._option("tiles", options) is None:
            lay = [partial(self._lay_out, self._patches_of(size, options)) for size in image_sizes]
        else:
            lay = [partial(self._lay_tiles, tuple(size), self._tile_size(options), options) for size in image_sizes]
        layouts = self._layouts(lay, [len(lay)], options)
        return MultiModalData(
            num_image_tokens=[self._count(layout) for layout in layouts],
            num_image_patches=[1 if tiling is None else tiling.views for ((tiling, *_),) in layouts],
        )

    def _patches_of(self, image_size: Grid, options: dict[str, Any]) -> Grid:
        """The patch grid of an image of (height, width) pixels after the image processor."""
        tool, (height, width) = self.image_processor, image_size

        def option(name: str) -> Any:
            return options.get(name, getattr(tool, name, None))

        if option("max_num_patches"):  # SigLIP 2: up to a number of patches, in the image's proportions
            side = option("patch_size")
            if option("do_resize"):
                resized = inspect.getmodule(type(tool)).get_image_size_for_max_num_patches
                height, width = resized(height, width, side, option("max_num_patches"))
            return height // side, width // side
        return patch_grid(self._size_after(image_size, options), self.patch_size)

    def _size_after(self, image_size: Grid, options: Mapping[str, Any]) -> Grid:
        """(height, width) of an image of (height, width) pixels after the image processor."""
        tool, (height, width) = self.image_processor, image_size

        def option(name: str) -> Any:
            return options.get(name, getattr(tool, name, None))

        def size_of(name: str) -> Any:
            size = option(name)
            return size if hasattr(size, "get") else get_size_dict(size, default_to_square=option("default_to_square"))

        if option("do_resize") and type(tool).__name__.startswith("ConvNext"):  # crops the resized image, or warps it
            height = width = size_of("size")["shortest_edge"]
        elif {type(tool).resize.__module__, type(tool).center_crop.__module__} != {BACKENDS}:
            blank = Image.new("RGB", (width, height))  # an unknown way of resizing has to be tried
            tried = self._look([blank], **{k: v for k, v in options.items() if k not in OF_IMAGES})
            return tried["pixel_values"][0].shape[-2:]
        elif option("do_resize"):
            height, width = _resized((height, width), size_of("size"))
        if option("do_center_crop"):
            height, width = (size_of("crop_size")[side] for side in ("height", "width"))
        if option("do_pad") and option("pad_size"):
            height, width = (size_of("pad_size")[side] for side in ("height", "width"))
        return height, width


def _as_picture(image: Any) -> Image.Image:
    """An opened image as a PIL image. Raises ValueError if it is neither one nor an 8-bit RGB array."""
    if is_rgb_array(image):
        return Image.fromarray(image)
    if isinstance(image, Image.Image):
        return image
    raise ValueError(
        f"Tiles are cut from pictures, files and 8-bit arrays (height, width, 3), not from a {type(image).__name__}: "
        "give one of those, or leave out `tiles`."
    )


def _resized(image_size: tuple[int, int], size: Any) -> tuple[int, int]:
    """(height, width) of an image after transformers' resizing to a `size` of any form."""
    edge, longest = size.get("shortest_edge"), size.get("longest_edge")
    if edge and longest:
        return get_size_with_aspect_ratio(image_size, edge, longest)
    if edge:
        short, long = sorted(image_size)
        other = int(edge * long / short)
        return (other, edge) if image_size[0] > image_size[1] else (edge, other)
    if size.get("max_height"):
        return get_image_size_for_max_height_width(image_size, size["max_height"], size["max_width"])
    return size["height"], size["width"]


def _refuse_unknown(options: Collection[str], known: Collection[str]) -> None:
    """Raises ValueError for an unknown option, and suggests the nearest name."""
    for name in options:
        if name not in known and not name.startswith("_"):
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.4)
            hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(sorted(known)) or 'none'}."
            raise ValueError(f"`{name}` is not an option of the processor; {hint}")


def _loading_options(image_processor: Any, tokenizer: Any) -> set[str]:
    """Names that `from_pretrained` accepts for the processor's parts and the Hub; servers also pass call options."""
    hub = {"trust_remote_code", "code_revision", "use_fast", "backend", "return_unused_kwargs", "config", "dtype"}
    side = {
        "truncation_side",
        "model_max_length",
        "split_special_tokens",
        "clean_up_tokenization_spaces",
        "tokenizer_file",
    }
    tokens = {*tokenizer.SPECIAL_TOKENS_ATTRIBUTES, "extra_special_tokens", "add_bos_token", "add_eos_token"}
    images = getattr(getattr(image_processor, "valid_kwargs", None), "__annotations__", {})
    calls = MSResamplerProcessorKwargs.__annotations__["text_kwargs"].__annotations__
    return {*hub, *side, *tokens, *images, *calls, "auto_map", "processor_class"}


def _drop_typed_marks(tokenizer: Any) -> None:
    """Makes the tokenizer drop the mark of typed image tokens after it has matched special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # slow tokenizers keep the mark
        return
    normalizers, own = inspect.getmodule(type(backend)).normalizers, backend.normalizer
    if own is None or TYPED in own.normalize_str(TYPED):
        drop = normalizers.Replace(TYPED, "")
        backend.normalizer = drop if own is None else normalizers.Sequence([drop, own])


def _reads(template: str, name: str) -> bool:
    """Whether a chat template reads a variable."""
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def _crop_to_reach(image: Any, reach: int | None) -> Any:
    """Drops ends that a centre crop would drop: resizing 1 x 5000 pixels by the short side takes gigabytes."""
    if reach is None or not (isinstance(image, Image.Image) or is_rgb_array(image)):
        return image
    width, height = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
    short = min(width, height)
    longest = reach * short + 8  # the resizing filter reads some pixels beyond an edge
    # Drops the same number of whole squares at both ends, which scale to whole pixels and keep the centre in place.
    left, top = (max(0, side - longest) // 2 // short * short for side in (width, height))
    if (left, top) == (0, 0):
        return image
    cropped = np.asarray(image)[top : height - top, left : width - left]
    return Image.fromarray(cropped) if isinstance(image, Image.Image) else cropped


def _as_images(message: dict[str, Any]) -> dict[str, Any]:
    """A message as every chat template reads it: its clips stand where images do."""
    if not isinstance(content := message.get("content"), list):
        return message
    parts = [{"type": "image", "image": Video(part["video"])} if "video" in part else part for part in content]
    return message | {"content": parts}


def _leaves(items: Any) -> list[Any]:
    """The items of nested lists, and the images of a batch of them."""
    if getattr(items, "ndim", 0) == 4:
        return list(items)
    return [leaf for item in items for leaf in _leaves(item)] if isinstance(items, (list, tuple)) else [items]


def _is_empty(given: Any) -> bool:
    if isinstance(given, np.ndarray):
        return given.size == 0
    return given is None or (isinstance(given, (list, tuple)) and all(_is_empty(item) for item in given))


def _map_nested(items: Any, function) -> Any:
    return [_map_nested(item, function) for item in items] if isinstance(items, (list, tuple)) else function(items)


MSResamplerProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["MSResamplerProcessor"]
