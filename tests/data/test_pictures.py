"""Pictures of prompts: from columns of any form to `images`, and what is refused before a model loads."""

import io
import json

import datasets
import pytest
from datasets import Dataset
from PIL import Image

from sapo_trl.data.arguments import ScriptArguments
from sapo_trl.data.loading import load_split, load_train_and_eval
from sapo_trl.data.pictures import check_pictures, picture_key, stored_pictures
from sapo_trl.mixture import read_mixture
from sapo_trl.tiny_vl import build_processor


def png(colour: str, size: tuple[int, int] = (32, 48)) -> bytes:
    with io.BytesIO() as file:
        Image.new("RGB", size, colour).save(file, "PNG")
        return file.getvalue()


def write(folder, name: str, rows: list[dict]) -> str:
    (folder / name).write_text("".join(json.dumps({"prompt": "How many?", "answer": "1"} | row) + "\n" for row in rows))
    return str(folder / name)


@pytest.fixture
def folder(tmp_path):
    for colour in ("red", "blue", "green"):
        (tmp_path / f"{colour}.png").write_bytes(png(colour))
    return tmp_path


def load(path: str, **fields) -> Dataset:
    tokenizer = fields.pop("tokenizer", None)
    rows = load_split(ScriptArguments(dataset_name=path, **fields), "train", tokenizer)
    assert rows is not None
    return rows


@pytest.mark.parametrize("column", ["image", "images"])
def test_paths_count_from_the_folder_of_the_file(folder, column, monkeypatch):
    one = (lambda *names: list(names)) if column == "images" else (lambda *names: names[0])
    path = write(
        folder, "a.jsonl", [{column: one("red.png")}, {column: one(str(folder / "blue.png"))}, {"answer": "2"}]
    )
    monkeypatch.chdir("/")
    rows = load(path)
    assert rows.column_names == ["prompt", "answer", "images"]
    assert rows.features["images"] == datasets.List(datasets.Image())
    assert [len(row["images"]) for row in rows] == [1, 1, 0]
    assert rows[1]["images"][0].size == (32, 48) and rows[1]["images"][0].getpixel((3, 3)) == (0, 0, 255)
    assert check_pictures(rows, "training set")


def test_pictures_that_datasets_store(folder):
    cells = [{"bytes": png("red"), "path": None}, None, {"bytes": png("blue"), "path": "b.png"}]
    for name, given in (("image", cells), ("images", [[x] if x else None for x in cells])):
        columns = {"prompt": ["a", "b", "c"], "answer": ["1", "2", "3"], name: given}
        Dataset.from_dict(columns).to_parquet(folder / f"{name}.parquet")
        rows = load(str(folder / f"{name}.parquet"))
        assert [len(row["images"]) for row in rows] == [1, 0, 1]
        assert rows[2]["images"][0].getpixel((0, 0)) == (0, 0, 255)


def test_a_question_about_another_picture_is_another_prompt(folder, capsys):
    train = write(folder, "train.jsonl", [{"image": "red.png"}, {"image": "blue.png"}, {"image": "red.png"}])
    test = write(folder, "test.jsonl", [{"image": "blue.png"}])
    rows, _ = load_train_and_eval(ScriptArguments(dataset_name=train, eval_dataset_name=test))
    assert "1 prompts stand more than once (1 copies, row 2)" in capsys.readouterr().out
    keys = [picture_key(own) for own in stored_pictures(rows)]
    assert len(rows) == 2 and keys[0] == keys[1]  # the two red ones; the blue one is held out


def test_tokens_of_pictures_count(folder, capsys):
    """32 × 48 pixels are 2 × 3 tokens of 16 × 16, and the text has 44 with its template."""
    path = write(folder, "a.jsonl", [{"image": "red.png"}, {"image": None, "answer": "3"}])
    processor = build_processor()
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": "How many?"}], add_generation_prompt=True, tokenize=False
    )
    num = len(processor.tokenizer(text)["input_ids"])
    assert len(load(path, max_prompt_tokens=num + 6, tokenizer=processor)) == 2
    assert len(load(path, max_prompt_tokens=num + 5, tokenizer=processor)) == 1
    assert "the longest has" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the model is one of text"):
        load(path, max_prompt_tokens=num, tokenizer=processor.tokenizer)


def test_a_mixture_of_text_and_pictures(folder):
    sets = {
        "seen": {"dataset_name": write(folder, "seen.jsonl", [{"image": "red.png"}]), "share": 0.5},
        "read": {"dataset_name": write(folder, "read.jsonl", [{"prompt": "1+1?"}]), "share": 0.5},
    }
    rows, _ = load_train_and_eval(ScriptArguments(), mixture=read_mixture(sets, 64))
    assert [(row["task"], len(row["images"])) for row in rows] == [("seen", 1), ("read", 0)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "gone.png"}, r"row 1: there is no picture .*gone\.png; paths count from the folder"),
        ({"image": 3}, "row 1: a picture is 3. Give the path of a file"),
        ({"image": "red.png", "images": ["red.png"]}, "a column 'image' and a column 'images'"),
    ],
)
def test_what_is_no_picture_is_refused(folder, row, message):
    first = {"image": "red.png"} if isinstance(row["image"], str) else {"image": 4}
    if message.startswith("row 1: a picture"):
        message = message.replace("row 1", "row 0").replace("is 3", "is 4")
    with pytest.raises(ValueError, match=message):
        load(write(folder, "a.jsonl", [first, row]))


def test_a_broken_picture_is_named_while_tokens_are_counted(folder):
    (folder / "text.png").write_text("no picture")
    path = write(folder, "a.jsonl", [{"image": "red.png"}, {"image": "text.png"}])
    with pytest.raises(ValueError, match=r"a\.jsonl, row 1: a picture can't be read \(.*text\.png\): .*drop the row"):
        load(path, max_prompt_tokens=64, tokenizer=build_processor())


def test_every_picture_is_read_before_a_model_loads(folder):
    noisy = Image.effect_noise((64, 64), 80)
    noisy.save(folder / "cut.jpg", quality=95)
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-600])
    (folder / "text.png").write_text("no picture")
    for name in ("cut.jpg", "text.png"):
        rows = load(write(folder, "a.jsonl", [{"image": "red.png"}, {"image": name}]))
        with pytest.raises(
            ValueError, match=rf"training set a picture of row 1 can't be read \(.*{name}\): .*drop the row"
        ):
            check_pictures(rows, "training set")
    plain = load(write(folder, "a.jsonl", [{"image": "red.png"}]), prompt_format="plain")
    with pytest.raises(ValueError, match="row 0 has a picture, and its prompt is text: prompt_format: chat"):
        check_pictures(plain, "training set")
    with pytest.raises(ValueError, match=r"column 'images' holds .*string.*cast_column\('images', datasets.List"):
        check_pictures(Dataset.from_dict({"prompt": ["a"], "images": [["red.png"]]}), "training set")
