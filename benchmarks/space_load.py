"""How the Space bears a crowd: start-up, many users at once, and memory over many conversations.

    python benchmarks/space_load.py                  20 users for 60 seconds, then twice 200 conversations
    python benchmarks/space_load.py --users 3 --seconds 5 --conversations 10

Serves the app as `ms-resampler demo` does, and asks through its API. Every answer is held against the one that the
same question got when nobody else was there. Prints a markdown table. Exit code 1 if an answer was wrong or missing.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

from gradio_client import Client, handle_file

from ms_resampler.cli import model_or_embedded
from ms_resampler.demo import find_app, loadable
from ms_resampler.evaluation.timing import machine

EXAMPLES = find_app().parent / "examples"
SCENES = json.loads((EXAMPLES / "examples.json").read_text())["scenes"]
# Every question about every scene: a mixed-up answer would show.
QUESTIONS = [(scene["file"], other["question"]) for scene in SCENES for other in SCENES]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub repository (default: the embedded checkpoint)")
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--conversations", type=int, default=200)
    arguments = parser.parse_args()
    with loadable(model_or_embedded(arguments.model)) as model:
        started = time.perf_counter()
        with served(model) as (address, process):
            wall, computing = time.perf_counter() - started, cpu_seconds(process.pid)
            rows = [("from start to the page", f"{wall:.1f} s ({computing:.1f} s of computing)")]
            with closing(connect(address)) as client:
                first_question = time.perf_counter()
                ask(client, *QUESTIONS[0])
                rows.append(("the first answer, on top of that", f"{time.perf_counter() - first_question:.2f} s"))
                expected = {question: ask(client, *question) for question in QUESTIONS}
            crowd_rows, wrong = crowd(address, expected, arguments.users, arguments.seconds)
            rows += crowd_rows + memory(address, process.pid, arguments.conversations)
    print(f"{machine()}\n\n| | |\n|---|---|")
    print("\n".join(f"| {name} | {value} |" for name, value in rows))
    return 1 if wrong else 0


@contextmanager
def served(model: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """The app's address and process, as long as the context lasts. Raises RuntimeError if it does not start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"MODEL_ID": model, "GRADIO_SERVER_PORT": str(port)}
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


def crowd(address: str, expected: dict, users: int, seconds: float) -> tuple[list[tuple[str, str]], int]:
    """Users who ask one question after the other; how long answers took, and how many were wrong or missing."""
    together = threading.Barrier(users)

    def use(user: int) -> list[tuple[float, bool]]:
        found = []
        with closing(connect(address)) as client:
            together.wait()
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                question = QUESTIONS[(user + len(found) * users) % len(QUESTIONS)]
                asked = time.perf_counter()
                try:
                    right = ask(client, *question) == expected[question]
                except Exception as error:
                    print(f"User {user}: {error}", file=sys.stderr)
                    right = False
                found.append((time.perf_counter() - asked, right))
        return found

    with ThreadPoolExecutor(users) as pool:
        answers = [answer for one in pool.map(use, range(users)) for answer in one]
    waits = sorted(wait for wait, _ in answers)
    wrong = sum(not right for _, right in answers)
    return [
        (f"answers to {users} users in {seconds:g} s", f"{len(answers)}, {wrong} wrong or missing"),
        ("seconds to an answer in the crowd, median", f"{statistics.median(waits):.2f} s"),
        ("the slowest twentieth", f"above {waits[int(0.95 * len(waits))]:.2f} s"),
    ], wrong


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


def resident_megabytes(pid: int) -> float:
    """VmRSS of a process, as Linux tells it."""
    line = next(row for row in Path(f"/proc/{pid}/status").read_text().splitlines() if row.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    sys.exit(main())
