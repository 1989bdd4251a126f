"""Local data files: .jsonl, .json, .parquet and .csv, or a folder of them, become one `datasets.Dataset`.

They are read here and not by `datasets.load_dataset` for three reasons: an error names the file and the line, a .csv
cell stays the text that is in the file (0.50, 007), and there is no cache that a changed file could miss.
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from sapo_trl.data.answers import answer_text, decimal_cells
from sapo_trl.errors import did_you_mean

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
SPLITS = ("train", "test", "validation", "eval", "dev")
MAX_CELL_CHARS = 2**31 - 1  # Python's csv module refuses cells of more than 131,072 by default


def local_files(path: Path, split: str | None, default_split: str) -> list[Path]:
    """The file, or those of a folder's files whose names start with the split.

    Without a split the default one is meant, or all files if no file is named after a split.
    """
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(f"{path} doesn't exist (looked from {Path.cwd()}).{did_you_mean(path.name, siblings)}")
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path} has the suffix {path.suffix!r}. Known are {', '.join(SUFFIXES)}.")
        if split is not None:
            raise ValueError(f"{path} is one file and has no split {split!r}. Leave the split out, or name the folder.")
        return [path]
    files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
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
    """The rows of all files, one after the other; a column that a file lacks is empty there.

    Raises:
        ValueError: a file that can't be read, with its name and the line.
    """
    tables = [_read_parquet(path) for path in files if path.suffix == ".parquet"]
    if len(tables) == len(files):
        try:
            return Dataset(pa.concat_tables(tables, promote_options="default"))
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            pass  # a column has another type in another file: joined row by row, as for the other formats
    parts = {path: _read_rows(path) for path in files}
    rows = [row for part in parts.values() for row in part]
    places = [(path, i) for path, part in parts.items() for i in range(len(part))]
    names = list(dict.fromkeys(name for row in rows for name in row))  # every row's keys, in order of appearance
    return Dataset.from_dict({name: _column([row.get(name) for row in rows], name, places) for name in names})


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        table = _read_parquet(path)
        columns = [decimal_cells(table[name].to_pylist(), table.schema.field(name).type) for name in table.column_names]
        return [dict(zip(table.column_names, cells)) for cells in zip(*columns)]
    return {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}[path.suffix](path)


def _read_parquet(path: Path) -> pa.Table:
    try:
        _refuse_twice(pq.read_schema(path).names, str(path))
        return pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file: {error}") from error


def _refuse_twice(names: list[str], where: str) -> None:
    """Refuse two columns of one name, of which readers keep the last, so that an answer could come from either."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{where} has the column {twice!r} twice. Rename or remove one.")


def _read_text(path: Path) -> str:
    """The file as text: UTF-8, with or without the byte-order mark of spreadsheets."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}, is not UTF-8: byte 0x{data[error.start]:02x}. Save the file as UTF-8; "
            f"its encoding may be UTF-16 or Latin-1 (iconv -f latin1 -t utf-8)."
        ) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_twice([name for name, _ in pairs], "an object")
    return dict(pairs)


def _parse_json(text: str, path: Path, line: int | None) -> Any:
    """The content of a line of a file, or of the whole file (`line` None)."""
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if r"\ud" in text.lower():  # maybe half of a surrogate pair, which is no character
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        wrong = error.lineno if line is None else line
        raise ValueError(f"{path}, line {wrong}, is not JSON: {error.msg} (column {error.colno}).") from error
    except RecursionError as error:
        place = f"{path}{'' if line is None else f', line {line}'}"
        raise ValueError(f"{place}: its lists or objects are nested too deeply to be read. Flatten them.") from error
    except ValueError as error:
        raise ValueError(f"{path}{'' if line is None else f', line {line}'}: {error}") from error


def _objects(rows: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows, each under the place where it stands, if all of them are objects."""
    for place, row in rows.items():
        if not isinstance(row, dict):
            raise ValueError(f"{place} is {type(row).__name__}, not an object with columns.")
    return list(rows.values())


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    lines = {number: line for number, line in enumerate(_read_text(path).split("\n"), 1) if line.strip()}
    return _objects({f"{path}, line {number},": _parse_json(line, path, number) for number, line in lines.items()})


def _read_json(path: Path) -> list[dict[str, Any]]:
    """A list of objects; one object per line is read as .jsonl, because many such files are called .json."""
    text = _read_text(path)
    if not text.lstrip().startswith("["):
        try:
            return _read_jsonl(path)
        except ValueError as error:
            raise ValueError(f"{error} A .json file is a list of objects, or has one object per line.") from error
    return _objects({f"{path}: item {number}": row for number, row in enumerate(_parse_json(text, path, None))})


def _read_csv(path: Path) -> list[dict[str, Any]]:
    """Rows of text cells as they are in the file, so that an answer 0.50 or 007 is not rewritten."""
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)  # a quote that never ends: an error
    end = 0  # the line on which the last row ends
    usual_limit = csv.field_size_limit(MAX_CELL_CHARS)
    try:
        names = list(reader.fieldnames or [])
        _refuse_twice(names, str(path))
        if len(names) == 1 and (found := {";", "\t"} & {*names[0]}):
            raise ValueError(f"{path} separates its cells by {found.pop()!r}. Save it with commas, or as .jsonl.")
        rows, end = [], reader.line_num
        for row in reader:
            if None in row:
                raise ValueError(
                    f"{path}, line {reader.line_num}, has {len(row[None])} cells more than the header's "
                    f"{len(names)} columns. Quote the cells that contain a comma."
                )
            rows.append(row)
            end = reader.line_num
        return rows
    except csv.Error as error:
        raise ValueError(f"{path}, the row from line {end + 1} on is not CSV: {error}.") from error
    finally:
        csv.field_size_limit(usual_limit)  # the limit is the process's


def _column(values: list, name: str, places: list[tuple[Path, int]]) -> list:
    """The values with one type, as Arrow needs it; numbers and text together become text."""
    try:
        pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        texts = []
        for value, (path, row) in zip(values, places, strict=True):
            try:
                texts.append(answer_text(value, name))
            except ValueError as error:
                raise ValueError(
                    f"{path}, row {row}: the column {name} holds a {type(value).__name__}, and other rows something "
                    "that can't stand in one column with it. Give all rows one type, or remove the column."
                ) from error
        return texts
    return values
