"""Small data in the very formats of the benchmarks' official releases, with their oddities.

Every `make_*` writes one benchmark into a folder. Pictures are plain colours, each its own.
"""

import base64
import colorsys
import csv
import io
import json
from pathlib import Path

from PIL import Image


def pixels(number: int, form: str = "JPEG") -> bytes:
    colour = tuple(int(255 * part) for part in colorsys.hsv_to_rgb(number * 0.37 % 1, 0.8, 0.9))
    file = io.BytesIO()
    Image.new("RGB", (40 + number % 7, 32), colour).save(file, form)
    return file.getvalue()


def put(path: Path, content: bytes | str | list | dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, (list, dict)):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def ten(*answers: str) -> list[str]:
    """Ten answers, the last one repeated."""
    return [*answers, *[answers[-1]] * (10 - len(answers))]


def make_vqav2(folder: Path) -> None:
    questions = [
        {"image_id": 42, "question": "What colour is the sky?", "question_id": 42000},
        {"image_id": 42, "question": "How many dogs are there?", "question_id": 42001},
        {"image_id": 73, "question": "Is it 1,000 o'clock?", "question_id": 73000},
    ]
    given = [ten("blue", "light blue", "blue"), ten("2", "two", "2"), ten("no")]
    annotations = [
        {
            "question_type": "what",
            "multiple_choice_answer": answers[-1],
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": number}
                for number, answer in enumerate(answers, start=1)
            ],
            "image_id": question["image_id"],
            "answer_type": kind,
            "question_id": question["question_id"],
        }
        for question, answers, kind in zip(questions, given, ("other", "number", "yes/no"), strict=True)
    ]
    about = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}}
    for split in ("val2014", "test-dev2015"):
        content = about | {"data_subtype": split, "questions": questions}
        put(folder / f"v2_OpenEnded_mscoco_{split}_questions.json", content)
        pictures = split.replace("-dev", "")
        for image in (42, 73):
            put(folder / f"{pictures}/COCO_{pictures}_{image:012d}.jpg", pixels(image))
    put(folder / "v2_mscoco_val2014_annotations.json", about | {"annotations": annotations})


def make_gqa(folder: Path) -> None:
    questions = {
        "201307251": ("n161313", "Is it overcast?", "no", "verify"),
        "201640614": ("n235859", "Who is wearing the dress?", "woman", "query"),
        "202225914": ("n161313", "What is the sky's colour?", "blue", "query"),
    }
    content = {
        identifier: {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "scene"}],
            "entailed": [],
            "equivalent": [identifier],
            "question": question,
            "imageId": image,
            "isBalanced": True,
            "groups": {"global": None, "local": "13-weather"},
            "answer": answer,
            "semanticStr": "",
            "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
            "types": {"detailed": "weatherVerify", "semantic": "global", "structural": structural},
            "fullAnswer": "",
        }
        for identifier, (image, question, answer, structural) in questions.items()
    }
    put(folder / "testdev_balanced_questions.json", content)
    for number, image in enumerate(("n161313", "n235859")):
        put(folder / f"images/{image}.jpg", pixels(number))


def make_vizwiz(folder: Path) -> None:
    rows = [
        ("VizWiz_val_00000000.jpg", "Ok. There is another picture I hope it is a better one.", "unanswerable", 0),
        ("VizWiz_val_00000001.jpg", "What does the jar say?", "garlic", 1),
    ]
    content = [
        {
            "image": image,
            "question": question,
            "answers": [
                {"answer_confidence": "yes", "answer": text} for text in ten("unsuitable image", "suitable", answer)
            ],
            "answer_type": "unanswerable" if not answerable else "other",
            "answerable": answerable,
        }
        for image, question, answer, answerable in rows
    ]
    put(folder / "val.json", content)
    put(folder / "test.json", [{"image": "VizWiz_test_00000000.jpg", "question": "What is this?"}])
    put(folder / "val/VizWiz_val_00000000.jpg", pixels(0))
    put(folder / "val/VizWiz_val_00000001.jpg", pixels(1))
    put(folder / "test/VizWiz_test_00000000.jpg", pixels(2))


