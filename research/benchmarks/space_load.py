"""The Space under load: start-up, many users at once, an abusive visitor, and memory over many conversations.

    python -m research.benchmarks.space_load                  20 users for 60 seconds, then twice 200 conversations
    python -m research.benchmarks.space_load --users 3 --seconds 5 --conversations 10

Serves the app as `ms-resampler demo` does, with a second model to compare with. Users ask through the API; where there
are two models, every fourth question goes to both of them, as from the Compare page. Every answer is compared with
that to the same question without other users. The abusive visitor asks six questions at once, each about four
pictures of 24 megapixels, while another visitor asks about a small one. Prints a markdown table. The exit code is 1 if
an answer was wrong or missing.
"""

import argparse
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
from gradio_client import Client, handle_file
from PIL import Image

from ms_resampler.demo import loadable_pair
from ms_resampler.folders import find_app

from ..timing import machine

EXAMPLES = find_app().parent / "examples"
SCENES = json.loads((EXAMPLES / "examples.json").read_text())["scenes"]
# Every question about every scene: a mixed-up answer would show.
QUESTIONS = [(scene["file"], other["question"]) for scene in SCENES for other in SCENES]
COMPARED_EVERY = 4
ABUSIVE_CALLS, LARGE_PICTURES, LARGE_SIZE = 6, 4, (6000, 4000)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub repository (default: the embedded checkpoint)")
    parser.add_argument("--compare", help="a second one (default, beside the embedded checkpoint: as `demo` has it)")
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--conversations", type=int, default=200)
    arguments = parser.parse_args()
    with loadable_pair(arguments.model, arguments.compare) as (model, second):
        started = time.perf_counter()
        with served(model, second) as (address, process):
            wall, computing = time.perf_counter() - started, cpu_seconds(process.pid)
            rows = [
                ("models", " and ".join(Path(one).name for one in (model, second) if one)),
                ("from start to the page", f"{wall:.1f} s ({computing:.1f} s of computing)"),
            ]
            first_rows, expected, compared = alone(address, second is not None)
            crowd_rows, wrong = crowd(address, expected, compared, arguments.users, arguments.seconds)
            rows += first_rows + crowd_rows + abuse(address, process.pid)
            rows += memory(address, process.pid, arguments.conversations)
    print(f"{machine()}\n\n| | |\n|---|---|")
    print("\n".join(f"| {name} | {value} |" for name, value in rows))
    return 1 if wrong else 0


@contextmanager
def served(model: str, second: str | None) -> Iterator[tuple[str, subprocess.Popen]]:
    """The app's address and process, as long as the context lasts. Raises RuntimeError if it does not start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"MODEL_ID": model, "GRADIO_SERVER_PORT": str(port)} | ({"COMPARE_MODEL_ID": second} if second else {})
    app = subprocess.Popen([sys.executable, str(find_app())], env=os.environ | settings, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if time.monotonic() > deadline or app.poll() is not None:
                raise RuntimeError("The app did not start.")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}", app
    finally:
        app.terminate()
        app.wait()


def connect(address: str) -> Client:
    return Client(address, verbose=False, analytics_enabled=False)


def ask(client: Client, file: str, question: str) -> str:
    image = handle_file(str(EXAMPLES / file))
    return client.predict([image], question, visual_tokens=None, api_name="/ask")["answer"]


def compare(address: str, file: str, question: str) -> tuple[str, str]:
    """Both models' answers from the Compare page, as a browser gets them: it has no API endpoint."""
    with httpx.Client(timeout=120) as page:
        events = page.get(f"{address}/config").json()["dependencies"]
        event = next(one for one in events if len(one["inputs"]) == 7 and len(one["outputs"]) == 6)
        with (EXAMPLES / file).open("rb") as image:
            (path,) = page.post(f"{address}/gradio_api/upload", files={"files": image}).json()
        picture = {"path": path, "meta": {"_type": "gradio.FileData"}}
        visitor = uuid.uuid4().hex
        # The second model; no other budgets in a row; both models' own budgets; no tiles.
        data = [{"text": question, "files": [picture]}, 1, False, None, None, None, None]
        body = {"data": data, "fn_index": event["id"], "session_hash": visitor}
        page.post(f"{address}/gradio_api/queue/join", json=body).raise_for_status()
        lines = page.get(f"{address}/gradio_api/queue/data", params={"session_hash": visitor}).text.splitlines()
    messages = [json.loads(line.removeprefix("data:")) for line in lines if line.startswith("data:")]
    _, one, _, other, *_ = next(m for m in messages if m["msg"] == "process_completed")["output"]["data"]
    return one, other


def alone(address: str, two_models: bool) -> tuple[list[tuple[str, str]], dict, dict]:
    """The times of the first answers, and the answers to all questions: of one model, and of both."""
    rows, compared = [], {}
    with closing(connect(address)) as client:
        first_question = time.perf_counter()
        ask(client, *QUESTIONS[0])
        rows.append(("the first answer, on top of that", f"{time.perf_counter() - first_question:.2f} s"))
        expected = {question: ask(client, *question) for question in QUESTIONS}
    if two_models:
        first_question = time.perf_counter()
        compare(address, *QUESTIONS[0])
        rows.append(("the first comparison of both", f"{time.perf_counter() - first_question:.2f} s"))
        compared = {question: compare(address, *question) for question in QUESTIONS}
    return rows, expected, compared


