"""Local data files: .jsonl, .json, .parquet and .csv, or a folder of them, become one `datasets.Dataset`.

Read here rather than by `datasets.load_dataset` for three reasons: an error names the file and the line, a .csv cell
stays the text that is in the file (0.50, 007), and nothing is copied into a cache that a changed file could miss.
"""

import csv
import difflib
import json
import math
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
SPLITS = ("train", "test", "validation", "eval", "dev")


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence with the nearest known name, or nothing when none is near."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {found[0]}?" if found else ""


def local_files(path: Path, split: str | None, default_split: str) -> list[Path]:
    """The file, or those of a folder's files whose names start with the split.

    Without a split the default one is meant; all files, where no file is named after a split.
    """
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(f"{path} doesn't exist (looked from {Path.cwd()}).{nearest(path.name, siblings)}")
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path} has the suffix {path.suffix!r}. Known are {', '.join(SUFFIXES)}.")
        if split is not None:
            raise ValueError(f"{path} is one file and has no split {split!r}. Leave the split out, or name the folder.")
        return [path]
    files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
    if split is None and not any(p.name.startswith(SPLITS) for p in files):
        chosen = files
    else:
        chosen = [p for p in files if p.name.startswith(split or default_split)]
    if not chosen:
        names = ", ".join(p.name for p in files) or "none"
        raise ValueError(
            f"{path} has no {', '.join(SUFFIXES)} file for the split {split or default_split!r} (data files: {names})."
        )
    return chosen


def read_files(files: list[Path]) -> Dataset:
    if files[0].suffix == ".parquet" and all(p.suffix == ".parquet" for p in files):
        return Dataset(pa.concat_tables([_read_parquet(p) for p in files], promote_options="default"))
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    rows = []
    for path in files:
        rows += _read_parquet(path).to_pylist() if path.suffix == ".parquet" else readers[path.suffix](path)
    names = list(dict.fromkeys(name for row in rows for name in row))  # every row's keys, in order of appearance
    return Dataset.from_dict({name: _column([row.get(name) for row in rows], name) for name in names})


def _read_parquet(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file: {error}") from error


def _read_jsonl(path: Path) -> list[dict]:
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}, is not JSON: {error.msg} (column {error.colno}).") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}, is {type(row).__name__}, not an object with columns.")
            rows.append(row)
    return rows


def _read_json(path: Path) -> list[dict]:
    """A list of objects; one object per line is read as .jsonl, since many such files are called .json."""
    text = path.read_text(encoding="utf-8")
    if not text.lstrip().startswith("["):
        return _read_jsonl(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, is not JSON: {error.msg} (column {error.colno}).") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: item {number} is {type(row).__name__}, not an object with columns.")
    return rows


def _read_csv(path: Path) -> list[dict]:
    """Every cell stays the text that it is in the file: an answer 0.50 or 007 is not rewritten."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        rows = []
        for row in reader:
            if None in row:
                raise ValueError(
                    f"{path}, line {reader.line_num}, has {len(row[None])} cells more than the header's "
                    f"{len(reader.fieldnames)} columns. Quote the cells that contain a comma."
                )
            rows.append(row)
    return rows


def _column(values: list, name: str) -> list:
    """One type per column, as Arrow needs it: numbers and text together become text."""
    try:
        pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        try:
            return [answer_text(value, name) for value in values]
        except ValueError as error:
            raise ValueError(f"Column {name} mixes types that can't share a column: {error}") from error
    return values


def answer_text(value, column: str = "answer") -> str | None:
    """The text of a gold answer; None when there is none.

    Text is stripped; an integer is written out; a float with an integral value is written as that integer and any other
    float as Python writes it; a list is its items joined by ", ". An empty text, null and NaN are no answer.

    >>> answer_text(142.0), answer_text(0.5), answer_text([1, 2]), answer_text(" x+1 "), answer_text("")
    ('142', '0.5', '1, 2', 'x+1', None)
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str | int | float):
        return str(value).strip() or None
    if isinstance(value, list):
        parts = [answer_text(item, column) for item in value]
        return ", ".join(part for part in parts if part) or None
    raise ValueError(f"{column} holds {type(value).__name__}, and an answer is text, a number or a list of them.")
