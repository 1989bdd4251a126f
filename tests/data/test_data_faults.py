"""Files as people really have them: each fault is handled, or refused with the file and the row named."""

import codecs
import csv
import datetime
import gzip
import json
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import length_reward, prompts, sapo_config
from datasets import Dataset, DatasetDict

from sapo_trl import SAPOTrainer
from sapo_trl.batch_plan import batch_plan
from sapo_trl.data.answers import answer_text
from sapo_trl.data.arguments import ScriptArguments
from sapo_trl.data.loading import load_split, load_train_and_eval
from sapo_trl.data.preflight import check_train_dataset
from sapo_trl.rewards import accuracy_reward
from sapo_trl.tiny import build_tokenizer


@pytest.fixture
def save(tmp_path, monkeypatch):
    """Write bytes, text or rows as a file into an empty working directory; its path as the loader takes it."""
    monkeypatch.chdir(tmp_path)

    def _save(name, content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
            path.write_text(text, encoding="utf-8")
        return f"./{name}"

    return _save


def load(name, **fields):
    return load_split(ScriptArguments(dataset_name=name, **fields))


def questions(rows):
    return [prompt[-1]["content"] for prompt in rows["prompt"]]


# ---- files ---------------------------------------------------------------------------------------------------------


def test_a_csv_cell_may_be_longer_than_the_csv_module_allows(save):
    long = "7" * 131_073  # one more than Python's limit
    limit = csv.field_size_limit()
    rows = load(save("data.csv", f"prompt,answer\n{long},1\nb,2\n"))
    assert questions(rows) == [long, "b"] and rows["answer"][:] == ["1", "2"]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("first, second, expected", [([3, 4], ["x"], ["3", "4", "x"]), ([3], [2.5], ["3", "2.5"])])
def test_parquet_shards_may_type_their_answers_differently(save, first, second, expected):
    for name, answers in (("set/train-0.parquet", first), ("set/train-1.parquet", second)):
        save(name, pa.table({"prompt": [f"{name} {a}" for a in answers], "answer": answers}))
    assert load("./set")["answer"][:] == expected


def test_single_precision_survives_shards_of_different_types(save):
    save("set/a.parquet", pa.table({"prompt": ["p"], "answer": pa.array([0.1], pa.float32())}))
    save("set/b.parquet", pa.table({"prompt": ["q"], "answer": ["one tenth"]}))
    assert load("./set")["answer"][:] == ["0.1", "one tenth"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_is_no_part_of_the_text(save, suffix):
    row = '{"prompt": "é", "answer": "1"}'
    text = {"jsonl": row + "\n", "json": f"[{row}]", "csv": "prompt,answer\né,1\n"}[suffix]
    rows = load(save(f"data.{suffix}", codecs.BOM_UTF8 + text.encode("utf-8")))
    assert questions(rows) == ["é"] and rows["answer"][0] == "1"


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("data.jsonl", '{"prompt": "a", "answer": "1"}\n{"prompt": "é", "answer": "1"}\n'.encode("latin-1"), "line 2"),
        ("data.csv", "prompt,answer\na,1\nb,1\nü,1\n".encode("cp1252"), "line 4"),
        ("data.json", '[{"prompt": "a", "answer": "1"}]'.encode("utf-16"), "line 1, is not UTF-8: byte 0xff"),
    ],
)
def test_another_encoding_is_refused_with_its_line(save, name, data, message):
    with pytest.raises(ValueError, match=rf"{name}, {message}.*Save the file as UTF-8"):
        load(save(name, data))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("data.csv", "prompt,answer,answer\na,1,2\n", r"data\.csv has the column 'answer' twice"),
        ("data.jsonl", '{"prompt": "a", "answer": 1}\n{"answer": 1, "prompt": "a", "answer": 2}', "line 2: .*'answer'"),
        ("data.json", '[{"answer": 1, "prompt": "a", "answer": 2}]', r"data\.json: .*'answer' twice"),
        (
            "data.parquet",
            pa.Table.from_arrays([pa.array(["a"]), pa.array(["1"]), pa.array(["2"])], ["prompt", "answer", "answer"]),
            r"data\.parquet has the column 'answer' twice",
        ),
    ],
)
def test_a_second_column_of_one_name_is_refused(save, name, content, message):
    with pytest.raises(ValueError, match=message):
        load(save(name, content))


