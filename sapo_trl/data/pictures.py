"""Pictures of prompts: a column `image` or `images` of any dataset becomes `images`, a list of pictures per row.

A cell may be a path (from the folder of its file on), a picture as datasets store one, a list of these, or nothing.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset
from PIL import Image

COLUMNS = ("image", "images")
LISTS = datasets.List(datasets.Image())


def picture_column(columns: Sequence[str]) -> str | None:
    """The column with pictures, if there is one.

    Raises:
        ValueError: there are two.
    """
    found = [name for name in COLUMNS if name in columns]
    if len(found) > 1:
        raise ValueError("the data have a column 'image' and a column 'images'. Remove one of them.")
    return found[0] if found else None


def picture_lists(raw: Dataset, name: str, source: str) -> Dataset:
    """The column of pictures as `images`; what datasets store is not copied.

    Raises:
        ValueError: a cell that is no picture, or a file that is not there, with its row.
    """
    column = raw.data.column(name)
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    inner = column.type.value_type if is_list else column.type
    if pa.types.is_struct(inner) and inner.get_field_index("bytes") >= 0:
        chunks = pa.chunked_array([_as_list(chunk, is_list) for chunk in column.chunks], pa.list_(inner))
        return Dataset(pa.table({"images": chunks})).cast(datasets.Features(images=LISTS))
    path = Path(source).expanduser()
    folder = path if path.is_dir() else path.parent
    cells = []
    for row, cell in enumerate(column.to_pylist()):
        try:
            cells.append([_file(folder, one) for one in (cell if is_list else [cell]) or [] if one is not None])
        except ValueError as error:
            raise ValueError(f"{source}, row {row}: {error}") from error
    return Dataset.from_dict({"images": cells}, features=datasets.Features(images=LISTS))


def _as_list(chunk: Any, is_list: bool) -> pa.ListArray:
    """A chunk of pictures as one of lists, empty where there is none; nulls in a list are no pictures."""
    if is_list:
        kept = np.asarray(chunk.values.is_valid())
        ends = np.concatenate([[0], np.cumsum(kept)])[np.asarray(chunk.offsets)]
        return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), chunk.values.drop_null())
    ends = np.cumsum(np.asarray(chunk.is_valid()))
    return pa.ListArray.from_arrays(pa.array([0, *ends], pa.int32()), chunk.drop_null())


def _file(folder: Path, name: Any) -> str:
    if not isinstance(name, str):
        raise ValueError(f"a picture is {name!r:.60}. Give the path of a file.")
    path = folder / name
    if not path.is_file():
        raise ValueError(f"there is no picture {path}; paths count from the folder of the data file.")
    return str(path.resolve())


def stored_pictures(dataset: Dataset) -> Iterator[list[Mapping[str, Any]]]:
    """For each row its pictures as they are stored, {bytes, path}; none of them is decoded."""
    name = picture_column(dataset.column_names)
    if name is None:
        yield from ([] for _ in range(len(dataset)))
        return
    one = datasets.Image(decode=False)
    is_list = not isinstance(dataset.features[name], datasets.Image)
    plain = dataset.select_columns([name]).cast_column(name, datasets.List(one) if is_list else one)
    for row in plain:
        cell: Any = row[name]
        yield [x for x in (cell if is_list else [cell]) or [] if x is not None]


def content(stored: Mapping[str, Any]) -> bytes:
    """The bytes of a picture's file."""
    return Path(stored["path"]).read_bytes() if stored["bytes"] is None else stored["bytes"]


def picture_key(stored: Sequence[Mapping[str, Any]]) -> str:
    """A digest of a row's pictures; empty for text."""
    return hashlib.blake2b(b"".join(map(content, stored)), digest_size=16).hexdigest() if stored else ""


def unreadable(what: str, stored: Mapping[str, Any], error: Exception) -> ValueError:
    """The error about a picture that can't be decoded; `what` says which one it is."""
    place = stored["path"] or "its bytes"
    return ValueError(f"{what} can't be read ({place}): {error}. Replace it, or drop the row.")


def check_pictures(dataset: object, which: str) -> bool:
    """Decode every picture once, coarsely; returns whether a prompt has any. Of streams only the columns are seen.

    Raises:
        ValueError: pictures beside prompts that are no messages, or a picture that can't be read, with its row.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        return False
    name = picture_column(dataset.column_names or [])
    if name is None or not isinstance(dataset, Dataset):
        return name is not None
    feature = dataset.features[name]
    inner = feature.feature if isinstance(feature, datasets.List) else feature
    if not isinstance(inner, datasets.Image):
        raise ValueError(
            f"in the {which} the column {name!r} holds {inner}, not pictures. Cast it: dataset.cast_column({name!r}, "
            f"{'datasets.List(datasets.Image())' if name == 'images' else 'datasets.Image()'})."
        )
    found = False
    prompts = dataset["prompt"] if "prompt" in dataset.column_names else [None] * len(dataset)
    for row, (prompt, stored) in enumerate(zip(prompts, stored_pictures(dataset), strict=True)):
        found = found or bool(stored)
        if stored and isinstance(prompt, str):
            raise ValueError(f"in the {which} row {row} has a picture, and its prompt is text: prompt_format: chat.")
        for one in stored:
            try:
                picture = Image.open(io.BytesIO(content(one)))
                picture.draft("RGB", (1, 1))  # JPEG: at an eighth of its size; a missing end shows all the same
                picture.load()
            except (OSError, SyntaxError, ValueError) as error:
                raise unreadable(f"in the {which} a picture of row {row}", one, error) from error
    return found
