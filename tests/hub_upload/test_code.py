"""Whose code a checkpoint runs: its own folder's, whatever its configurations and disguised files say."""

import bz2
import collections
import gzip
import io
import json
import lzma
import os
import pickle
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ms_resampler import TINY
from ms_resampler.hub_upload.code import code_problem
from ms_resampler.hub_upload.inspect import inspect_files, inspect_source, is_pickle
from ms_resampler.hub_upload.staging import allowed_files, stage_checkpoint

EVIL = "evil/repo--modeling_ms_resampler.MSResamplerModel"
OURS = "modeling_ms_resampler.MSResamplerModel"


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """The embedded checkpoint's small files and its code."""
    folder = stage_checkpoint(Path(TINY), tmp_path_factory.mktemp("staged") / "tiny")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def folder(staged, tmp_path):
    return Path(shutil.copytree(staged, tmp_path / "tiny"))


def elsewhere(what):
    return f"refers to another repository: {what}"


REFERENCES = {
    "an auto_map": ({"auto_map": {"AutoModel": EVIL}}, elsewhere(EVIL)),
    "a string": ({"auto_map": EVIL}, elsewhere(EVIL)),
    "a list": ({"auto_map": [None, EVIL]}, elsewhere(EVIL)),
    "lists in a map": ({"auto_map": {"AutoTokenizer": [None, EVIL]}}, elsewhere(EVIL)),
    "a part": ({"vision_config": {"auto_map": {"AutoModel": EVIL}}}, elsewhere(EVIL)),
    "a part of a list": ({"parts": [{"deep": {"auto_map": EVIL}}]}, elsewhere(EVIL)),
    "a pipeline": ({"custom_pipelines": {"see": {"impl": EVIL, "pt": ["AutoModel"]}}}, elsewhere(EVIL)),
    "a pipeline's model": ({"custom_pipelines": {"see": {"default": {"model": EVIL}}}}, elsewhere(EVIL)),
    "a pipeline that is a string": ({"custom_pipelines": EVIL}, elsewhere(EVIL)),
    "a pipeline of no file": (
        {"custom_pipelines": {"see": {"impl": "pipeline.See"}}},
        "names code that is not there: pipeline.See",
    ),
    "another key": ({"anything": {"at": ["all", EVIL]}}, elsewhere(EVIL)),
    "a repository of no organisation": ({"anything": "gpt2--modeling.Model"}, elsewhere("gpt2--modeling.Model")),
    "a part that comes from elsewhere": (
        {"text_config": {"auto_map": {"AutoModel": OURS}, "_name_or_path": "evil/repo"}},
        elsewhere("evil/repo"),
    ),
    "kernels": ({"attn_implementation": "evil/kernels"}, elsewhere("evil/kernels")),
    "kernels of a part": (
        {"_attn_implementation": {"": "sdpa", "text_config": "evil/kernels@main:attend"}},
        elsewhere("evil/kernels@main:attend"),
    ),
    "timm": ({"vision_config": {"architecture": "hf-hub:evil/tower"}}, elsewhere("hf-hub:evil/tower")),
    "no such file": ({"auto_map": {"AutoModel": "other.Model"}}, "names code that is not there: other.Model"),
    "no such class": (
        {"auto_map": {"AutoModel": "modeling_ms_resampler.Other"}},
        "names code that is not there: modeling_ms_resampler.Other",
    ),
    "a path": ({"auto_map": {"AutoModel": "../x.Model"}}, "names code that is not there: ../x.Model"),
    "a number": ({"auto_map": 3}, "names code that is not there: 3"),
}
FILES = ["config.json", "generation_config.json", "tokenizer_config.json", "processor_config.json", "tokenizer.json"]


@pytest.mark.parametrize("case", REFERENCES)
def test_code_of_elsewhere_is_found_in_any_json(case, folder):
    changes, problem = REFERENCES[case]
    for name in [*FILES, "preprocessor_config.json", "special_tokens_map.json", "training_record.json"]:
        file = folder / name
        before = file.read_text() if file.is_file() else None
        file.write_text(json.dumps(json.loads(before or "{}") | changes))
        assert code_problem(folder) == (name, problem)
        file.write_text(before) if before else file.unlink()
    assert code_problem(folder) is None


@pytest.mark.parametrize(
    "nothing", [None, {}, [], {"AutoModel": None}, [None, None], OURS, {"AutoModel": [OURS, None]}]
)
def test_code_of_its_own_or_none_is_well(nothing, folder):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": nothing, "attn_implementation": "sdpa"}))
    assert code_problem(folder) is None


