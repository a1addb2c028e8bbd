"""Secrets and personal data: found or cleaned in every kind of file, in plain and encoded, and never repeated."""

import base64
import json
import random
import zlib
from urllib.parse import quote

import numpy as np
import pytest
from components import TOKENIZERS
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file

from ms_resampler.folders import remote_code_files
from ms_resampler.hub_upload.inspect import check_secrets, inspect_files
from ms_resampler.hub_upload.personal import clean_json, personal_notes
from ms_resampler.hub_upload.secrets import find_secret, holds_token, redact

LETTERS = "aB3dE5gH7jK9mN1pQ2sT4vW6yZ8" * 5
HUB_TOKEN = "hf_" + LETTERS[:34]
HEX = "0123456789abcdef" * 4
SECRETS = {
    "Hub": HUB_TOKEN,
    "organisation": "api_org_" + LETTERS[:34],
    "private key": "-----BEGIN OPENSSH PRIVATE KEY-----\\nb3BlbnNzaC1rZXk",
    "encrypted key": "-----BEGIN ENCRYPTED PRIVATE KEY-----",
    "PGP": "-----BEGIN PGP PRIVATE KEY BLOCK-----",
    "AWS": "AKIA" + "Z7QW" * 4,
    "AWS, temporary": "ASIA" + "Z7QW" * 4,
    "AWS secret": "aws_secret_access_key = " + LETTERS[:40],
    "Anthropic": "sk-ant-api03-" + LETTERS[:40],
    "OpenAI": "sk-" + LETTERS[:48],
    "OpenAI project": "sk-proj-" + LETTERS[:20] + "_-" + LETTERS[:20],
    "OpenRouter": "sk-or-v1-" + HEX,
    "Google": "AIza" + LETTERS[:35],
    "GitHub": "ghp_" + LETTERS[:36],
    "GitHub, fine": "github_pat_" + LETTERS[:22] + "_" + LETTERS[:59],
    "GitLab": "glpat-" + LETTERS[:20],
    "Slack": "xoxb-123456789012-" + LETTERS[:24],
    "Stripe": "sk_live_" + LETTERS[:24],
    "SendGrid": f"SG.{LETTERS[:22]}.{LETTERS[:43]}",
    "Twilio": "AC" + HEX[:32],
    "Telegram": "1234567890:AA" + LETTERS[:33],
    "Mailchimp": HEX[:32] + "-us12",
    "npm": "npm_" + LETTERS[:36],
    "PyPI": "pypi-AgEIcHlwaS5vcmc" + LETTERS[:60],
    "Azure": "AccountKey=" + LETTERS[:86] + "==",
    "JSON Web Token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0." + LETTERS[:43],
    "W&B in a variable": "WANDB_API_KEY=" + HEX[:40],
    "W&B in a netrc": "machine api.wandb.ai login user password " + HEX[:40],
    "W&B in a call": f"wandb.login(key='{HEX[:40]}')",
    "user and password": "https://ada:hunter2@git.example.org/models",
    "token as a user": f"https://{LETTERS[:30]}@git.example.org/models",
    "signed address": "https://files.example.org/a?X-Amz-Signature=" + HEX,
    "token in an address": "https://files.example.org/a?x=1&access_token=" + LETTERS[:20],
    "Kaggle": '{"username": "ada", "key": "' + HEX[:32] + '"}',
    "bearer": "Authorization: Bearer " + LETTERS[:32],
    "basic": "Authorization: Basic YWRhOmh1bnRlcjI=",
    "password": "PASSWORD=hunter2",
    "exported": "export DB_PASSWORD=correct-horse",
    "YAML": "db_password: hunter2",
    "Python": "api_key = 'correct-horse'",
}


@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt", "LICENSE"])
def test_a_secret_of_any_kind_is_found_and_not_repeated(kind, name, tmp_path):
    """As a token of the vocabulary, as a line of merges, and in a file of any text."""
    secret, file = SECRETS[kind], tmp_path / name
    text = '{"model": {"vocab": {"a": 0, " %s ": 1}}}' if name == "tokenizer.json" else "a b\n%s\nc"
    file.write_text(text % secret)
    with pytest.raises(ValueError, match=rf"^Nothing was sent\. {name}") as refused:
        check_secrets(file)
    assert secret not in str(refused.value)
    for part in secret.replace("=", " ").replace("'", " ").split():
        assert len(part) < 12 or part not in str(refused.value)
    file.write_text(text % "nothing")
    check_secrets(file)