def crowd(
    address: str, expected: dict, compared: dict, users: int, seconds: float
) -> tuple[list[tuple[str, str]], int]:
    """Users who ask one question after the other; how long answers took, and how many were wrong or missing."""
    together = threading.Barrier(users)

    def right(client: Client, number: int) -> bool:
        question = QUESTIONS[number % len(QUESTIONS)]
        if compared and number % COMPARED_EVERY == 0:
            return compare(address, *question) == compared[question]
        return ask(client, *question) == expected[question]

    def use(user: int) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        with closing(connect(address)) as client:
            together.wait()
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                asked = time.perf_counter()
                try:
                    good = right(client, user + 7 * len(found))
                except Exception as error:
                    print(f"User {user}: {error}", file=sys.stderr)
                    good = False
                found.append((time.perf_counter() - asked, good))
        return found

    with ThreadPoolExecutor(users) as pool:
        answers = [answer for one in pool.map(use, range(users)) for answer in one]
    waits = sorted(wait for wait, _ in answers)
    wrong = sum(not good for _, good in answers)
    return [
        (f"answers to {users} users in {seconds:g} s", f"{len(answers)}, {wrong} wrong or missing"),
        ("seconds to an answer in the crowd, median", f"{statistics.median(waits):.2f} s"),
        ("the slowest twentieth", f"above {waits[int(0.95 * len(waits))]:.2f} s"),
    ], wrong


def large_picture(number: int) -> bytes:
    """A picture of LARGE_SIZE unlike all others, as JPEG or PNG in turn."""
    image = Image.effect_noise((60, 40), 90).resize(LARGE_SIZE).convert("RGB")
    image.putpixel((0, 0), (number, 0, 0))
    file = io.BytesIO()
    image.save(file, "JPEG" if number % 2 else "PNG", compress_level=1)
    return file.getvalue()


def abuse(address: str, pid: int) -> list[tuple[str, str]]:
    """Somebody asks about many large pictures at once: how long another visitor waits, and the most memory so far."""
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place, f"{number}.picture") for number in range(ABUSIVE_CALLS * LARGE_PICTURES)]
        for number, path in enumerate(files):
            path.write_bytes(large_picture(number))

        def ask_much(call: int) -> str:
            with closing(connect(address)) as client:
                images = [handle_file(str(path)) for path in files[call::ABUSIVE_CALLS]]
                return client.predict(images, "What is in the picture?", visual_tokens=None, api_name="/ask")["answer"]

        with ThreadPoolExecutor(ABUSIVE_CALLS) as pool, closing(connect(address)) as client:
            started = time.perf_counter()
            waits: list[float] = []
            calls = [pool.submit(ask_much, call) for call in range(ABUSIVE_CALLS)]
            while not all(call.done() for call in calls) or not waits:
                asked = time.perf_counter()
                ask(client, *QUESTIONS[0])
                waits.append(time.perf_counter() - asked)
            wall, answered = time.perf_counter() - started, sum(bool(call.result()) for call in calls)
    megapixels = LARGE_SIZE[0] * LARGE_SIZE[1] / 1e6
    return [
        (
            f"{ABUSIVE_CALLS} calls of {LARGE_PICTURES} pictures of {megapixels:g} megapixels at once",
            f"{answered} answered in {wall:.1f} s",
        ),
        (
            "another visitor's answers meanwhile, median and longest",
            f"{statistics.median(waits):.2f} s, {max(waits):.2f} s",
        ),
        ("the most resident memory so far", f"{resident_megabytes(pid, 'VmHWM'):.0f} MB"),
    ]


def memory(address: str, pid: int, conversations: int) -> list[tuple[str, str]]:
    """The app's memory over conversations of two questions and a look at the maps, each by a visitor of its own."""
    sizes = [resident_megabytes(pid)]
    for number in range(2 * conversations):
        file, question = QUESTIONS[number % len(QUESTIONS)]
        with closing(connect(address)) as client:
            ask(client, file, question)
            ask(client, file, "What is in the picture?")
            client.predict([handle_file(str(EXAMPLES / file))], visual_tokens=None, api_name="/scopes")
        if (number + 1) % max(1, conversations // 2) == 0:
            sizes.append(resident_megabytes(pid))
    shown = ", ".join(f"{size:.0f}" for size in sizes)
    return [(f"resident memory over {conversations} conversations and as many again, each half", f"{shown} MB")]


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far, as Linux tells it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_megabytes(pid: int, field: str = "VmRSS") -> float:
    """The resident memory of a process, now or (VmHWM) at its highest, as Linux tells it."""
    line = next(row for row in Path(f"/proc/{pid}/status").read_text().splitlines() if row.startswith(field))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    sys.exit(main())