def make_scienceqa(folder: Path) -> None:
    def problem(question: str, choices: list[str], answer: int, hint: str, image: str | None) -> dict:
        return {
            "question": question,
            "choices": choices,
            "answer": answer,
            "hint": hint,
            "image": image,
            "task": "closed choice",
            "grade": "grade2",
            "subject": "natural science",
            "topic": "geography",
            "category": "Geography",
            "skill": "Read a map",
            "lecture": "",
            "solution": "",
            "split": "test",
        }

    problems = {
        "4": problem("Which is farthest north?", ["West Virginia", "Louisiana", "Arizona"], 0, "", "image.png"),
        "5": problem("Is it solid?", ["yes", "no"], 1, "Look at the picture.", "image.png"),
        "11": problem("What is text only?", ["this", "that"], 0, "", None),
        "12": problem("Which is for training?", ["this", "that"], 0, "", "image.png"),
    }
    put(folder / "problems.json", problems)
    put(folder / "pid_splits.json", {"train": ["12"], "val": [], "minival": [], "test": ["4", "5", "11"]})
    for identifier in ("4", "5"):
        put(folder / f"images/test/{identifier}/image.png", pixels(int(identifier), "PNG"))


def make_textvqa(folder: Path) -> None:
    rows = [
        (
            "003a8ae2ef43b901",
            "what is the brand of this camera?",
            34602,
            ten("nous les gosses", "dakota", "dakota digital"),
        ),
        ("0054c91397f2fe05", "what does it say?", 34603, ten("stop", "STOP", "stop.")),
    ]
    data = [
        {
            "question": question,
            "image_id": image,
            "image_classes": ["Cassette deck"],
            "flickr_original_url": "https://example.org/1.jpg",
            "flickr_300k_url": "https://example.org/2.jpg",
            "image_width": 1024,
            "image_height": 664,
            "answers": answers,
            "question_tokens": question.split(),
            "question_id": identifier,
            "set_name": "val",
        }
        for image, question, identifier, answers in rows
    ]
    about = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    put(folder / "TextVQA_0.5.1_val.json", about | {"data": data})
    ocr = [
        {"image_id": rows[0][0], "ocr_tokens": ["DAKOTA", "DIGITAL"], "ocr_info": [{"word": "DAKOTA"}]},
        {"image_id": rows[1][0], "ocr_tokens": [], "ocr_info": []},
    ]
    put(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", about | {"data": ocr})
    for number, row in enumerate(rows):
        put(folder / f"train_images/{row[0]}.jpg", pixels(number))


def make_pope(folder: Path, categories: tuple[str, ...] = ("random", "popular", "adversarial")) -> None:
    for category in categories:
        rows = [
            {
                "question_id": number,
                "image": f"COCO_val2014_{image:012d}.jpg",
                "text": f"Is there a {thing} in the image?",
                "label": label,
            }
            for number, (image, thing, label) in enumerate(
                [(310196, "snowboard", "yes"), (310196, f"{category} car", "no"), (210789, "dog", "no")], start=1
            )
        ]
        put(folder / f"coco_pope_{category}.json", "\n".join(map(json.dumps, rows)) + "\n")
    for image in (310196, 210789):
        put(folder / f"val2014/COCO_val2014_{image:012d}.jpg", pixels(image))


MME_TOGETHER = ("existence", "count", "position", "color", "OCR", "commonsense_reasoning", "numerical_calculation",
                "text_translation", "code_reasoning")  # fmt: skip
MME_APART = ("posters", "celebrity", "scene", "landmark", "artwork")


def make_mme(folder: Path) -> None:
    folder = folder / "MME_Benchmark_release_version"
    lines = "Is there a cat?{} Please answer yes or no.\tYes\nIs there a dog?{} Please answer yes or no.\tNo\n"
    for number, category in enumerate((*MME_TOGETHER, *MME_APART)):
        apart = category in MME_APART
        for image in ("0001", "0002"):
            text, picture = ("questions_answers_YN/", "images/") if apart else ("", "")
            # Some questions of the release have a second space before the instruction.
            put(folder / category / f"{text}{image}.txt", lines.format("", " " if image == "0002" else ""))
            form = "PNG" if category == "code_reasoning" else "JPEG"
            content = pixels(2 * number + int(image), form)
            put(folder / category / f"{picture}{image}.{form.lower().replace('jpeg', 'jpg')}", content)


def make_mmbench(folder: Path, language: str = "en", circular: bool = True) -> None:
    questions = [
        (
            241,
            "Which is right?",
            "",
            ["this one", "that one", "neither", "both"],
            "B",
            "object_localization",
            "finegrained",
        ),
        (
            252,
            "是这样吗？" if language == "cn" else "Is it so?",
            "Look at it.",
            ["yes", "no"],
            "A",
            "attribute",
            "coarse",
        ),
    ]
    rows = []
    for index, question, hint, options, answer, category, l2 in questions:
        for shift in range(len(options) if circular else 1):
            turned = options[shift:] + options[:shift]
            cells = dict(zip("ABCD", [*turned, *[""] * (4 - len(turned))], strict=True))
            letter = "ABCD"[turned.index(options["ABCD".index(answer)])]
            # Rotations may name the row of the picture instead of repeating it.
            image = base64.b64encode(pixels(index)).decode() if shift < 2 else str(index)
            rows.append(
                {"index": index + shift * 1_000_000, "question": question, "hint": hint, **cells, "answer": letter}
                | {
                    "category": category,
                    "image": image,
                    "source": "x",
                    "l2-category": l2,
                    "comment": "",
                    "split": "dev",
                }
            )
    name = "mmbench_dev_20230712.tsv" if language == "en" else "mmbench_dev_cn_20231003.tsv"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def make_mmvet(folder: Path) -> None:
    content = {
        "v1_0": {
            "imagename": "v1_0.png",
            "imagesource": "https://example.org",
            "question": "What is x in the equation?",
            "answer": "-1<AND>-5",
            "capability": ["ocr", "math"],
        },
        "v1_1": {
            "imagename": "v1_1.png",
            "imagesource": "https://example.org",
            "question": "What is the animal?",
            "answer": "cat<OR>kitten",
            "capability": ["rec"],
        },
    }
    put(folder / "mm-vet.json", content)
    for number, record in enumerate(content.values()):
        put(folder / f"images/{record['imagename']}", pixels(number, "PNG"))


def make_seed(folder: Path) -> None:
    def question(identifier: str, data: str, kind: str, number: int) -> dict:
        return {
            "answer": "ABCD"[number],
            "choice_a": "One",
            "choice_b": "Two",
            "choice_c": "Three",
            "choice_d": "Four",
            "data_id": data,
            "data_type": kind,
            "question": "How many are there?",
            "question_id": identifier,
            "question_type_id": number + 1,
            **({"segment": [0, 5]} if kind == "video" else {}),
        }

    questions = [
        question("101669", "1454426_2591111986", "image", 0),
        question("101670", "1454426_2591111986", "image", 1),
        question("102_1", "clip_7.mp4", "video", 2),
    ]
    kinds = {"Scene Understanding": 1, "Instance Identity": 2, "Action Recognition": 3}
    put(folder / "SEED-Bench.json", {"questions": questions, "question_type": kinds})
    put(folder / "SEED-Bench-image/1454426_2591111986", pixels(3))
    put(folder / "SEED-Bench-video-image/clip_7.png", pixels(4, "PNG"))


def parquet(path: Path, rows: list[dict], pictures: tuple[str, ...]) -> None:
    """A table whose picture columns are as the Hub has them."""
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [row.get(name) for row in rows] for name in rows[0]}
    table = datasets.Dataset.from_dict(columns)
    for name in pictures:
        several = any(isinstance(row.get(name), list) for row in rows)
        feature = datasets.Image(decode=False)
        table = table.cast_column(name, datasets.List(feature) if several else feature)
    table.to_parquet(str(path))