def test_an_answer_column_that_is_passed_over_is_named(save, capsys):
    name = save("data.jsonl", [{"prompt": "a", "answer": "long text", "final": "7"}])
    rows = load(name, answer_column="final")
    assert rows["answer"][:] == ["7"] and rows.column_names == ["prompt", "answer", "final"]
    assert "train: answers are those of the column final; the column answer is left out" in capsys.readouterr().out


@pytest.mark.parametrize("other", ["Answer", "ANSWER ", "Prompt"])
def test_a_column_that_differs_by_case_is_left_out_and_named(save, capsys, other):
    rows = load(save("data.jsonl", [{"prompt": "a", "answer": "7", other: "8", "level": 3}]))
    assert rows["answer"][:] == ["7"] and rows.column_names == ["prompt", "answer", "level"]
    assert f"those of the column {other.strip().lower()}; the column {other} is left out" in capsys.readouterr().out


GOOD = json.dumps({"prompt": "a", "answer": "1"})


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", f'{GOOD}\n{GOOD}\n{{"prompt": "b", "ans', r"a\.jsonl, line 3, is not JSON: Unterminated string"),
        ("a.jsonl", f"{GOOD}\r{GOOD}\r", r"a\.jsonl, line 1, is not JSON: Extra data"),
        ("a.jsonl", f'{GOOD}\n\n{{"prompt": "b\\ud800", "answer": "1"}}', r"a\.jsonl, line 3: .*surrogates not"),
        ("a.jsonl", f'{GOOD}\n{{"prompt": "b", "answer": {"9" * 5000}}}', r"a\.jsonl, line 2: .* has 5000 digits"),
        ("a.jsonl", '{"prompt": "a"}', r"a\.jsonl has no column 'answer', only prompt\. Set answer_column"),
        ("a.jsonl", '{"prompt": "a", "answer": {"value": 1}}', r"a\.jsonl, row 0: answer holds dict"),
        ("a.jsonl", f'{GOOD}\n{{"prompt": "a", "answer": {{"value": 1}}}}', r"a\.jsonl, row 1: the column answer"),
        ("a.jsonl", f'{GOOD}\n{{"prompt": [{{"role": "user", "content": "b"}}]}}', r"a\.jsonl, row 1: the column pro"),
        ("a.json", '{\n "prompt": "a",\n "answer": "1"\n}', r"a\.json, line 1, .* or has one object per line"),
        ("a.jsonl.gz", gzip.compress(GOOD.encode(), mtime=0), r"a\.jsonl\.gz has the suffix '\.gz'\. Known are"),
        ("a.csv", 'prompt,answer\na,1\n"b,2\nc,3\n', r"a\.csv, the row from line 3 on is not CSV: unexpected end"),
        ("a.csv", 'prompt,answer\na,1\n"b" or c,2\n', r"a\.csv, the row from line 3 on is not CSV: ',' expected after"),
        ("a.csv", "prompt;answer\na;1\n", r"a\.csv separates its cells by ';'\. Save it with commas"),
        ("a.csv", "prompt\tanswer\na\t1\n", r"a\.csv separates its cells by '\\t'"),
        ("a.csv", "prompt\na\n", r"a\.csv has no column 'answer', only prompt"),
        ("a.csv", "prompt,answer\n\"[{'role': 'user', 'content': 'b'}]\",1\n", r"a\.csv, row 0: .* text of a list of"),
        ("a.jsonl", '{"prompt": "a", "answer": "1", "images": ["b.png"]}', r"a\.jsonl, row 0: there is no picture"),
        ("a.parquet", pa.table({"prompt": ["a"], "answer": [datetime.date(2020, 1, 2)]}), "row 0: answer holds date"),
        ("a.parquet", pa.table({"prompt": ["a"], "answer": [b"12"]}), r"a\.parquet, row 0: answer holds bytes"),
        ("a.jsonl", f"{GOOD}\n{'[' * 100_000}", r"a\.jsonl, line 2: its lists or objects are nested too deeply"),
        ("a.parquet", b"PAR1", r"a\.parquet is not a parquet file"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_sentence_with_its_place(save, name, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(save(name, content))
    assert "\n" not in str(caught.value)


def test_a_folder_named_like_a_file_is_no_data(save, tmp_path):
    (tmp_path / "data/x.json").mkdir(parents=True)
    save("data/a.jsonl", GOOD)
    assert len(load("./data")) == 1


def test_a_nested_column_that_is_empty_in_every_row_has_no_answers(save, capsys):
    rows = [{"prompt": "a", "r": None}, {"prompt": "b", "r": None}]
    with pytest.raises(ValueError, match="answer"):
        load(save("a.jsonl", rows), answer_column="r.gt")


def test_a_second_shard_is_named_with_its_own_row(save):
    save("set/a.jsonl", [{"prompt": "a", "answer": "1"}] * 3)
    save("set/b.jsonl", [{"prompt": "b", "answer": "1"}, {"prompt": "b", "answer": {"value": 1}}])
    with pytest.raises(ValueError, match=r"set/b\.jsonl, row 1: the column answer holds a dict"):
        load("./set")


@pytest.mark.parametrize("path", ["C:\\data\\train.jsonl", ".\\data\\train.csv"])
def test_a_path_of_another_system_is_a_file_that_does_not_exist(save, path):
    with pytest.raises(FileNotFoundError, match="doesn't exist .looked from"):
        load(path)


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", '{"prompt": "a", "answer": 1}\r\n\r\n  \r\n{"prompt": "b", "answer": 2}\r\n'),
        ("a.csv", "prompt,answer\r\na,1\r\n\r\nb,2\r\n"),
        ("a.csv", "prompt,answer\ra,1\rb,2\r"),
    ],
)
def test_blank_lines_and_line_ends_are_no_rows(save, name, content):
    rows = load(save(name, content))
    assert questions(rows) == ["a", "b"] and rows["answer"][:] == ["1", "2"]


