"""Decides which errors the user can fix, shown as one sentence; all others are bugs and keep their traceback."""

import dis
from pathlib import Path
from types import FrameType

OURS = ("ms_resampler", "ms_resampler_cli", "research")
LOADERS = ("transformers", "huggingface_hub")  # whose OSErrors say what could not be found or downloaded
PACKAGE = Path(__file__).resolve().parent.with_name("ms_resampler")

# The extras that install a module, the most used first.
EXTRAS = {
    "av": ["video"],
    "bitsandbytes": ["qlora"],
    "datasets": ["train", "eval"],
    "gguf": ["gguf", "small"],
    "gradio": ["demo"],
    "liger_kernel": ["liger"],
    "lmms_eval": ["lmms"],
    "matplotlib": ["train", "eval", "pictures"],
    "openpyxl": ["eval"],
    "peft": ["train", "small"],
    "pillow_heif": ["demo"],
    "pypdfium2": ["pictures"],
    "resvg_py": ["pictures"],
    "scipy": ["eval"],
    "sklearn": ["train", "eval", "pictures"],
}
# For modules of several extras.
COMMAND_EXTRAS = {"evaluate": "eval", "pictures": "pictures", "small": "small", "study": "eval"}


def sentence_for(error: Exception, command: str) -> str | None:
    """The message for an error that the user can fix; None for a bug.

    The user can fix a ValueError or OSError that a `raise` statement of this project made, system errors about files
    outside the package, files that transformers and huggingface_hub could not find or download, wrong values of
    configuration fields, and missing packages of an extra.
    """
    module, raises = origin(error)
    if isinstance(error, ImportError):
        return missing_package(error, command)
    if type(error).__name__.startswith("StrictDataclass"):  # huggingface_hub's, which is slow to import
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return None if in_package(error.filename) else system_sentence(error)
    if raises and isinstance(error, ValueError | OSError) and module in OURS:
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    if raises and isinstance(error, OSError) and module in LOADERS:
        return " ".join(str(error).split())
    return None


def origin(error: Exception) -> tuple[str, bool]:
    """The top-level package that an error comes from, and whether a `raise` statement there made it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return "", False
    frame: FrameType = trace.tb_frame
    instruction = dis.opname[frame.f_code.co_code[trace.tb_lasti]]
    return str(frame.f_globals.get("__name__")).partition(".")[0], instruction == "RAISE_VARARGS"


def missing_package(error: ImportError, command: str) -> str | None:
    """How to install the missing package of an extra; None if the error names none, as for a module of ours."""
    missing = str(error.name).partition(".")[0]
    if missing not in EXTRAS:  # transformers names what it needs in the text alone
        missing = next((module for module in EXTRAS if module in str(error).lower()), "")
    extras = EXTRAS.get(missing)
    if extras is None:
        return None
    extra = COMMAND_EXTRAS.get(command)
    return f"{missing} is needed: pip install 'ms-resampler[{extra if extra in extras else extras[0]}]'"


def in_package(file: object) -> bool:
    """Whether a file belongs to the package, so that the error is a bug."""
    return isinstance(file, str | Path) and Path(file).resolve().is_relative_to(PACKAGE)


def system_sentence(error: OSError) -> str:
    """The system's message and the file: No such file or directory: 'a.json'."""
    return f"{error.strerror}: {str(error.filename)!r}." if error.filename else f"{error.strerror}."
