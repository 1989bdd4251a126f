"""Files are written whole or not at all, and no secret is in them."""

import json
import os

import pytest

from sapo_trl.files import masked, write_json, write_text


def test_folders_are_made_and_nothing_is_left_beside(tmp_path):
    path = tmp_path / "a/b/numbers.json"
    write_json(path, {"pass": 0.5, "name": "é"})
    assert path.read_text() == '{\n  "pass": 0.5,\n  "name": "\\u00e9"\n}\n'
    assert os.listdir(path.parent) == ["numbers.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "page.txt"
    write_text(path, "old é")

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_text(path, "new")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud800")
    with pytest.raises(TypeError):
        write_json(path, {"set": {1}})
    assert path.read_text(encoding="utf-8") == "old é" and os.listdir(tmp_path) == ["page.txt"]


def test_characters_that_utf8_lacks_may_be_replaced(tmp_path):
    write_text(tmp_path / "page.html", "half \ud800", errors="replace")
    assert (tmp_path / "page.html").read_bytes() == b"half ?"


@pytest.mark.parametrize(
    "value, expected",
    [
        ({"hub_token": "abc", "seed": 3, "token": None}, {"hub_token": "***", "seed": 3, "token": None}),
        ({"model_init_kwargs": {"token": "abc", "x": [1]}}, {"model_init_kwargs": {"token": "***", "x": [1]}}),
        ({"token": True, "push_to_hub_token": ""}, {"token": True, "push_to_hub_token": ""}),
        ({"WANDB_API_KEY": "abc", "Authorization": "Bearer abc"}, {"WANDB_API_KEY": "***", "Authorization": "***"}),
        ({"db": {"password": "abc", "secret-key": "abc"}}, {"db": {"password": "***", "secret-key": "***"}}),
        ({"eos_token": "</s>", "max_prompt_tokens": "8"}, {"eos_token": "</s>", "max_prompt_tokens": "8"}),
        (["train.py", "--hub_token", "abc", "--seed", "3"], ["train.py", "--hub_token", "***", "--seed", "3"]),
        (["--hub-token=abc", "--beta=0.1"], ["--hub-token=***", "--beta=0.1"]),
        (['--model_init_kwargs={"token": "a\\"bc", "n": 1}'], ['--model_init_kwargs={"token": "***", "n": 1}']),
        ("{'api_key': 'abc', 'name': 'x'}", "{'api_key': '***', 'name': 'x'}"),
        ("http://me:abc@host:8000/v1", "http://me:***@host:8000/v1"),
        ("https://host/data?page=2&token=abc&n=1#top", "https://host/data?page=2&token=***&n=1#top"),
        ("pushed with hf_abcdefghijklmnopqrst", "pushed with ***"),
        ("Answer with one token: {prompt}", "Answer with one token: {prompt}"),
        ("see http://host:8000/v1 and sk-learn", "see http://host:8000/v1 and sk-learn"),
        (("--resume", 7, None), ["--resume", 7, None]),
    ],
)
def test_secrets_are_masked_and_nothing_else(value, expected):
    before = json.dumps(value)
    assert masked(value) == expected
    assert json.dumps(value) == before  # a copy: the run still needs its token
