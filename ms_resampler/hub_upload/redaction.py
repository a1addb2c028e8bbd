"""Keeps tokens and signed addresses out of everything that is logged, warned of or raised."""

import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import get_token

SECRETS = re.compile(
    r"(?P<kept>\bBearer |https?://[^\s?'\"<>]+\?)[^\s'\"<>]+"  # credentials; an address's query, which may sign it
    r"|\b(?:hf|api_org)_\w{8,}"
)


def redact(text: str) -> str:
    """The text without tokens and without the queries of addresses."""
    token = get_token()
    if token:
        text = text.replace(token, "[hidden]")
    return SECRETS.sub(lambda match: (match["kept"] or "") + "[hidden]", text)


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
