"""How a chat template renders a conversation: its text, where the answers are, and which token ends them.

This works for any language model: templates are probed by rendering conversations with them.
"""

import json
import re
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from .folders import PACKAGE

Span = tuple[int, int]

# Placeholder for the content of a message, which no template changes and no data contain.
CONTENT = "\ue000content\ue001"
ANSWER_MARK = "\ue002"  # placeholder for an answer in the template "thinking_off"
NO_THINKING = "<think>\n\n</think>\n\n"  # Qwen3's block in front of an answer without thinking
GENERATION_TAG = re.compile(r"\{%(-?\s*(?:end)?generation\s*-?)%\}")


def packaged_template(name: str) -> str:
    """The text of a file in the folder chat_templates, such as "chatml"."""
    return (PACKAGE / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


class ChatFormat:
    """A chat template for messages in parts, with the tokenizer that has its special tokens."""

    def __init__(self, template: str, tokenizer: Any):
        self.template = template
        self.special_tokens = tokenizer.special_tokens_map
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        self.added_token = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or "(?!)")
        self.marks_answers = GENERATION_TAG.search(template) is not None

    def render(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        """The text of a conversation. Raises ValueError with the template's reason if it refuses it."""
        return self._render(messages, marks=False, **variables)[0]

    def _render(self, messages: list[dict[str, Any]], marks: bool, **variables: Any) -> tuple[str, list[Span]]:
        try:
            texts, spans = render_jinja_template(
                [messages],
                chat_template=self.template,
                return_assistant_tokens_mask=marks,
                **self.special_tokens,
                **variables,
            )
        except (TemplateError, TypeError) as error:  # a text-only template adds a list to a string
            raise ValueError(f"The chat template refuses the conversation: {error}") from error
        return texts[0], spans[0] if marks else []

    def render_with_answers(self, messages: list[dict[str, Any]]) -> tuple[str, list[Span]]:
        """The text of a conversation, and the character ranges of its answers, each with what ends its turn.

        A template that marks answers with `{% generation %}` is followed. With any other, the conversation is rendered
        again with a placeholder for every answer; the answers lie between the remaining pieces of text.
        Raises ValueError if the template refuses the conversation or leaves an answer out.
        """
        if self.marks_answers:
            return self._render(messages, marks=True)
        text = self.render(messages)
        answers = [text_of(message) for message in messages if message["role"] == "assistant"]
        instead = {"content": [{"type": "text", "text": CONTENT}]}
        frame = self.render([m | instead if m["role"] == "assistant" else m for m in messages])
        pieces = frame.split(CONTENT)
        if len(pieces) != len(answers) + 1 or not text.startswith(pieces[0]):
            raise ValueError("The chat template leaves an answer out, or repeats one.")
        spans, start = [], len(pieces[0])
        for number, (answer, piece) in enumerate(zip(answers, pieces[1:], strict=True), start=1):
            is_last = number == len(answers)
            end = end_of_answer(text, start, answer, piece, is_last)
            closing = self.turn_ends[is_last]
            spans.append((start, end + len(closing) if text.startswith(closing, end) else end))
            start = end + len(piece)
        return text, spans

    def check_generation_prompt(self) -> str | None:
        """None if the text before a trained answer equals the generation prompt, else a sentence about the difference.

        Checks both answers of a conversation, and whether a <think> block within an answer is trained.
        """
        said = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in (("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2"))
        ]
        try:
            text, spans = self.render_with_answers(said)
            for number, (start, _) in zip((1, 3), spans, strict=True):
                prompt = self.render(said[:number], add_generation_prompt=True)
                if not text.startswith(prompt) or text[len(prompt) : start].strip():
                    return (
                        f"The chat template asks for an answer after {prompt[-40:]!r}, but an answer is trained after "
                        f"{text[:start][-40:]!r}."
                    )
            thought = {"role": "assistant", "content": [{"type": "text", "text": "<think>\nT1\n</think>\n\nA1"}]}
            text, spans = self.render_with_answers([said[0], thought])
        except ValueError as error:
            return f"The chat template cannot be trained on: {error}"
        (start, end), *_ = spans
        if "T1" not in text[start:end] or text[:start].rstrip().endswith("</think>"):
            return "The chat template drops the thinking (<think> ... </think>) of an answer."
        return None

    @cached_property
    def turn_ends(self) -> tuple[str, str]:
        """The text that ends an answer before another question, and the last answer of a conversation.

        Both end with the first added token that the template writes after an answer,
        "<|im_end|>" in ChatML; "" if there is none.
        """
        said = [{"role": role, "content": [{"type": "text", "text": CONTENT}]} for role in ("user", "assistant") * 2]
        pieces = self.render(said).split(CONTENT)
        if len(pieces) != 5:
            raise ValueError("The chat template does not write every message once, so its answers cannot be found.")
        found = [self.added_token.search(piece) for piece in (pieces[2], pieces[4])]
        between, last = (match.string[: match.end()] if match else "" for match in found)
        return between, last

    @property
    def end_token(self) -> str:
        """The token that ends an answer, such as "<|im_end|>". Raises ValueError if there is none."""
        between, last = self.turn_ends
        match = self.added_token.search(last) or self.added_token.search(between)
        if match is None:
            raise ValueError("The chat template ends answers with no token of its own, so a model would never stop.")
        return match.group()