# ---- answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, values, expected",
    [
        (pa.float32(), [0.1, 1e10, None, -2.675], ["0.1", "10000000000", "-2.675"]),
        (pa.float16(), [np.float16(0.1)], ["0.1"]),
        (pa.float64(), [0.1, 0.30000000000000004], ["0.1", "0.30000000000000004"]),
        (pa.list_(pa.float32()), [[0.1, 0.7], [5.0]], ['["0.1", "0.7"]', "5"]),
        (pa.list_(pa.float32(), 2), [[0.1, 0.7]], ['["0.1", "0.7"]']),
        (pa.decimal128(5, 2), [Decimal("1.50"), None, Decimal(100)], ["1.50", "100.00"]),
        (pa.float64(), [1e23, 1e-7, -0.0, float("inf")], ["100000000000000000000000", "0.0000001", "0"]),
    ],
)
def test_a_float_is_the_decimal_that_was_meant(save, kind, values, expected):
    table = pa.table({"prompt": [f"p{i}" for i in range(len(values))], "answer": pa.array(values, kind)})
    assert load(save("data.parquet", table))["answer"][:] == expected


def test_answers_of_every_json_type(save, capsys):
    texts = ["1", "0", "2.50", str(10**40), "true", "null", "NaN", "-Infinity", "1e400", '"x"', '[" 3", 4]', '""']
    lines = [f'{{"prompt": "p{i}", "answer": {text}}}' for i, text in enumerate(texts)]
    rows = load(save("data.jsonl", "\n".join(lines)))
    assert rows["answer"][:] == ["1", "0", "2.5", str(10**40), "True", "x", '["3", "4"]']
    assert "5 without an answer (answer; the first is row 5) among 12 rows" in capsys.readouterr().out


def test_answers_that_are_lists_are_said_so(save, capsys):
    answers = [["70"], ["0.5", "1/2"], "['70']", "['2', '3']", ["7"]]
    columns = [{"prompt": f"p{i}", "answer": x} for i, x in enumerate(answers[:2] + answers[4:])]
    assert load(save("lists.jsonl", columns))["answer"][:] == ["70", '["0.5", "1/2"]', "7"]
    assert "train: 1 answers are lists (row 1), of which any one item is right" in capsys.readouterr().out
    texts = [{"prompt": f"p{i}", "answer": x} for i, x in enumerate(answers[2:4])]
    assert load(save("texts.jsonl", texts))["answer"][:] == ["70", '["2", "3"]']
    assert "1 answers are lists (row 1)" in capsys.readouterr().out
    said = [r"\boxed{2}", r"\boxed{3}", r"\boxed{2, 3}", r"\boxed{1}"]
    assert accuracy_reward(said, ['["2", "3"]'] * 4) == accuracy_reward(said, [["2", "3"]] * 4) == [1, 1, 0, 0]


