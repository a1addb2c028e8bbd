"""`ms-resampler data check`: every problem counted with its ids, and the labels shown as they are."""

import html
import json
import re
from pathlib import Path

import pytest
from components import TOKENIZERS
from labelled_records import HARD, RECORD, VICUNA, processor_of
from tiny_models import picture, save_tiny, tiny_processor

from ms_resampler.training import collate, conversations, records
from ms_resampler.training.collate import IGNORED, ConversationCollator
from ms_resampler.training.label_view import coloured_text, example_of, page
from ms_resampler_cli.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder)
    return str(folder)


def row(name, answer="A cat.", image="whole.png", asked="<image>\nWhat is it?"):
    said = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": said} | ({"image": image} if image else {})


@pytest.fixture
def folder(tmp_path):
    picture().save(tmp_path / "whole.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    return tmp_path


def check(folder, model, rows, *more):
    (folder / "data.json").write_text(json.dumps(rows))
    return main(["data", "check", str(folder / "data.json"), "--model", model, "--workers", "0", *more])


GOOD = [row("one"), row("two", "A very long cat. " * 5), row("text", image=None, asked="Who?")]
BAD = [
    row("gone1", image="gone.png"),
    row("gone2", image="gone.png"),
    row("broken", image="broken.png"),
    row("empty", " "),
    row("many", image=["whole.png", "whole.png"]),
    row("long", "word " * 200),
]


def test_a_good_set_is_described(folder, model, capsys):
    assert check(folder, model, GOOD, "--max-length", "200") == 0
    printed = capsys.readouterr().out
    collator = ConversationCollator(tiny_processor(), 200)
    rows = [collator.encode(r | {"image": r.get("image") and picture()}) for r in GOOD]
    tokens = [len(r["labels"]) for r in rows]
    learned = sum(int((r["labels"] != IGNORED).sum()) for r in rows)
    assert "3 records, 3 of them good." in printed
    assert f"{sum(tokens)} tokens, {learned / sum(tokens):.1%} of them trained" in printed
    assert f"{min(tokens)} to {max(tokens)} (the longest is two)" in printed
    bars = re.findall(r"^ +\d+ to +\d+ +(\d+)", printed, re.M)
    assert sum(map(int, bars)) == 3
    assert "Images a record: 0 in 1, 1 in 2." in printed
    assert printed.count("⟦") == 2  # the first two records
    assert "Record one: " in printed
    assert "⟦A cat.<|im_end|>⟧" in printed


@pytest.mark.parametrize("workers", ["0", "2"])
def test_problems_are_counted_with_their_ids(folder, model, capsys, workers):
    rows = [pair for both in zip(GOOD * 2, BAD, strict=True) for pair in both]
    assert check(folder, model, rows, "--max-length", "200", "--workers", workers) == 2
    printed = capsys.readouterr().out
    assert "12 records, 6 of them good." in printed
    assert "6 cannot be trained on, and stop training:" in printed
    found = dict(re.findall(r"^  (\w[\w ]+?) +(\d+  .*)$", printed, re.M))
    assert found == {
        "missing image": "2  gone1, gone2",
        "unreadable image": "1  broken",
        "empty answer": "1  empty",
        "image count": "1  many",
        "too long": "1  long",
    }
    assert "Record empty has an empty answer in turn 2." in printed


def test_problems_may_be_skipped_and_long_records_cut(folder, model, capsys):
    rows = [*GOOD, *BAD]
    assert check(folder, model, rows, "--max-length", "200", "--bad-records", "skip", "--truncate") == 0
    printed = capsys.readouterr().out
    assert "9 records, 4 of them good." in printed
    assert "5 cannot be trained on, and are left out of training:" in printed
    assert "1 are cut at 200 tokens: long." in printed
    assert check(folder, model, BAD[:2], "--bad-records", "skip") == 2  # nothing is left to learn from
    assert check(folder, model, []) == 2
    assert "0 records, 0 of them good." in capsys.readouterr().out


def test_only_the_first_ids_are_printed(folder, model, capsys):
    check(folder, model, [row(f"e{number}", "") for number in range(9)])
    assert "9  e0, e1, e2, e3, e4, ...\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "more", "sentence"),
    [
        ("none.json", [], "No such file or directory"),
        ("whole.png", [], "has an unknown file type"),
        ("data.json", ["--html", "/no/such/folder/page.html"], "There is no folder '/no/such/folder' for the page"),
        ("data.json", ["--images", "/no/such/folder"], "There is no folder of images"),
        ("data.json", ["--model", "tests"], "it has no config.json"),
        ("data.json", ["--max-length", "0"], "max_length must be at least 1, got 0."),
        ("data.json", ["--workers", "-1"], "workers must be at least 0, got -1."),
        ("data.json", ["--examples", "-1"], "examples must be at least 0, got -1."),
    ],
)
def test_bad_input_is_a_sentence(folder, model, source, more, sentence, capsys):
    (folder / "data.json").write_text("[]")
    model = [] if "--model" in more else ["--model", model]
    assert main(["data", "check", str(folder / source), *model, *more]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.startswith("ms-resampler data: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_a_path_that_escapes_is_a_bad_record_of_a_table(folder, model, capsys, workers, streaming):
    import datasets

    rows = [row("fine"), row("escape", image="../whole.png")]
    datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    source = ["data", "check", str(folder / "rows.parquet"), "--model", model, "--workers", workers]
    assert main([*source, *streaming]) == 2
    printed = capsys.readouterr().out
    assert "2 records, 1 of them good." in printed
    assert "Record escape names the image '../whole.png': a path must stay within" in printed


# --- The pictures of the labels


@pytest.fixture(params=["llama_2", "qwen2"])
def example(request):
    template = VICUNA if request.param == "llama_2" else TOKENIZERS[request.param]().chat_template
    collator = ConversationCollator(processor_of(request.param, template), 2000)
    return example_of(RECORD, collator), collator


def test_pieces_are_all_tokens_in_order_with_their_labels(example):
    example, collator = example
    row = collator.encode(RECORD)
    assert [token for piece in example.pieces for token in piece.ids] == row["input_ids"].tolist()
    learned = [piece.learned for piece in example.pieces for _ in piece.ids]
    assert learned == (row["labels"] != IGNORED).tolist()
    assert [piece.text for piece in example.pieces if piece.kind == "image"] == ["4 visual tokens"] * 3
    assert HARD in "".join(piece.text for piece in example.pieces)


def test_colours_mark_what_is_learned_and_nothing_else(example, monkeypatch):
    example, _ = example
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = coloured_text(example)
    green = "".join(re.findall("\x1b\\[30;42m(.*?)\x1b\\[0m", shown)).replace("↵", "")
    assert green == "".join(piece.text for piece in example.pieces if piece.learned).replace("\n", "")
    monkeypatch.setenv("NO_COLOR", "1")
    bare = coloured_text(example)
    assert "\x1b" not in bare
    learned = "".join(re.findall("⟦(.*?)⟧", bare, re.S))
    assert learned == "".join(piece.text for piece in example.pieces if piece.learned)


def test_the_page_stands_alone_and_shows_the_same(example):
    example, _ = example
    made = page("<data>", "1 < 2", [example])
    assert "<title>&lt;data&gt;</title>" in made
    assert "1 &lt; 2" in made
    assert made.count("data:image/jpeg;base64,") == len(RECORD["image"])
    assert re.findall(r'(?:src|href)="(?!data:)', made) == []
    section = made[made.index("<section>") : made.index("</section>")]
    spans = re.findall(r'<span class="([^"]*)" title="[^"]*">(.*?)</span>', section, re.S)
    assert [html.unescape(text).replace("↵", "") for _, text in spans] == [piece.text for piece in example.pieces]
    assert ["learned" in classes for classes, _ in spans] == [piece.learned for piece in example.pieces]


def test_the_command_writes_the_page(folder, model, capsys):
    assert check(folder, model, GOOD, "--html", str(folder / "labels.html"), "--examples", "3") == 0
    made = (folder / "labels.html").read_text()
    assert made.count("<section>") == 3
    assert "3 records, 3 of them good." in made


# --- The page about it


DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "data.md"


def test_the_python_of_the_page_runs_as_printed(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S)
    exec(compile(block, "data.md", "exec"), {})
    (promised,) = re.findall(r"# (.*)$", block, re.M)
    assert capsys.readouterr().out == f"{promised}\n"


def test_the_page_lists_every_kind_of_problem():
    table = "".join(re.findall(r"^\| `.*? \|", DOCUMENT.read_text(), re.M))
    code = "".join(Path(module.__file__).read_text() for module in (collate, conversations, records))
    assert set(re.findall("`(.*?)`", table)) == set(re.findall(r'BadRecord\(\s*"(.*?)"', code))