ENCODED = {
    "base64": lambda secret: base64.b64encode(secret).decode(),
    "base64 in base64's lines": lambda secret: base64.encodebytes(b"user name:" * 5 + secret).decode(),
    "base64 for addresses": lambda secret: base64.urlsafe_b64encode(b"\xff\xfe?" + secret).decode(),
    "behind other letters": lambda secret: "path/to" + base64.b64encode(b"x" + secret).decode(),
    "hexadecimal": lambda secret: "0" + secret.hex(),
    "percent signs": lambda secret: "".join(f"%{byte:02X}" for byte in secret),
    "an address": lambda secret: quote(secret.replace(b"_", b"%5F"), safe="%"),
    "JSON": lambda secret: "".join(f"\\u{byte:04x}" for byte in secret),
    "Python": lambda secret: "".join(f"\\x{byte:02x}" for byte in secret),
    "HTML": lambda secret: "".join(f"&#{byte};" for byte in secret),
    "HTML, hexadecimal": lambda secret: "".join(f"&#x{byte:02x};" for byte in secret),
    "UTF-16": lambda secret: secret.decode().encode("utf-16").decode("latin-1"),
}


@pytest.mark.parametrize("code", ENCODED)
@pytest.mark.parametrize("secret", ["Hub", "Anthropic", "private key"])
def test_an_encoded_secret_is_found(code, secret):
    text = ENCODED[code](SECRETS[secret].encode()).encode("latin-1")
    assert find_secret(b"one two " + text + b" three")
    assert not find_secret(
        b"one two " + ENCODED[code](b"just some words, many of them, and no secret").encode("latin-1")
    )


def picture(**options):
    return lambda file: Image.new("RGB", (2, 2)).save(file, **options)


def notes(compressed):
    made = PngImagePlugin.PngInfo()
    made.add_itxt("comment", f"by {HUB_TOKEN}", zip=compressed)
    return made


def exif():
    made = Image.Exif()
    made[0x010E] = HUB_TOKEN
    return made


def deflated():
    made = PngImagePlugin.PngInfo()
    made.add(b"zTXt", b"comment\0\0" + zlib.compress(HUB_TOKEN.encode()))
    return made


HIDDEN = {
    "weights' metadata": ("a.safetensors", lambda file: save_file({"a": np.ones(1)}, file, {"by": HUB_TOKEN})),
    "weights' names": ("a.safetensors", lambda file: save_file({HUB_TOKEN: np.ones(1)}, file)),
    "weights' numbers": (
        "a.safetensors",
        lambda file: save_file({"a": np.frombuffer(HUB_TOKEN.encode(), np.uint8)}, file),
    ),
    "a password in metadata": (
        "a.safetensors",
        lambda file: save_file({"a": np.ones(1)}, file, {"by": "ada", "password": "hunter2x"}),
    ),
    "a picture's text": ("a.png", picture(pnginfo=notes(False))),
    "a picture's packed text": ("a.png", picture(pnginfo=notes(True))),
    "a picture's old packed text": ("a.png", picture(pnginfo=deflated())),
    "a picture's EXIF": ("a.png", picture(exif=exif())),
    "a photograph's EXIF": ("a.jpg", picture(exif=exif())),
    "lines of JSON": ("a.jsonl", lambda file: file.write_text('{"a": 1}\n{"key": "' + HUB_TOKEN + '"}\n')),
    "a notebook": ("a.ipynb", lambda file: file.write_text(json.dumps({"cells": [{"source": [HUB_TOKEN]}]}))),
    "its name": (f"{HUB_TOKEN}.png", picture()),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_a_secret_is_found_wherever_a_file_can_hold_one(case, tmp_path):
    name, write = HIDDEN[case]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=r"^Nothing was sent\.") as refused:
        check_secrets(tmp_path / name)
    assert HUB_TOKEN not in str(refused.value)


