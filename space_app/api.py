"""The endpoints /ask and /scopes, for programs."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import gradio as gr
from answering import Answerer
from ask_page import ONE_AT_A_TIME, errors_in_a_sentence
from conversation import topic, user_turn
from known import note_for
from measures import in_json
from pictures import Refusal, check_count, open_picture
from settings import Settings, checked


class Api:
    """The endpoints for one model; nothing is kept between calls. `tiles` is 0 for pictures that are not cut."""

    def __init__(self, answerer: Answerer):
        self.answerer = answerer

    def ask(
        self,
        images: Any,
        question: str,
        visual_tokens: float | None,
        system_prompt: str,
        temperature: float,
        top_p: float,
        max_new_tokens: float,
        tiles: float,
    ) -> Iterator[dict[str, Any]]:
        """Streams the answer to a question about pictures, with what it cost and what is foreign to the model."""
        with errors_in_a_sentence(str):
            wanted = checked(visual_tokens, system_prompt, temperature, top_p, max_new_tokens, tiles or None)
            prompt = self.answerer.prepare(*topic([user_turn(question, paths_of(images), [])]), wanted)
            told: dict[str, Any] = {}
            for step in self.answerer.reply(prompt, wanted):
                if step.maps:
                    note = note_for(self.answerer.known, question, [maps.foreign for maps in step.maps])
                    told = {
                        "visual_tokens": [maps.read for maps in step.maps],
                        "patches": [maps.patches for maps in step.maps],
                        "tiles": [list(maps.tiles) for maps in step.maps],
                        "note": note and asdict(note),
                        "milliseconds_reading": round(step.reading, 1),
                        "milliseconds_to_first_token": round(step.milliseconds, 1),
                    }
                yield {"answer": step.text, "milliseconds": round(step.milliseconds, 1), **told}

    def scopes(self, images: Any, visual_tokens: float | None, tiles: float) -> dict[str, Any]:
        """How far each visual token of each picture trusted each scope, and where, how far and how widely it looked."""
        with errors_in_a_sentence(str):
            paths = paths_of(images)
            check_count(paths)
            wanted = checked(visual_tokens, "", 0, 1, 1, tiles or None)
            maps = self.answerer.look([open_picture(path) for path in paths], wanted)
            return {"scopes": self.answerer.scopes, "images": [in_json(one) for one in maps]}

    def build(self) -> None:
        """Adds the endpoints; their inputs are not shown on the page."""
        with gr.Row(visible=False):
            # Described as files, but taken as they come, so that anything else can be refused in a sentence.
            images, files = gr.JSON(label="images"), gr.File(file_count="multiple", render=False)
            images.api_info, images.example_payload, images.example_value = (
                files.api_info,
                files.example_payload,
                files.example_value,
            )
            question = gr.Textbox(label="question")
            budget, tiles = gr.Number(None, label="visual_tokens"), gr.Number(0, label="tiles")
            settings = [
                gr.Textbox(Settings.system_prompt, label="system_prompt"),
                gr.Number(Settings.temperature, label="temperature"),
                gr.Number(Settings.top_p, label="top_p"),
                gr.Number(Settings.max_new_tokens, label="max_new_tokens"),
                tiles,
            ]
            answer, maps = gr.JSON(label="answer"), gr.JSON(label="maps")
            gr.Button().click(self.ask, [images, question, budget, *settings], answer, api_name="ask", **ONE_AT_A_TIME)
            gr.Button().click(self.scopes, [images, budget, tiles], maps, api_name="scopes", **ONE_AT_A_TIME)


def paths_of(images: Any) -> list[str]:
    """The paths of uploaded files, which Gradio has checked; one may stand alone. Raises Refusal for anything else."""
    files = [images] if isinstance(images, dict) else images or []
    if isinstance(files, list) and all(
        isinstance(file, dict)
        and file.get("meta") == {"_type": "gradio.FileData"}
        and isinstance(file.get("path"), str)
        for file in files
    ):
        return [file["path"] for file in files]
    raise Refusal("The images must be a list of files, each made by gradio_client's handle_file.")
