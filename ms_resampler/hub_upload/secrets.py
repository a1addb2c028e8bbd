"""Finds secrets in files before they are sent, and removes them from logs, warnings and errors."""

import base64
import logging
import os
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from huggingface_hub import get_token
from PIL import Image

# Secrets with a recognisable form. A scan takes linear time, because every count has an upper bound. It is fast, as
# each pattern starts with literal letters; conditions on the text before them are checked afterwards.
TOKENS = {
    "Hugging Face token": (r"hf_[A-Za-z0-9]{30}", r"api_org_[A-Za-z0-9]{30}"),
    "Private Key": (
        r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY", r"PuTTY-User-Key-File-\d", r"AGE-SECRET-KEY-1[0-9A-Z]{20}",
    ),
    "AWS Access Key": (r"AKIA[0-9A-Z]{16}(?![0-9A-Za-z])", r"ASIA[0-9A-Z]{16}(?![0-9A-Za-z])"),
    "Anthropic key": (r"sk-ant-[A-Za-z0-9_-]{20}",),
    "OpenAI key": (r"sk-(?:proj|svcacct|admin|or)-[A-Za-z0-9_-]{20}", r"sk-(?<![A-Za-z0-9]sk-)[A-Za-z0-9]{20}"),
    "Google key": (
        r"AIza(?<![A-Za-z0-9+/]AIza)[0-9A-Za-z_-]{35}", r"GOCSPX-[0-9A-Za-z_-]{20}", r"ya29\.[0-9A-Za-z_-]{20}",
    ),
    "GitHub token": (r"gh[pousr]_[A-Za-z0-9]{36}", r"github_pat_[A-Za-z0-9_]{22}"),
    "GitLab token": (r"gl(?:pat|dt|rt|cbt|ptt|ft|soat|agent|imt|oas)-[A-Za-z0-9_-]{20}",),
    "Slack token": (
        r"xox[abeoprs]-[0-9A-Za-z-]{10}", r"xapp-\d-[0-9A-Z-]{10}", r"hooks\.slack\.com/[a-z]{1,20}/[\w/+-]{20}",
    ),
    "Discord token": (r"discord(?:app)?\.com/api/webhooks/\d{10}", r"\.(?<=[MNO][\w-]{23}\.)[\w-]{6}\.[\w-]{27}"),
    "Telegram token": (r":AA(?<=\d{8}:AA)[A-Za-z0-9_-]{33}",),
    "Stripe key": (
        r"sk_(?:live|test)_[0-9A-Za-z]{16}", r"rk_(?:live|test)_[0-9A-Za-z]{16}", r"whsec_[0-9A-Za-z+/]{24}",
    ),
    "SendGrid key": (r"SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}",),
    "Mailchimp key": (r"-us(?<=[0-9a-f]{32}-us)\d{1,2}(?![\w-])",),
    "Twilio key": (
        r"AC(?<![0-9A-Za-z]AC)[0-9a-f]{32}(?![0-9A-Za-z])", r"SK(?<![0-9A-Za-z]SK)[0-9a-f]{32}(?![0-9A-Za-z])",
    ),
    "Square token": (r"sq0[a-z]{3}-[0-9A-Za-z_-]{22}",),
    "npm token": (r"npm_[A-Za-z0-9]{36}",),
    "PyPI token": (r"pypi-AgE[A-Za-z0-9_-]{20}",),
    "Artifactory token": (r"AKCp(?<![A-Za-z0-9+/]AKCp)[A-Za-z0-9]{60}",),
    "Azure key": (r"AccountKey=[A-Za-z0-9+/]{40}", r"SharedAccessKey=[A-Za-z0-9+/]{40}"),
    "Databricks token": (r"dapi[0-9a-f]{32}",),
    "DigitalOcean token": (r"do[opr]_v1_[0-9a-f]{40}",),
    "Vault token": (r"hvs\.[A-Za-z0-9_-]{24}",),
    "Shopify token": (r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}",),
    "Groq key": (r"gsk_[A-Za-z0-9]{40}",),
    "Replicate token": (r"r8_[A-Za-z0-9]{37}",),
    "Perplexity key": (r"pplx-[A-Za-z0-9]{40}",),
    "xAI key": (r"xai-[A-Za-z0-9]{40}",),
    "NVIDIA key": (r"nvapi-[A-Za-z0-9_-]{40}",),
    "Weights & Biases key": (r"wandb_v1_[A-Za-z0-9_]{20}",),
    "Kaggle token": (r"KGAT_[0-9a-f]{32}",),
    "JSON Web Token": (r"eyJhbGciOi[A-Za-z0-9_-]{10}", r"\.eyJ(?<=[A-Za-z0-9_-]{10}\.eyJ)[A-Za-z0-9_-]{10}"),
}  # fmt: skip