def test_a_float_inside_a_nested_column(save):
    kind = pa.struct([("truth", pa.struct([("value", pa.float32())]))])
    table = pa.table({"prompt": ["p"], "reward": pa.array([{"truth": {"value": 0.3}}], kind)})
    assert load(save("data.parquet", table), answer_column="reward.truth.value")["answer"][0] == "0.3"


@pytest.mark.parametrize(
    "text, answer",
    [
        ("['2', '3']", '["2", "3"]'),
        ("['2', ' 2', '']", "2"),
        ('["\\\\frac{1}{2}"]', r"\frac{1}{2}"),  # as JSON and Python write it
        ("['\\\\sqrt{2}', \"it's\"]", r"""["\\sqrt{2}", "it's"]"""),
        ('["é","b"]', '["é", "b"]'),
        ("[2, 3]", "[2, 3]"),  # an interval
        ("['3' '4']", "['3' '4']"),  # numpy's text, which Python would join to 34
        (r"['\frac{1}{2}']", r"['\frac{1}{2}']"),  # \f would be read as a form feed
        ("['a', 2]", "['a', 2]"),
    ],
)
def test_the_text_of_a_list(text, answer):
    assert answer_text(text) == answer


def test_solution_is_proposed_for_a_missing_answer(save):
    name = save("data.jsonl", [{"prompt": "a", "solution": "4", "answered": True}])  # `answered` is nearer in letters
    with pytest.raises(ValueError, match="no column 'answer', only .* Did you mean 'solution'. Set answer_column"):
        load(name)
    assert load(name, answer_column="solution")["answer"][:] == ["4"]


# ---- prompts -------------------------------------------------------------------------------------------------------

COPIES = [("a", "1"), ("b", "2"), ("A ", "1"), ("b", "3"), ("c", "5"), ("ａ", "1")]


def test_copies_are_counted_and_kept(save, capsys):
    rows = load(save("data.jsonl", [{"prompt": p, "answer": a} for p, a in COPIES]))
    assert len(rows) == 6
    printed = capsys.readouterr().out
    assert "train: 2 prompts stand more than once (3 copies, rows 2, 3, 5), 1 of them with different answers" in printed
    assert "(the first: rows 1, 3); they are kept" in printed


def test_copies_are_dropped_and_contradictions_with_them(save, capsys):
    rows = load(save("data.jsonl", [{"prompt": p, "answer": a} for p, a in COPIES]), drop_duplicates=True)
    assert questions(rows) == ["a", "c"] and rows["answer"][:] == ["1", "5"]
    assert "the copies, and prompts with different answers, are dropped" in capsys.readouterr().out


def test_no_copies_no_word_about_them(save, capsys):
    load(save("data.jsonl", [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "1"}]), drop_duplicates=True)
    assert "more than once" not in capsys.readouterr().out


def turns(*texts):
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * len(texts), texts)]


def test_conversations_that_end_alike_are_no_leak(save, capsys):
    last = "And now?"
    train = [{"prompt": turns("1+1", "2", last), "answer": "3"}, {"prompt": turns("5+5", "10", last), "answer": "11"}]
    held_out = [{"prompt": turns("5+5", "10", last), "answer": "11"}, {"prompt": turns(last), "answer": "0"}]
    args = ScriptArguments(save("train.jsonl", train), eval_dataset_name=save("eval.jsonl", held_out))
    kept, _ = load_train_and_eval(args)
    assert [row[0]["content"] for row in kept["prompt"]] == ["1+1"]
    assert "1 of 2 prompts are also evaluation prompts" in capsys.readouterr().out


def test_a_system_message_does_not_hide_a_leak(save):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1"}]
    train = [{"prompt": chat, "answer": "2"}, {"prompt": turns("2+2"), "answer": "4"}]
    held_out = [{"prompt": turns("1+1"), "answer": "2"}]
    args = ScriptArguments(save("train.jsonl", train), eval_dataset_name=save("eval.jsonl", held_out))
    assert questions(load_train_and_eval(args)[0]) == ["2+2"]


