"""The files that evaluation servers and official scripts take."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..folders import whole_file


def write_export(folder: Path, name: str, content: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> Path:
    """Writes a file in the format of its suffix: JSON, JSONL or XLSX."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    with whole_file(path) as fresh:
        if path.suffix == ".xlsx":
            write_table(fresh, content)
        elif path.suffix == ".jsonl":
            fresh.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
        else:
            fresh.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def write_table(path: Path, rows: Any) -> None:
    """Writes rows as an Excel table, whose cells are never formulae."""
    from openpyxl import Workbook

    book = Workbook()
    sheet = book.active
    names = list(rows[0])
    for row in [dict(zip(names, names, strict=True)), *rows]:
        sheet.append([row[name] for name in names])
        for cell in sheet[sheet.max_row]:
            if cell.data_type == "f":
                cell.data_type = "s"
    book.save(path)
