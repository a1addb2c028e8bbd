"""Secrets: found in files before they leave this machine, and struck out of what is logged, warned of or raised."""

import base64
import logging
import os
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from huggingface_hub import get_token

# What has a shape of its own, wherever it is found. Every count has an upper bound, so that a scan takes linear time.
TOKENS = {
    "Hugging Face token": r"hf_[A-Za-z0-9]{30}|api_org_[A-Za-z0-9]{30}",
    "Private Key": r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY|PuTTY-User-Key-File-\d|AGE-SECRET-KEY-1[0-9A-Z]{20}",
    "AWS Access Key": r"A(?:KIA|SIA|BIA|CCA)[0-9A-Z]{16}(?![0-9A-Za-z])",
    "Anthropic key": r"sk-ant-[A-Za-z0-9_-]{20}",
    "OpenAI key": r"sk-(?:proj|svcacct|admin|or)-[A-Za-z0-9_-]{20}|(?<![A-Za-z0-9])sk-[A-Za-z0-9]{20}",
    "Google key": r"AIza[0-9A-Za-z_-]{35}|GOCSPX-[0-9A-Za-z_-]{20}|ya29\.[0-9A-Za-z_-]{20}",
    "GitHub token": r"gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22}",
    "GitLab token": r"gl(?:pat|dt|rt|cbt|ptt|ft|soat|agent|imt|oas)-[A-Za-z0-9_-]{20}",
    "Slack token": r"xox[abeoprs]-[0-9A-Za-z-]{10}|xapp-\d-[0-9A-Z-]{10}|hooks\.slack\.com/[a-z]{1,20}/[\w/+-]{20}",
    "Discord token": r"discord(?:app)?\.com/api/webhooks/\d{10}|(?<=[MNO][\w-]{23})\.[\w-]{6}\.[\w-]{27}",
    "Telegram token": r"(?<=\d{8}):AA[A-Za-z0-9_-]{33}",
    "Stripe key": r"[rs]k_(?:live|test)_[0-9A-Za-z]{16}|whsec_[0-9A-Za-z+/]{24}",
    "SendGrid key": r"SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}",
    "Mailchimp key": r"(?<=[0-9a-f]{32})-us\d{1,2}(?![\w-])",
    "Twilio key": r"(?<![0-9A-Za-z])(?:AC|SK)[0-9a-f]{32}(?![0-9A-Za-z])",
    "Square token": r"sq0[a-z]{3}-[0-9A-Za-z_-]{22}",
    "npm token": r"npm_[A-Za-z0-9]{36}",
    "PyPI token": r"pypi-AgE[A-Za-z0-9_-]{20}",
    "Artifactory token": r"AKCp[A-Za-z0-9]{20}",
    "Azure key": r"(?:Account|SharedAccess)Key=[A-Za-z0-9+/]{40}",
    "Databricks token": r"dapi[0-9a-f]{32}",
    "DigitalOcean token": r"do[opr]_v1_[0-9a-f]{40}",
    "Vault token": r"hvs\.[A-Za-z0-9_-]{24}",
    "Shopify token": r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}",
    "model provider's key": r"gsk_[A-Za-z0-9]{40}|r8_[A-Za-z0-9]{37}|pplx-[A-Za-z0-9]{40}|xai-[A-Za-z0-9]{40}|"
    r"nvapi-[A-Za-z0-9_-]{40}|wandb_v1_[A-Za-z0-9_]{20}|KGAT_[0-9a-f]{32}",
    "JSON Web Token": r"eyJhbGciOi[A-Za-z0-9_-]{10}|(?<=[A-Za-z0-9_-]{10})\.eyJ[A-Za-z0-9_-]{10}",
}  # fmt: skip