def stored(content: bytes) -> dict:
    return {"bytes": content, "path": None}


def mmmu_rows() -> list[dict]:
    def row(identifier: str, question: str, options: str, answer: str, kind: str, images: int) -> dict:
        pictures = {f"image_{n}": stored(pixels(n, "PNG")) if n <= images else None for n in range(1, 8)}
        about = {"explanation": "", "img_type": "['Tables']", "topic_difficulty": "Easy", "subfield": "Managing"}
        return {
            "id": identifier,
            "question": question,
            "options": options,
            "answer": answer,
            "question_type": kind,
            **about,
            **pictures,
        }

    choices = "['$6', '$7', \"it's $8\"]"
    pictured = "['<image 2>', '<image 1>']"
    return [
        row("validation_Accounting_1", "<image 1> What is the cost?", choices, "B", "multiple-choice", 1),
        row("validation_Accounting_2", "Which of <image 1> is it?", pictured, "A", "multiple-choice", 2),
        row("validation_Accounting_3", "<image 1> Give the sum.", "[]", "['1,000', 'one thousand']", "open", 1),
    ]


def make_mmmu(folder: Path) -> None:
    pictures = tuple(f"image_{number}" for number in range(1, 8))
    parquet(folder / "Accounting/validation-00000-of-00001.parquet", mmmu_rows(), pictures)