# Secrets recognised by the words around them, in any case. Placeholders and code expressions are excluded.
WORDS = (
    "password", "passwd", "passphrase", "pwd", "secret", "credential", "api[_-]?key", "api[_-]?token",
    "access[_-]?(?:key|token)", "auth[_-]?(?:key|token)", "private[_-]?key", "hf[_-]?token",
)  # fmt: skip
QUOTE = r"\\?[\"']"
VALUE = r"(?!none|null|true|false|your|example|placeholder|redacted|hidden|xxx|os\.|env)[a-z0-9!#&*+/?@^_~-]"
ASSIGNED = (
    rf"[a-z0-9_-]{{0,20}}+(?:{QUOTE})?+(?:"
    rf" {{0,4}}+(?::=|=>|[=:]) {{0,4}}+{QUOTE}{VALUE}[^\s\"'\\]{{3,99}}{QUOTE}"  # "password": "hunter2"
    rf"|=(?=[^\s()\[\].]{{4}}){VALUE}[^\s()\[\]\"'<>{{}}]{{3}}"  # PASSWORD=hunter2
    # password: hunter2, with a digit and a letter: after a colon, words and token counts are common
    rf"| {{0,4}}+[=:] {{1,4}}+(?=\S{{0,99}}\d)(?=[\d_-]{{0,99}}[a-z]){VALUE}[^\s()\[\]\"',<>{{}}]{{5,99}}(?!\S))"
)
IN_CONTEXT = {
    "Basic Auth Credentials": (
        r"://[^\s/:@\"'<>{}$\\]{1,64}:[^\s/@\"'<>{}$\\]{3,64}@[a-z0-9]", r"://[a-z0-9_-]{20,64}@[a-z0-9]",
    ),
    "signed address": tuple(
        rf"{mark}(?:access_token|auth|auth_token|token|api_?key|key|sig|signature|x-amz-signature|password|secret)="
        r"(?=[^\s&\"']{0,40}\d)[\w%.~+/-]{8}"
        for mark in (r"\?", "&")
    ),
    "Bearer token": (
        r"bearer[ :=]{1,3}(?=\S{0,40}\d)[\w.~+/-]{16}",
        rf"authorization(?:{QUOTE})?[ :=]{{1,3}}(?:{QUOTE})?(?:basic|token) [\w.~+/=-]{{8}}",
    ),
    "Weights & Biases key": (r"wandb[\w.\"' :=(-]{0,40}(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])",),
    "Kaggle token": (r"\"username\": {0,9}\"[^\"]{1,64}\",\s{0,9}\"key\": {0,9}\"[0-9a-f]{32}\"",),
    "netrc entry": (r"machine\s{1,9}\S{1,99}\s{1,9}login\s{1,9}\S{1,99}\s{1,9}password\s{1,9}\S{4}",),
    "Secret Keyword": tuple(word + ASSIGNED for word in WORDS),
}  # fmt: skip


def compiled(table: dict[str, tuple[str, ...]]) -> list[tuple[str, re.Pattern[bytes]]]:
    """The kinds and patterns of a table, as patterns of bytes."""
    return [(kind, re.compile(pattern.encode())) for kind, patterns in table.items() for pattern in patterns]


TOKEN_BYTES, CONTEXT_BYTES = compiled(TOKENS), compiled(IN_CONTEXT)
SHOWN = re.compile(
    r"(?P<kept>\bBearer |https?://[^\s?'\"<>]+\?)[^\s'\"<>]+"  # credentials; an address's query, which may sign it
    rf"|\b(?:hf|api_org)_\w{{8,}}|(?:{'|'.join(chain.from_iterable(TOKENS.values()))})[\w.~+/=-]*"
)
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
OWN_SECRETS = re.compile(r"(?:^|_)(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD)$")  # names of environment variables


def find_token(data: bytes) -> tuple[str, int] | None:
    """The kind and place of the first secret with a recognisable form, or of one that this process uses."""
    own = [value for name, value in os.environ.items() if OWN_SECRETS.search(name) and len(value) >= 8]
    for kind, values in (("Hugging Face token", [get_token() or ""]), ("secret of this environment", own)):
        for value in filter(None, values):
            if (place := data.find(value.encode())) >= 0:
                return kind, place
    return first_match(TOKEN_BYTES, data)


