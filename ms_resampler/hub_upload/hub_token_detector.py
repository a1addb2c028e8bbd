"""A plugin for detect-secrets: it knows the tokens of many services, and not those of the Hugging Face Hub."""

import re

from detect_secrets.plugins.base import RegexBasedDetector

HUB_TOKEN = re.compile(r"(?:hf|api_org)_[A-Za-z0-9]{30,}")


class HubTokenDetector(RegexBasedDetector):
    """Finds tokens of users and organisations."""

    secret_type = "Hugging Face token"
    denylist = (HUB_TOKEN,)