def make_ai2d(folder: Path) -> None:
    def question(identifier: str, texts: list[str], answer: int, labelled: bool) -> dict:
        return {"abcLabel": labelled, "answerTexts": texts, "correctAnswer": answer, "questionId": identifier}

    questions = {
        "Which stage?": question("0.png-0", ["A", "B", "C", "D"], 2, True),
        "What is it?": question("0.png-1", ["plant", "animal", "egg", "none"], 0, False),
    }
    put(folder / "questions/0.png.json", {"imageName": "0.png", "questions": questions})
    put(folder / "questions/7.png.json", {"imageName": "7.png", "questions": {"Not a test?": questions["What is it?"]}})
    put(folder / "ai2d_test_ids.csv", "0\n")
    put(folder / "images/0.png", pixels(0, "PNG"))
    put(folder / "abc_images/0.png", pixels(1, "PNG"))


def make_chartqa(folder: Path) -> None:
    human = [
        {"imgname": "41699051005347.png", "query": "How many food item is shown?", "label": "14"},
        {"imgname": "41699051005347.png", "query": "Which is the largest?", "label": "Yes"},
    ]
    augmented = [{"imgname": "two_col_101562.png", "query": "What was the share?", "label": "56.5%"}]
    put(folder / "test/test_human.json", human)
    put(folder / "test/test_augmented.json", augmented)
    for number, row in enumerate([human[0], augmented[0]]):
        put(folder / f"test/png/{row['imgname']}", pixels(number, "PNG"))


def make_docvqa(folder: Path) -> None:
    def record(identifier: int, question: str, answers: list[str]) -> dict:
        return {
            "questionId": identifier,
            "question": question,
            "question_types": ["handwritten", "form"],
            "image": "documents/xnbl0037_1.png",
            "docId": 279,
            "ucsf_document_id": "xnbl0037",
            "ucsf_document_page_no": "1",
            "answers": answers,
            "data_split": "val",
        }

    data = [record(337, "What is the date?", ["1/8/93", "1/8/1993"]), record(338, "What is sent?", ["No. 7"])]
    about = {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": "val"}
    put(folder / "val_v1.0_withQT.json", about | {"data": data})
    put(folder / "documents/xnbl0037_1.png", pixels(0, "PNG"))


def make_ocrbench(folder: Path) -> None:
    def record(identifier: int, dataset: str, kind: str, answers: str | list[str]) -> dict:
        return {
            "dataset_name": dataset,
            "type": kind,
            "id": identifier,
            "image_path": f"{dataset}/{identifier}.jpg",
            "question": "what is written in the image?",
            "answers": answers,
        }

    content = [
        record(0, "IIIT5K", "Regular Text Recognition", ["CENTRE"]),
        record(1, "HME100k", "Handwritten Mathematical Expression Recognition", "x ^ { 2 }"),
    ]
    put(folder / "OCRBench.json", content)
    for row in content:
        put(folder / f"OCRBench_Images/{row['image_path']}", pixels(row["id"]))


MAKERS = {
    "vqav2": make_vqav2,
    "gqa": make_gqa,
    "vizwiz": make_vizwiz,
    "scienceqa": make_scienceqa,
    "textvqa": make_textvqa,
    "pope": make_pope,
    "mme": make_mme,
    "mmbench": make_mmbench,
    "mmbench_cn": lambda folder: make_mmbench(folder, "cn"),
    "mmvet": make_mmvet,
    "seed": make_seed,
    "mmmu": make_mmmu,
    "ai2d": make_ai2d,
    "chartqa": make_chartqa,
    "docvqa": make_docvqa,
    "ocrbench": make_ocrbench,
}


def make_all(folder: Path) -> Path:
    """Every benchmark, in a folder of its name."""
    for name, make in MAKERS.items():
        make(folder / name)
    return folder