# What is a secret by the words around it. A placeholder is none, nor is an expression of code or the number of a token.
WORDS = r"(?:passw(?:or)?d|passphrase|pwd|secret|credential|(?:api|access|auth|secret|private|hf)[_-]?(?:key|token))"
PLACEHOLDER = r"none|null|true|false|your|example|placeholder|redacted|hidden|xxx|os\.|env"
ASSIGNED = rf"{WORDS}[A-Za-z0-9_-]{{0,20}}(?:\\?[\"'])?"
VALUE = rf"(?!{PLACEHOLDER})[A-Za-z0-9!#&*+/?@^_~-]"
IN_CONTEXT = {
    "Basic Auth Credentials": r"://(?:[^\s/:@\"'<>{}$\\]{1,64}:[^\s/@\"'<>{}$\\]{3,64}|[A-Za-z0-9_-]{20,64})@[A-Za-z0-9]",
    "signed address": r"[?&](?:access_token|auth|auth_token|token|api_?key|key|sig|signature|X-Amz-Signature|password|"
    r"secret)=(?=[^\s&\"']{0,40}\d)[\w%.~+/-]{8}",
    "Bearer token": r"bearer[ :=]{1,3}(?=\S{0,40}\d)[\w.~+/-]{16}"
    r"|authorization\\?[\"']?[ :=]{1,3}\\?[\"']?(?:basic|token) [\w.~+/=-]{8}",
    "Weights & Biases key": r"wandb[\w.\"' :=(-]{0,40}(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])",
    "netrc entry": r"machine\s{1,9}\S{1,99}\s{1,9}login\s{1,9}\S{1,99}\s{1,9}password\s{1,9}\S{4}",
    "Secret Keyword": rf"{ASSIGNED}[ ]{{0,4}}(?::?=|:|=>)[ ]{{0,4}}\\?([\"']){VALUE}[^\s\"'\\]{{3,99}}\\?\1"
    rf"|{WORDS}=(?=[^\s()\[\].]{{4}}){VALUE}[^\s()\[\]\"'<>{{}}]{{3}}"
    rf"|{ASSIGNED}[ ]{{0,4}}[=:][ ]{{1,4}}(?=\S{{0,99}}\d)(?=[\d_-]{{0,99}}[A-Za-z]){VALUE}"
    r"[^\s()\[\]\"',<>{}]{5,99}(?!\S)",
}  # fmt: skip


def compiled(patterns: dict[str, str], flags: int = 0) -> dict[str, re.Pattern[bytes]]:
    """The patterns as patterns of bytes."""
    return {kind: re.compile(pattern.encode(), flags) for kind, pattern in patterns.items()}


TOKEN_BYTES, CONTEXT_BYTES = compiled(TOKENS), compiled(IN_CONTEXT, re.IGNORECASE)
SHOWN = re.compile(
    r"(?P<kept>\bBearer |https?://[^\s?'\"<>]+\?)[^\s'\"<>]+"  # credentials; an address's query, which may sign it
    rf"|\b(?:hf|api_org)_\w{{8,}}|(?:{'|'.join(TOKENS.values())})[\w.~+/=-]*"
)
OWN_SECRETS = re.compile(r"(?:^|_)(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD)$")  # names of environment variables


def find_token(data: bytes) -> tuple[str, int] | None:
    """The kind and place of the first secret with a shape of its own, or of one that this process has in use."""
    own = [value for name, value in os.environ.items() if OWN_SECRETS.search(name) and len(value) >= 8]
    for kind, values in (("Hugging Face token", [get_token() or ""]), ("secret of this environment", own)):
        for value in filter(None, values):
            if (place := data.find(value.encode())) >= 0:
                return kind, place
    return first_match(TOKEN_BYTES, data)


def holds_token(file: Path, block: int = 2**22) -> tuple[str, None] | None:
    """The kind of a token in the bytes of a file of any size, tokens across two blocks included."""
    rest = b""
    with file.open("rb") as opened:
        while data := opened.read(block):
            if found := find_token(rest + data):
                return found[0], None
            rest = data[-256:]
    return None


def first_match(patterns: dict[str, re.Pattern[bytes]], data: bytes) -> tuple[str, int] | None:
    """The first kind that is found, and where."""
    return next(((kind, found.start()) for kind, pattern in patterns.items() if (found := pattern.search(data))), None)


def find_secret(data: bytes) -> tuple[str, int | None] | None:
    """The kind of a secret in a text and its line, or None for the line if it is encoded; None if there is none."""
    if found := find_token(data) or first_match(CONTEXT_BYTES, data):
        kind, place = found
        return kind, data.count(b"\n", 0, place) + 1
    return next(((found[0], None) for view in decoded(data) if (found := find_token(view))), None)


def decoded(data: bytes) -> Iterator[bytes]:
    """What a text says in other codes: UTF-16, escapes of URLs, JSON and HTML, base64 and hexadecimal digits."""
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
    """All runs decoded, from each place at which a group of `step` digits may begin."""
    for start in range(step if runs else 0):
        yield b"\n".join(decode(run[start : start + (len(run) - start) // step * step]) for run in runs)


def redact(text: str) -> str:
    """The text without tokens and without the queries of addresses."""
    token = get_token()
    if token:
        text = text.replace(token, "[hidden]")
    return SHOWN.sub(lambda match: (match["kept"] or "") + "[hidden]", text)


@contextmanager
def redacted() -> Iterator[None]:
    """As long as this lasts, no log record and no warning of this process shows a secret.

    The client's own retry warnings print signed addresses. Records are cleaned where they are made, so that it does
    not matter which handler, of which library, writes them.
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
