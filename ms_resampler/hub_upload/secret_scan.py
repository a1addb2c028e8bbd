"""Secrets, found before they leave this machine: by detect-secrets, and by looking for Hub tokens in every byte."""

import re
from pathlib import Path

from detect_secrets.core.scan import scan_file
from detect_secrets.settings import transient_settings
from huggingface_hub import get_token

from . import hub_token_detector
from .hub_token_detector import HUB_TOKEN

# Detectors of what has a shape of its own. Those of high entropy would find every hash in a record.
SECRET_DETECTORS = (
    "ArtifactoryDetector", "AWSKeyDetector", "AzureStorageKeyDetector", "BasicAuthDetector", "DiscordBotTokenDetector",
    "GitHubTokenDetector", "GitLabTokenDetector", "JwtTokenDetector", "KeywordDetector", "MailchimpDetector",
    "NpmDetector", "OpenAIDetector", "PrivateKeyDetector", "PypiTokenDetector", "SendGridDetector", "SlackDetector",
    "SquareOAuthDetector", "StripeDetector", "TelegramBotTokenDetector", "TwilioKeyDetector",
)  # fmt: skip


def check_secrets(file: Path) -> None:
    """Raises ValueError, without repeating it, if a file holds something that looks like a secret."""
    if holds_token(file):
        raise ValueError(f"Nothing was sent. {file.name} holds a Hugging Face token: remove it, and revoke it.")
    if file.suffix in (".safetensors", ".png") or file.name in ("tokenizer.json", "vocab.json", "merges.txt"):
        return
    ours = {"name": "HubTokenDetector", "path": f"file://{hub_token_detector.__file__}"}
    with transient_settings({"plugins_used": [*({"name": name} for name in SECRET_DETECTORS), ours]}):
        for secret in scan_file(str(file)):
            where = f"{file.name}, line {secret.line_number}"
            raise ValueError(f"Nothing was sent. {where}, looks like a secret ({secret.type}): remove it.")


def holds_token(file: Path, block: int = 2**22) -> bool:
    """Whether the bytes of a file, of whatever kind, hold a token: any of the Hub's form, or the one in use."""
    patterns, known = [HUB_TOKEN.pattern.encode()], get_token()
    if known:
        patterns.append(re.escape(known.encode()))
    pattern, rest = re.compile(b"|".join(patterns)), b""
    with file.open("rb") as opened:
        while data := opened.read(block):
            if pattern.search(rest + data):
                return True
            rest = data[-256:]
    return False