@pytest.mark.parametrize(
    "name", ["resampler_ms_resampler.py", "packing_ms_resampler.py", "configuration_ms_resampler.py"]
)
def test_a_module_that_is_imported_and_missing_is_found(name, folder):
    (folder / name).unlink()
    file, problem = code_problem(folder)
    assert problem in (
        f"imports code that is not there: {name}",
        f"names code that is not there: {name[:-3]}.MSResamplerConfig",
    )
    assert (folder / file).is_file()


# Pickles and links


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def in_tar(mode):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=mode, format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("data.pkl"), io.BytesIO())
    return made.getvalue()


def old_tar():
    """Without the mark of newer ones, and with the checksum that belongs to it."""
    tar = in_tar("w").replace(b"ustar\x0000", bytes(8))
    head = tar[:148] + b" " * 8 + tar[156:512]
    return tar[:148] + b"%06o\0 " % sum(head) + tar[156:]


def in_zip(prefix=b""):
    made = io.BytesIO(prefix)
    with zipfile.ZipFile(made, "a") as archive:
        archive.writestr("data.pkl", pickle.dumps(Evil()))
    return made.getvalue()


def saved(save):
    made = io.BytesIO()
    save(made)
    return made.getvalue()


PICKLES = {
    **{f"protocol {number}": pickle.dumps(Evil(), number) for number in range(6)},
    **{f"data, protocol {number}": pickle.dumps({"a": [1, "b"]}, number) for number in range(6)},
    "an ordered dictionary": pickle.dumps(collections.OrderedDict(a=1), 0),
    "an instance": b"(S'true'\nios\nsystem\n.",
    "an object": b"(cos\nsystem\nS'true'\no.",
    "names as texts": b"Vos\nVsystem\n\x93(Vtrue\ntR.",
    "broken behind its call": b"cos\nsystem\n(S'true'\ntR\xff\xff",
    "with a text behind it": pickle.dumps(Evil(), 0) + b"\nMIT License\n",
    "gzip": gzip.compress(pickle.dumps(Evil())),
    "bzip2": bz2.compress(pickle.dumps(Evil())),
    "xz": lzma.compress(pickle.dumps(Evil())),
    "zlib": zlib.compress(pickle.dumps(Evil())),
    "tar": in_tar("w"),
    "an old tar": old_tar(),
    "tar and gzip": in_tar("w:gz"),
    "zip": in_zip(),
    "zip behind a text": in_zip(b"MIT License\n" * 9),
    "torch": saved(lambda made: torch.save(torch.ones(1), made)),
    "torch before 1.6": saved(lambda made: torch.save(torch.ones(1), made, _use_new_zipfile_serialization=False)),
    "NumPy": saved(lambda made: np.save(made, np.array([{}], dtype=object))),
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_under_a_harmless_name_is_refused(case, tmp_path):
    for name in ("LICENSE", "merges.txt", "tokenizer.model", "chat_template.jinja", "curves.png", "a.safetensors"):
        file = tmp_path / name
        file.write_bytes(PICKLES[case])
        with pytest.raises(ValueError, match=rf"^Nothing was sent\. {name}: a pickle or an archive"):
            inspect_files([file])


TEXTS = ["MIT License\n", "copyright\nAda\nRest.\n", "cat\nbe\nRed.\n", "1. One\n2. Two.\n", "(c) Ada.\n", "N.B.\n"]


def test_other_files_are_no_pickles(tmp_path):
    for text in TEXTS:
        (tmp_path / "LICENSE").write_text(text)
        assert not is_pickle(tmp_path / "LICENSE"), text
    for file in allowed_files(Path(TINY)):
        assert not is_pickle(file), file


def test_something_behind_a_picture_is_refused(tmp_path):
    file = tmp_path / "a.png"
    Image.new("L", (2, 2)).save(file)
    inspect_files([file])
    whole = file.read_bytes()
    for data, reason in ((whole + b"import os", "something follows the picture"), (whole[:-30], "no PNG picture")):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=rf"a\.png is damaged \({reason}\)"):
            inspect_files([file])


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_is_refused_hard_or_soft(link, folder, tmp_path):
    (tmp_path / "private").write_text("Not to be published.")
    link(tmp_path / "private", folder / "LICENSE")
    with pytest.raises(ValueError, match=r"^Nothing was sent\. LICENSE: a (hard )?link"):
        inspect_source(folder)


def test_bytes_under_the_name_of_a_text_are_refused(tmp_path):
    for data in (b"\x7fELF\x02\x01\x01\0", "Lizenz für alle".encode("latin-1"), "MIT".encode("utf-16")):
        (tmp_path / "LICENSE").write_bytes(data)
        with pytest.raises(ValueError, match="LICENSE is damaged"):
            inspect_files([tmp_path / "LICENSE"])
    (tmp_path / "a.json").write_text("[" * 5000 + "]" * 5000)
    with pytest.raises(ValueError, match=r"a\.json is damaged \(too many levels\)"):
        inspect_files([tmp_path / "a.json"])