@pytest.mark.parametrize(
    "same",
    ["what is 12+3?", "WHAT IS 12+3?", "Ｗｈａｔ　ｉｓ １２＋３？", "What\n is  12+3?"],
    ids=["lower", "upper", "full width", "spaces"],
)
def test_leaks_are_found_whatever_the_case_and_the_width(save, same):
    train = [{"prompt": same, "answer": "15"}, {"prompt": "What is 12²+3?", "answer": "147"}]
    held_out = [{"prompt": "What is 12+3?", "answer": "15"}, {"prompt": "What is 122+3?", "answer": "125"}]
    args = ScriptArguments(save("train.jsonl", train), eval_dataset_name=save("eval.jsonl", held_out))
    assert questions(load_train_and_eval(args)[0]) == ["What is 12²+3?"]  # a power is no digit


@pytest.mark.parametrize("empty", ["", " \n", None, [], turns("  "), turns("a", "b", "")])
def test_an_empty_prompt_is_dropped_and_counted(save, capsys, empty):
    good = [{"prompt": turns(text), "answer": "1"} for text in "abc"]
    if not isinstance(empty, list):
        good = [{"prompt": text, "answer": "1"} for text in "abc"]
    rows = load(save("data.jsonl", [*good, {"prompt": empty, "answer": "1"}]), prompt_template="Solve: {prompt}")
    assert len(rows) == 3
    assert "1 without a prompt (prompt; the first is row 3) among 4 rows" in capsys.readouterr().out


def test_prompts_over_the_limit_are_listed(save, capsys):
    name = save("data.jsonl", [{"prompt": "9" * (50 if i % 2 else 3 + i), "answer": "9"} for i in range(16)])
    args = ScriptArguments(name, max_prompt_tokens=30)
    assert len(load_split(args, tokenizer=build_tokenizer())) == 8
    assert "8 of 16 prompts are longer than max_prompt_tokens=30" in (printed := capsys.readouterr().out)
    assert "(the longest has 58), rows 1, 3, 5, 7, 9 and 3 more; they are dropped" in printed


# ---- what the trainer is given -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([{"prompt": "1+1="}], "train_dataset is a list, no Dataset or IterableDataset"),
        (None, "train_dataset is a NoneType"),
        (DatasetDict(train=prompts(), test=prompts()), "a DatasetDict, .*: take one of its splits, train, test"),
    ],
)
def test_what_is_no_dataset_is_refused_before_the_model_loads(tmp_path, dataset, message):
    with pytest.raises(TypeError, match=message):
        SAPOTrainer("no-such/model", length_reward, sapo_config(tmp_path), dataset)


def test_a_stream_needs_a_number_of_steps(tmp_path):
    stream = prompts().to_iterable_dataset()
    with pytest.raises(ValueError, match="a stream, whose length is unknown. Set max_steps"):
        SAPOTrainer("no-such/model", length_reward, sapo_config(tmp_path, max_steps=-1), stream)


def test_reward_weights_are_counted_before_the_model_loads(tmp_path):
    config = sapo_config(tmp_path, reward_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="reward_weights has 2 numbers for 1 rewards"):
        SAPOTrainer("no-such/model", length_reward, config, prompts())


def test_a_message_without_a_text_is_named(tmp_path):
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": None}]}] * 64)
    with pytest.raises(ValueError, match="the prompt of row 0 is .*give a text, or messages with role and content"):
        SAPOTrainer("no-such/model", length_reward, sapo_config(tmp_path), dataset)


@pytest.mark.parametrize("empty", ["", []])
def test_an_empty_prompt_is_named_before_training(tmp_path, empty):
    usual = "x" if empty == "" else turns("x")
    dataset = Dataset.from_list([{"prompt": usual}] * 11 + [{"prompt": empty}] + [{"prompt": usual}] * 20)
    config = sapo_config(tmp_path)
    with pytest.raises(ValueError, match="prompt of row 11 is empty"):
        check_train_dataset(dataset, config, batch_plan(config))
    check_train_dataset(prompts(), config, batch_plan(config))