def holds_token(
    file: Path, *, block: int = 2**22, progress: Callable[[int], object] = lambda size: None
) -> tuple[str, None] | None:
    """The kind of a token in the bytes of a file of any size, also across two blocks."""
    rest = b""
    with file.open("rb") as opened:
        while data := opened.read(block):
            if found := find_token(rest + data):
                return found[0], None
            rest = data[-256:]
            progress(len(data))
    return None


def texts_of(file: Path) -> Iterator[bytes]:
    """The readable text of a file: the header of weights, the metadata of a picture, or everything."""
    if file.suffix == ".safetensors":
        with file.open("rb") as opened:
            yield opened.read(int.from_bytes(opened.read(8), "little"))
    elif file.suffix in PICTURES:
        with Image.open(file) as picture:
            picture.load()  # metadata may follow the pixels
            for name, note in picture.info.items():
                yield str(name).encode() + b": " + (note if isinstance(note, bytes) else str(note).encode())
    else:
        yield file.read_bytes()


def first_match(patterns: list[tuple[str, re.Pattern[bytes]]], data: bytes) -> tuple[str, int] | None:
    """The first kind that is found, and where."""
    return next(((kind, found.start()) for kind, pattern in patterns if (found := pattern.search(data))), None)


def find_secret(data: bytes) -> tuple[str, int | None] | None:
    """The kind of a secret in a text and its line, or None for the line if it is encoded; None if there is none."""
    if found := find_token(data) or first_match(CONTEXT_BYTES, data.lower()):
        kind, place = found
        return kind, data.count(b"\n", 0, place) + 1
    return next(((found[0], None) for view in decoded(data) if (found := find_token(view))), None)


def decoded(data: bytes) -> Iterator[bytes]:
    """A text decoded from UTF-16, URL, JSON and HTML escapes, base64 and hexadecimal digits."""
    if b"\0" in data:
        yield data.replace(b"\0", b"")
    if re.search(rb"%[4-7][0-9a-fA-F]", data):
        yield unquote_to_bytes(data)
    escaped = rb"\\u00([0-9a-fA-F]{2})|\\x([0-9a-fA-F]{2})|&#x([0-9a-fA-F]{2});"
    if re.search(escaped, data):
        yield re.sub(escaped, lambda match: bytes.fromhex(next(filter(None, match.groups())).decode()), data)
    if re.search(rb"&#\d{2,3};", data):
        yield re.sub(rb"&#(\d{2,3});", lambda match: bytes([int(match[1]) % 256]), data)
    joined = data.translate(bytes.maketrans(b"-_", b"+/"), b"\r\n")
    yield from aligned(re.findall(rb"[A-Za-z0-9+/]{20,}", joined), 4, base64.b64decode)
    yield from aligned(re.findall(rb"[0-9a-fA-F]{40,}", joined), 2, lambda run: bytes.fromhex(run.decode()))


def aligned(runs: list[bytes], step: int, decode: Any) -> Iterator[bytes]:
    """All runs decoded, from each position at which a group of `step` digits may begin."""
    for start in range(step if runs else 0):
        yield b"\n".join(decode(run[start : start + (len(run) - start) // step * step]) for run in runs)


def redact(text: str) -> str:
    """The text without tokens and without the query strings of URLs."""
    token = get_token()
    if token:
        text = text.replace(token, "[hidden]")
    return SHOWN.sub(lambda match: (match["kept"] or "") + "[hidden]", text)


@contextmanager
def redacted() -> Iterator[None]:
    """Within this context, no log record and no warning of this process shows a secret.

    The client's retry warnings print signed URLs. Records are cleaned when they are created, so that it does not
    matter which library's handler writes them.
    """
    make_record, show_warning = logging.getLogRecordFactory(), warnings.showwarning

    def make_clean_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        record.msg, record.args = redact(record.getMessage()), None
        if record.exc_info and record.exc_info[0]:
            record.exc_text = redact("".join(traceback.format_exception(*record.exc_info)))
            record.exc_info = None
        return record

    def show_clean_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        show_warning(redact(str(message)), *args, **kwargs)

    logging.setLogRecordFactory(make_clean_record)
    warnings.showwarning = show_clean_warning
    try:
        yield
    finally:
        logging.setLogRecordFactory(make_record)
        warnings.showwarning = show_warning
