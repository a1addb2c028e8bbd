"""Turns pictures and a question into visual tokens, scope maps and a streamed answer.

The model is loaded by transformers' Auto classes with the code in its own folder, as any user would load it.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from examples import Examples
from jinja2 import TemplateError
from known import Known, read_record
from layers import Layer, Usual, layers_read, telling_layers
from pictures import Refusal
from PIL import Image
from proof import Change, Proof, cover, without_scope
from settings import Settings
from tiles import NONE, ONE, Cut, cover_views, cuts_of, whole
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from words import Word, attended_words, probability

try:
    import spaces
except ImportError:
    spaces = None

KEPT_PIXELS = 1024  # longest side of a stored picture; maps are shown smaller
WORDS_SHOWN = 3  # of a token
READINGS = 8  # number of sets of pictures whose visual tokens are kept for later questions


@dataclass(frozen=True)
class ScopeMaps:
    """The projector's result for one picture: S scopes, M visual tokens in a grid, N patches in a grid.

    picture is the model's input (cropped and scaled); weights (S, M) sum to one over the scopes, attentions
    (S, M, N) over the patches; grids are (rows, columns). S is 0 for a projector without scopes. places (M, 2): the
    middle of each token's cell, as shares of the picture's height and width. words: the most likely words of each token
    with their shares, if tokens are mixtures of words. read: how many tokens the language model gets; kept: which of
    M these are, None if it gets all, or others that were merged. foreign: whether the picture is known to be unlike
    those of the training. tiles: rows and columns into which the picture is cut. overview_grid: of its overview, whose
    tokens come first; (0, 0) if there is none.
    """

    picture: Image.Image
    weights: np.ndarray
    attentions: np.ndarray
    token_grid: tuple[int, int]
    patch_grid: tuple[int, int]
    places: np.ndarray
    words: list[list[tuple[str, float]]]
    read: int
    kept: list[int] | None = None
    foreign: bool = False
    tiles: tuple[int, int] = ONE
    overview_grid: tuple[int, int] = NONE

    @property
    def patches(self) -> int:
        """N."""
        return math.prod(self.patch_grid)

    @property
    def left(self) -> np.ndarray:
        """Whether the language model gets each token (M)."""
        tokens = np.arange(len(self.places))
        return np.isin(tokens, tokens if self.kept is None else self.kept)


@dataclass(frozen=True)
class Prompt:
    """Model inputs, on the CPU, and their pictures. keep: the number of visual tokens left, if others are dropped."""

    inputs: Any
    pictures: list[Image.Image]
    keep: int | None = None


@dataclass(frozen=True)
class Step:
    """A partial answer, and the milliseconds since the model started.

    Tower and projector took `reading` of these; 0 if the pictures' tokens were kept from an earlier question. The first
    step, at the first token, has the maps of the pictures.
    """

    text: str
    milliseconds: float
    reading: float
    maps: list[ScopeMaps] | None = None


class Stop(StoppingCriteria):
    """Stops a generation before its next token once the event is set."""

    def __init__(self, event: Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """True for every row of the batch once the event is set."""
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def on_gpu(function: Callable) -> Callable:
    """The function decorated for ZeroGPU; unchanged elsewhere."""
    return spaces.GPU(function) if spaces else function


class Answerer:
    """Answers questions with a model and its processor; keeps the visual tokens of the last pictures until cleared.

    With reducers, of one method, pictures are read into the default number of visual tokens, and the method drops those
    beyond the budget, which is one of theirs. known: tells whether a picture or a question is foreign to the model;
    scores: its accuracy by number of visual tokens.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str,
        reducers: Sequence[Any] = (),
        known: Known | None = None,
        scores: Sequence[dict[str, Any]] = (),
    ):
        self.model, self.processor, self.name, self.reducers = model, processor, name, reducers
        self.known, self.scores = known, list(scores)
        self.readings: OrderedDict[bytes, tuple[Any, list[ScopeMaps]]] = OrderedDict()
        self.usually: dict[int, Usual] = {}
        # ZeroGPU runs these in a separate process: bound here, so that the model is not sent with each call.
        self.reply, self.look = on_gpu(self.reply), on_gpu(self.look)
        self.attend, self.prove = on_gpu(self.attend), on_gpu(self.prove)
        self.by_layer, self.measure = on_gpu(self.by_layer), on_gpu(self.measure)

    @property
    def scopes(self) -> list[str]:
        """Names of the scopes; empty for a projector without scopes."""
        return list(self.model.config.projector_config.scope_names)

    @property
    def scope_heads(self) -> list[list[int]]:
        """How many heads each scope has, for each layer that tells them."""
        return [list(mean.scope_heads) for _, mean in telling_layers(self.model.model.projector)]

    @property
    def language_heads(self) -> tuple[int, int]:
        """Layers of the language model, and heads of each."""
        config = self.model.config.text_config
        return getattr(config, "num_hidden_layers", 0), getattr(config, "num_attention_heads", 0)

    @property
    def patches(self) -> int:
        """Patches of a picture of the tower's native size."""
        rows, columns = self.model.config.native_patch_grid
        return rows * columns

    @property
    def trained_budget(self) -> int:
        """Default number of visual tokens per picture."""
        budget = self.model.config.projector_config.visual_tokens
        return budget if isinstance(budget, int) else math.prod(budget)

    def budgets(self) -> list[int]:
        """Numbers of visual tokens to offer: grids with the patches' proportions, and the default."""
        if self.reducers:
            return [reducer.keep for reducer in self.reducers]
        rows, columns = self.model.config.native_patch_grid
        budgets = {n * max(1, round(n * columns / rows)) for n in range(1, rows + 1)} | {self.trained_budget}
        return sorted(budgets)

    def with_reducers(self) -> list["Answerer"]:
        """The same model with each method that drops visual tokens and that it can run."""
        if not hasattr(self.model, "fitting_reducers"):  # code saved with earlier weights lacks this method
            return []
        methods = self.model.fitting_reducers(self.budgets()).values()
        return [
            Answerer(self.model, self.processor, f"{self.name} with {own[0].title}", own, self.known) for own in methods
        ]

    @contextmanager
    def reducing(self, keep: int | None) -> Iterator[None]:
        """Drops all but `keep` visual tokens; None drops none. Raises Refusal if it cannot keep as many."""
        before = getattr(self.model.config, "reducer_config", None)  # code saved with earlier weights lacks it
        if keep is not None:
            try:
                self.model.set_reducer(self.reducers[0].name, keep=keep)
            except ValueError as error:
                raise Refusal(str(error)) from error
        try:
            yield
        finally:
            if keep is not None:
                self.model.config.reducer_config = before

    def prepare(self, turns: list[dict], pictures: list[Image.Image], settings: Settings) -> Prompt:
        """Model inputs for a conversation. Raises Refusal if this model does not support it."""
        if settings.system_prompt:
            system = {"role": "system", "content": [{"type": "text", "text": settings.system_prompt}]}
            turns = [system, *turns]
        keep = settings.visual_tokens if self.reducers else None
        if settings.tiles and getattr(self.processor, "tiles_apart", False):
            raise Refusal("This projector would read each tile with all visual tokens; please ask without tiles.")
        given = {"visual_tokens": None if keep else settings.visual_tokens, "tiles": settings.tiles}
        options = {name: value for name, value in given.items() if value is not None}
        try:
            inputs = self.processor.apply_chat_template(
                turns,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs=options,
            )
        except TemplateError as error:
            raise Refusal("This model takes no system prompt; please leave it empty.") from error
        except ValueError as error:
            raise Refusal(str(error)) from error
        room = self._room(inputs)
        if room < 1:
            raise Refusal(
                f"The conversation has {inputs['input_ids'].shape[1]} tokens, {1 - room} too many for this model; "
                "please clear it, or ask with fewer visual tokens."
            )
        return Prompt(inputs, pictures, keep)

    def _room(self, inputs: Any) -> int:
        """The longest answer that fits the model's positions, in tokens."""
        return getattr(self.model.config.text_config, "max_position_embeddings", 2**20) - inputs["input_ids"].shape[1]

    def encode(self, prompt: Prompt) -> tuple[dict, Any, list[ScopeMaps], float]:
        """Inputs without pixels on the model's device, the visual tokens, their maps, and the milliseconds that this
        took; 0 if the tokens were kept from before, at the same budget.
        """
        text = self.processor.tokenizer.model_input_names
        kept = {} if prompt.keep is None else {"kept": torch.tensor(prompt.keep)}
        key = fingerprint({name: value for name, value in prompt.inputs.items() if name not in text} | kept)
        inputs = prompt.inputs.to(self.model.device, self.model.dtype)
        reading, milliseconds = self.readings.pop(key, None), 0.0
        if reading is None:
            started = time.perf_counter()
            with self.reducing(prompt.keep):
                reading = self._read({name: inputs[name] for name in inputs if name not in text}, prompt.pictures)
            milliseconds = 1000 * (time.perf_counter() - started)
        self.readings[key] = reading
        while len(self.readings) > READINGS:
            self.readings.popitem(last=False)
        return {name: inputs[name] for name in inputs if name in text}, *reading, milliseconds

    def forget(self) -> None:
        """Drops the kept visual tokens of all visitors, who at worst wait a little longer."""
        self.readings.clear()

    @torch.inference_mode()
    def _read(self, pixels: dict, pictures: list[Image.Image]) -> tuple[Any, list[ScopeMaps]]:
        """Visual tokens and maps of pictures."""
        try:
            features = self.model.get_image_features(**pixels, output_scopes=bool(self.scopes), return_dict=True)
        except ValueError as error:  # a projector with a fixed budget, or one that takes no tiles
            raise Refusal(str(error)) from error
        return features, [self._maps_of(features, number, pixels, picture) for number, picture in enumerate(pictures)]

    def _cut(self, pixels: dict, number: int) -> Cut | None:
        """How one of the pictures is cut into tiles; None if they are not."""
        if pixels.get("tilings") is None:
            return None
        height, width = pixels["pixel_values"].shape[-2:]
        side = self.processor.patch_size
        return cuts_of(pixels["tilings"], (height // side, width // side))[number]

    def _maps_of(self, features: Any, number: int, pixels: dict, picture: Image.Image) -> ScopeMaps:
        """Of one of the pictures."""
        token_grid, patch_grid = tuple(features.token_grids[number]), tuple(features.patch_grids[number])
        cut, views = self._cut(pixels, number), pixels["pixel_values"]
        tiles, overview = (cut.tiles, cut.overview) if cut else (ONE, NONE)
        mine = cut.views if cut else slice(number, number + 1)
        places = np.concatenate([centres(overview), centres(token_grid)])
        tokens, patches = len(places), math.prod(patch_grid)
        weights, attentions = np.zeros((0, tokens)), np.zeros((0, tokens, patches))
        if self.scopes:
            weights = features.scope_weights[number].float().cpu().numpy()
            attentions = features.scope_attentions[number].float().cpu().numpy()
            if getattr(features, "token_places", None):  # code saved with earlier weights lacks them
                places = features.token_places[number].float().cpu().numpy()
        shown = whole(views[mine], cut, self.processor.patch_size) if cut else views[number]
        seen = seen_picture(self.processor.image_processor, shown, picture)
        read, every = len(features.pooler_output[number]), getattr(features, "kept_tokens", None)
        kept = every and every[number].tolist()
        words = at_their_places(self._words_of(features, number), kept, tokens)
        known, states = self.known, features.last_hidden_state
        strange = [] if known is None or states is None else [known.is_foreign(view) for view in states[mine]]
        foreign = 2 * sum(strange) > len(strange)  # of several views, more than half are
        maps = ScopeMaps(seen, weights, attentions, token_grid, patch_grid, places, words, read, kept, foreign)
        return replace(maps, tiles=tiles, overview_grid=overview)

    def _words_of(self, features: Any, number: int) -> list[list[tuple[str, float]]]:
        """The WORDS_SHOWN most likely words of each token of a picture; empty if the model's tokens are no words."""
        shares = getattr(features, "word_weights", None)  # code saved with earlier weights lacks it
        if shares is None:
            return []
        ids, decode = self.model.config.visual_words, self.processor.tokenizer.decode
        values, places = shares[number].float().cpu().topk(WORDS_SHOWN)
        return [
            [(decode([ids[place]]).strip(), value) for value, place in zip(*token, strict=True)]
            for token in zip(values.tolist(), places.tolist(), strict=True)
        ]

    def without_words(self, prompt: Prompt, maps: list[ScopeMaps]) -> str | None:
        """Why it cannot be told which visual tokens the words of an answer attend to, if a reducer is the reason."""
        reducer = getattr(self.model, "reducer", None) if prompt.keep is None else self.reducers[0]
        if reducer is None or all(one.kept is not None for one in maps):
            return None
        if reducer.in_layers:
            return (
                f"{reducer.title} drops tokens between the language model's layers; what is gone has no attention in "
                "later layers, so there is no map of what the words attended to."
            )
        return (
            f"{reducer.title} gave the language model {sum(one.read for one in maps)} tokens, merged from these, which "
            "have no place of their own, so there is no map of what the words attended to."
        )

    def look(self, pictures: list[Image.Image], settings: Settings) -> list[ScopeMaps]:
        """The maps of pictures, which do not depend on the question."""
        content = [{"type": "image", "image": picture} for picture in pictures]
        return self.encode(self.prepare([{"role": "user", "content": content}], pictures, settings))[2]

    def by_layer(self, prompt: Prompt, picture: int) -> tuple[ScopeMaps, list[Layer]]:
        """The maps of one of the pictures, and how each layer read it; no layers if the code does not tell them."""
        return self._by_layer(prompt, picture)

    @torch.inference_mode()
    def _by_layer(self, prompt: Prompt, picture: int) -> tuple[ScopeMaps, list[Layer]]:
        """As `by_layer`, for `measure`, which is already in the process that has the GPU."""
        inputs, text = prompt.inputs.to(self.model.device, self.model.dtype), self.processor.tokenizer.model_input_names
        everything = {name: value for name, value in inputs.items() if name not in text}
        cut, one = self._cut(everything, picture), slice(picture, picture + 1)
        places = {"pixel_values": cut.views} if cut else {}
        pixels = {name: value[places.get(name, one)] for name, value in everything.items()}
        with layers_read(self.model.model.projector) as layers:
            _, (maps,) = self._read(pixels, [prompt.pictures[picture]])
        if cut and cut.overview != NONE:
            count, grids = len(layers) // 2, (maps.token_grid, maps.patch_grid)
            batched = (cut.overview, cut.tile_patches) == grids  # as the model does with what has the same grids
            seen, rest = (layers[::2], layers[1::2]) if batched else (layers[:count], layers[count:])
            layers = [one.before(other, cut) for one, other in zip(seen, rest, strict=True)]
        return maps, layers

    def usual(self, settings: Settings, examples: Examples) -> Usual:
        """The mean trust over the example pictures, measured once for each number of visual tokens."""
        if not self.scopes:
            return Usual([])
        budget = self.trained_budget if self.reducers else settings.visual_tokens or self.trained_budget
        if budget not in self.usually:
            self.usually[budget] = self.measure(budget, examples.measured)
        return self.usually[budget]

    def measure(self, budget: int, pictures: list[Image.Image]) -> Usual:
        """What is usual: pictures are read one by one, into so many visual tokens."""
        trusts, settings = [], Settings(visual_tokens=None if self.reducers else budget)
        for picture in pictures:
            content = [{"type": "image", "image": picture}]
            prompt = self.prepare([{"role": "user", "content": content}], [picture], settings)
            maps, layers = self._by_layer(prompt, 0)
            trusts.append((maps.token_grid, np.stack([layer.weights for layer in layers] or [maps.weights])))
        return Usual(trusts)

    def attend(self, prompt: Prompt, answer: str, layer: int | None = None, head: int | None = None) -> list[Word]:
        """The words of an answer, and what each attended to; in one layer and by one head, or in the mean.

        Raises Refusal if that cannot be told.
        """
        inputs, features, maps, _ = self.encode(prompt)
        if why := self.without_words(prompt, maps):
            raise Refusal(why)
        ids = inputs["input_ids"]
        left = np.concatenate([one.left for one in maps])
        stays = ids[0] != self.model.config.image_token_id
        stays[~stays] = torch.from_numpy(left).to(ids.device)  # what was dropped is not in the prompt, either
        words = attended_words(self.model, self.processor.tokenizer, ids[:, stays], features, answer, layer, head)
        return [replace(word, shares=among(word.shares, left)) for word in words]

    @torch.inference_mode()
    def prove(self, prompt: Prompt, answer: str, change: Change) -> Proof:
        """Asks again with a change, and compares. Raises Refusal if it cannot be made."""
        text, features, maps, _ = self.encode(prompt)
        pixels = {name: value for name, value in prompt.inputs.items() if name not in text}
        if change.scope is None:
            views, cut = pixels["pixel_values"].clone(), self._cut(pixels, change.picture)
            if cut:
                views[cut.views] = cover_views(views[cut.views], change.patches, cut, self.processor.patch_size)
            else:
                grid = maps[change.picture].patch_grid
                views[change.picture] = cover(views[change.picture], change.patches, grid)
            pixels["pixel_values"] = views
            changed, _ = self._read(pixels, prompt.pictures)
        else:
            with without_scope(self.model.model.projector, change.scope):
                changed, _ = self._read(pixels, prompt.pictures)
        room = min(Settings.max_new_tokens, self._room(text))
        ids = self.model.generate(**text, mm_encoder_outputs={"image": changed}, max_new_tokens=room, do_sample=False)
        said = self.processor.tokenizer.decode(ids[0, text["input_ids"].shape[1] :], skip_special_tokens=True)
        before, after = (
            probability(self.model, self.processor.tokenizer, text["input_ids"], read, answer)
            for read in (features, changed)
        )
        return Proof(before, after, said.strip())

    def reply(self, prompt: Prompt, settings: Settings) -> Iterator[Step]:
        """Streams the answer. Closing this iterator stops the generation, which runs in a separate thread."""
        started = time.perf_counter()
        inputs, features, maps, reading = self.encode(prompt)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, failures = Event(), []

        def generate() -> None:
            try:
                self.model.generate(
                    **inputs,
                    mm_encoder_outputs={"image": features},
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([Stop(stop)]),
                    max_new_tokens=min(settings.max_new_tokens, self._room(inputs)),
                    **sampling(settings),
                )
            except Exception as error:  # raised to the reader of the stream, below
                failures.append(error)
                streamer.end()

        try:
            text = ""
            with self.reducing(prompt.keep):
                Thread(target=generate, daemon=True).start()
                for piece in streamer:
                    text += piece
                    yield Step(text.strip(), 1000 * (time.perf_counter() - started), reading, maps)
                    maps = None
        finally:
            stop.set()
        if failures and self.reducers and isinstance(failures[0], ValueError):  # a picture or prompt that it refuses
            raise Refusal(str(failures[0])) from failures[0]
        if failures:
            raise failures[0]


def at_their_places(words: list, kept: list[int] | None, tokens: int) -> list:
    """What the tokens say, in a picture's grid of tokens: nothing where one was dropped, or if none has a place."""
    if kept is None:
        return words if len(words) == tokens else []
    said = dict(zip(kept, words, strict=False))
    return [said.get(token, []) for token in range(tokens)] if words else []


def among(shares: np.ndarray, left: np.ndarray) -> np.ndarray:
    """The shares of the tokens that are left, among all tokens; 0 for the others."""
    everything = np.zeros(len(left))
    everything[left] = shares
    return everything


def centres(grid: tuple[int, int]) -> np.ndarray:
    """The middles (y, x) of a grid's cells, in raster order, from 0 to 1."""
    rows, columns = grid
    return (np.indices(grid).reshape(2, -1).T + 0.5) / (rows, columns)


def fingerprint(pixels: dict[str, torch.Tensor]) -> bytes:
    """A hash of pixels and budget."""
    digest = sha256()
    for name, value in sorted(pixels.items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.digest()


def sampling(settings: Settings) -> dict[str, Any]:
    """Sampling options of `generate`."""
    if settings.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}


def load(model_id: str, revision: str | None = None) -> Answerer:
    """The model of a folder or a Hub repository, on the GPU if there is one, else with weights packed for the CPU."""
    processor = AutoProcessor.from_pretrained(model_id, revision=revision, trust_remote_code=True)
    processor.tiles = None  # but for those that visitors ask for
    model = AutoModelForImageTextToText.from_pretrained(
        model_id, revision=revision, trust_remote_code=True, dtype="auto"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.eval().to(device)
    if hasattr(model, "pack_weights"):  # code saved with earlier weights lacks this method
        model.pack_weights()
    known, scores = read_record(model_id, revision)
    return Answerer(model, processor, model_id.rstrip("/").rsplit("/", 1)[-1], known=known, scores=scores)


def seen_picture(image_processor: Any, pixels: torch.Tensor, picture: Image.Image) -> Image.Image:
    """The picture as the model saw it, cropped and scaled, so that maps match it exactly.

    Towers that take patches instead of pixels (SigLIP 2) see the whole picture; a small copy is kept.
    """
    if pixels.ndim != 3:
        small = picture.copy()
        small.thumbnail((KEPT_PIXELS, KEPT_PIXELS))
        return small
    pixels = pixels.float().cpu()
    if getattr(image_processor, "do_normalize", True):
        mean, std = (torch.tensor(x)[:, None, None] for x in (image_processor.image_mean, image_processor.image_std))
        pixels = pixels * std + mean
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