def test_secrets_of_the_environment_are_found_whatever_their_form(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_API_KEY", "an unusual key")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "an unusual word")
    (tmp_path / "LICENSE").write_text("Ask me: an unusual word.")
    check_secrets(tmp_path / "LICENSE")
    (tmp_path / "LICENSE").write_text("Ask me: an unusual key.")
    with pytest.raises(ValueError, match=r"LICENSE, line 1, looks like a secret \(secret of this environment\)"):
        check_secrets(tmp_path / "LICENSE")


def test_a_token_across_two_blocks_is_found(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 90 + HUB_TOKEN.encode() + b"x")
    assert holds_token(tmp_path / "file", block=100)
    (tmp_path / "file").write_bytes(b"x" * 90 + HUB_TOKEN.encode()[:20] + b"\nx")
    assert not holds_token(tmp_path / "file", block=100)


def vocabulary(size):
    """Tokens as byte-level and SentencePiece models have them, those around passwords in programs among them."""
    draw = random.Random(0)
    starts = ["", "Ġ", "▁", "ĠĠ", ".", "_", "-", "=", '"', "'", "/", "{", "<|", "://", "@", "?"]
    ends = ["", "=", ":", '":', "='", '="', " =", "_", "-", "(", ");", ".com", "@", "|>", ":{", "://"]
    words = [
        "password",
        "Password",
        "secret",
        "token",
        "api_key",
        "hf",
        "sk",
        "Bearer",
        "ghp",
        "AKIA",
        "PRIVATE",
        "key",
    ]
    tokens = {start + word + end: None for start in starts for word in words for end in ends}
    while len(tokens) < size:
        letters = "".join(
            draw.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_", k=draw.randint(1, 12))
        )
        tokens[draw.choice(starts) + letters + draw.choice(ends)] = None
    return list(tokens)


def test_a_vocabulary_of_50_000_tokens_is_no_secret(tmp_path):
    tokens = vocabulary(50_000)
    merges = [(token[: len(token) // 2], token[len(token) // 2 :]) for token in tokens]
    ids = {token: number for number, token in enumerate(tokens)}
    model = {"model": {"type": "BPE", "vocab": ids, "merges": merges}}
    for indent in (None, 2):
        for name, value in {"tokenizer.json": model, "vocab.json": ids}.items():
            (tmp_path / name).write_text(json.dumps(value, indent=indent, ensure_ascii=False), encoding="utf-8")
        (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)), encoding="utf-8")
        inspect_files(tmp_path.iterdir())
    for kind in TOKENIZERS:
        TOKENIZERS[kind]().save_pretrained(tmp_path / kind)
        inspect_files((tmp_path / kind).iterdir())


def test_the_code_that_is_published_is_no_secret():
    inspect_files(remote_code_files())


@pytest.mark.slow
@pytest.mark.parametrize(
    "piece",
    ["a", "eyJ", "sk-", "hf_", "pwd", "password ", "://a:b", "-----BEGIN ", "machine x login ", "%41", "a\n", "?key="],
)
def test_a_scan_takes_linear_time(piece):
    """Ten megabytes of what patterns begin with: anything but linear time would take hours."""
    assert find_secret((piece * (10_000_000 // len(piece))).encode()) is None


def test_what_is_found_is_also_struck_out_of_messages():
    for kind in ("Hub", "AWS", "Anthropic", "OpenAI project", "GitHub", "GitLab", "Slack", "PyPI", "SendGrid"):
        said = redact(f"It failed with {SECRETS[kind]}, sadly.")
        assert said == "It failed with [hidden], sadly.", kind


# Personal data


def test_folders_hosts_and_addresses_are_cleaned_out_of_json(tmp_path):
    record = {
        "model": "/home/ada/models/base/",
        "data": {"source": "~/data/a.json", "url": "https://a.b/c", "windows": "C:\\Users\\ada\\b.json"},
        "command": "python /home/ada/train.py --data=/Users/ada/x/c.json --lr 1e-3",
        "host": "workstation",
        "note": "ask ada.lovelace@example.org on gpu01.corp",
        "first": {"/home/ada/d.png": "no picture"},
        "n": 1,
        "ids": "org/name",
    }
    file = tmp_path / "training_record.json"
    file.write_text(json.dumps(record))
    clean_json(file, record=True)
    assert json.loads(file.read_text()) == {
        "model": "base",
        "data": {"source": "a.json", "url": "https://a.b/c", "windows": "b.json"},
        "command": "python train.py --data=c.json --lr 1e-3",
        "host": "[hidden]",
        "note": "ask [e-mail] on [host]",
        "first": {"d.png": "no picture"},
        "n": 1,
        "ids": "org/name",
    }
    config = {"name_or_path": "/mnt/models/base", "chat_template": "/home/ada/x", "eos_token": "/a/b", "note": "/think"}
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(config))
    clean_json(file)
    assert json.loads(file.read_text()) == config | {"name_or_path": "base"}
    before = file.read_bytes()
    clean_json(file)
    assert file.read_bytes() == before


def test_what_is_left_of_personal_data_is_named(tmp_path):
    (tmp_path / "README.md").write_text(
        "# A model\n\nTrained in /home/ada/runs, on gpu01.internal.\nAsk ada@example.org.\n"
    )
    (tmp_path / "LICENSE").write_text("Free for all @ home, at 3.5 and /usr/share.\n")
    assert list(personal_notes(sorted(tmp_path.iterdir()))) == [
        "README.md, line 3: a home folder",
        "README.md, line 4: an e-mail address",
        "README.md, line 3: a host name",
    ]