def text_of(message: dict[str, Any]) -> str:
    """The text of a message, without its images."""
    return "".join(part.get("text", "") for part in message["content"])


def end_of_answer(text: str, start: int, answer: str, following: str, is_last: bool) -> int:
    """Where the answer that begins at `start` ends and `following` begins; the template may have stripped the answer.

    Raises ValueError if the template changed the answer in another way.
    """
    for kept in (answer, answer.strip(), answer.rstrip(), answer.lstrip()):
        end = start + len(kept)
        if text.startswith(kept, start) and text.startswith(following, end):
            return end
    end = len(text) - len(following) if is_last else text.find(following, start)
    if end < start or not following or not text.startswith(following, end):
        raise ValueError(f"The chat template changes the answer {answer[:40]!r} so that it cannot be found again.")
    return end


def thinking_off(template: str, tokenizer: Any) -> str:
    """The template if training and generation prompts agree; else one with thinking switched off, if that helps."""
    own = ChatFormat(template, tokenizer)
    if own.check_generation_prompt() is None:
        return template
    said = [{"role": "user", "content": [{"type": "text", "text": "Q1"}]}]
    try:
        thinking, plain = (own.render(said, add_generation_prompt=True, enable_thinking=on) for on in (True, False))
        end = own.turn_ends[1]
    except ValueError:
        return template
    if thinking.rstrip().endswith("<think>"):
        thinking = thinking.rstrip().removesuffix("<think>")
    block = plain.removeprefix(thinking) if plain.startswith(thinking) else ""
    block = block if "</think>" in block else NO_THINKING
    mended = packaged_template("thinking_off").rstrip("\n")
    for name, value in {"MARK": ANSWER_MARK, "END": end, "NO_THINKING": block}.items():
        mended = mended.replace(f"'{name}'", json.dumps(value, ensure_ascii=False))
    mended = mended.replace("TEMPLATE", GENERATION_TAG.sub(r"{#\1#}", template.removesuffix("\n")))
    return mended if ChatFormat(mended, tokenizer).check_generation_prompt() is None else template


def image_aware(template: str, image_token: str, tokenizer: Any) -> str:
    """The template if it writes `image_token` for an image, else with a prelude that does.

    Raises ValueError if it does not write image and text even then.
    """
    prelude = packaged_template("image_parts").rstrip("\n").replace("<image>", image_token)
    for candidate in (template, prelude + template):
        if _writes_images(ChatFormat(candidate, tokenizer), image_token):
            return candidate
    raise ValueError(
        f"The chat template does not write texts, and {image_token} once for an image: give another template or token."
    )


def _writes_images(chat_format: ChatFormat, image_token: str) -> bool:
    parts = [{"type": "image"}, {"type": "text", "text": CONTENT}]
    try:
        text = chat_format.render([{"role": "user", "content": parts}])
    except ValueError:
        return False
    return text.count(image_token) == text.count(CONTENT) == 1 and "'type'" not in text
