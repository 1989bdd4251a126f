r"""Data: every form of input ends as the same rows, and every mistake as one sentence that says what to do."""

import dataclasses
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers.processors import TemplateProcessing

from sapo_trl.data.arguments import ScriptArguments
from sapo_trl.data.loading import check_enough_prompts, load_split, load_train_and_eval
from sapo_trl.tiny import build_tokenizer

ROWS = [{"prompt": "1+1", "answer": "2"}, {"prompt": "2*5", "answer": "10"}, {"prompt": "6/4", "answer": "3/2"}]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a .jsonl file (or raw text) into an empty working directory and return its name."""
    monkeypatch.chdir(tmp_path)

    def _write(content, name="data.jsonl"):
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    return _write


def arguments(name, **fields):
    return ScriptArguments(dataset_name=name, **fields)


def texts(dataset):
    return [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in dataset["prompt"]]


# ---- forms of input ------------------------------------------------------------------------------------------------


def test_jsonl_becomes_chat_messages_and_keeps_other_columns(write):
    name = write([{**row, "level": i} for i, row in enumerate(ROWS)])
    rows = load_split(arguments(name))
    assert rows[1] == {"prompt": [{"role": "user", "content": "2*5"}], "answer": "10", "level": 1}
    assert rows.column_names == ["prompt", "answer", "level"]


@pytest.mark.parametrize("suffix", ["json", "json-lines", "csv", "parquet"])
def test_every_format_gives_the_rows_of_jsonl(write, tmp_path, suffix):
    name = f"data.{suffix.split('-')[0]}"
    if suffix == "parquet":
        write("")
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / name)
    elif suffix == "csv":
        write('prompt,answer\n1+1,2\n"2*5",10\n6/4,3/2\n', name)
    elif suffix == "json":
        write(json.dumps(ROWS, indent=1), name)
    else:
        write(ROWS, name)
    rows = load_split(arguments(name, prompt_format="plain"))
    assert rows.to_list() == ROWS


def test_csv_answers_stay_as_written(write):
    name = write("prompt,answer\na,0.50\nb,007\n", "data.csv")
    assert load_split(arguments(name))["answer"][:] == ["0.50", "007"]


def test_a_folder_reads_the_files_of_the_split(write):
    write(ROWS[:1], "set/train-0.jsonl")
    write(ROWS[1:2], "set/train-1.jsonl")
    write(ROWS[2:], "set/test.jsonl")
    assert texts(load_split(arguments("./set"))) == ["1+1", "2*5"]
    assert texts(load_split(arguments("./set", eval_dataset_name="./set"), "eval")) == ["6/4"]
    with pytest.raises(ValueError, match=r"no .* file for the split 'dev' \(data files: test\.jsonl, train-0\.jsonl"):
        load_split(arguments("./set", dataset_train_split="dev"))


def test_a_folder_without_split_names_reads_every_file(write):
    write(ROWS[:1], "set/a.jsonl")
    write("prompt,answer\nx,1\n", "set/b.csv")
    assert texts(load_split(arguments("./set"))) == ["1+1", "x"]


def test_a_folder_with_only_a_test_file_is_not_trained_on(write):
    write(ROWS, "set/test.jsonl")
    with pytest.raises(ValueError, match="split 'train'"):
        load_split(arguments("./set"))


def test_columns_by_name_and_dotted(write):
    name = write([{"q": [{"role": "user", "content": "1+1"}], "reward_model": {"style": "rule", "ground_truth": "2"}}])
    rows = load_split(arguments(name, prompt_column="q", answer_column="reward_model.ground_truth"))
    assert rows[0]["prompt"] == [{"role": "user", "content": "1+1"}]
    assert rows[0]["answer"] == "2"


def test_a_column_whose_own_name_has_a_dot(write):
    name = write([{"prompt": "1+1", "gold.text": "2"}])
    assert load_split(arguments(name, answer_column="gold.text"))["answer"][0] == "2"


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([5, -3], ["5", "-3"]),
        ([142.0, 0.5], ["142", "0.5"]),
        ([[1, 2], [3]], ['["1", "2"]', "3"]),
        (["x+1", 7, 2.0], ["x+1", "7", "2"]),
        ([10**30, 1], ["1000000000000000000000000000000", "1"]),
    ],
)
def test_answers_become_text(write, answers, expected):
    name = write([{"prompt": f"p{i}", "answer": answer} for i, answer in enumerate(answers)])
    assert load_split(arguments(name))["answer"][:] == expected


def test_later_rows_may_have_more_columns(write):
    rows = load_split(arguments(write([ROWS[0], {**ROWS[1], "level": 3}])))
    assert rows["level"][:] == [None, 3]


# ---- prompts -------------------------------------------------------------------------------------------------------


def test_system_prompt_and_template(write):
    name = write(ROWS[:1])
    rows = load_split(arguments(name, system_prompt="Be brief.", prompt_template="{prompt}\nAnswer in \\boxed{}."))
    assert rows[0]["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1\nAnswer in \\boxed{}."},
    ]


def test_template_goes_around_the_last_user_message(write):
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "1+1"}]
    name = write([{"prompt": chat, "answer": "2"}])
    assert load_split(arguments(name, prompt_template="Q: {prompt}"))[0]["prompt"] == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q: 1+1"},
    ]
    with pytest.raises(ValueError, match="row 0: prompt has a system message already"):
        load_split(arguments(name, system_prompt="T"))
    with pytest.raises(ValueError, match="row 0: prompt has 2 messages. Use prompt_format=chat"):
        load_split(arguments(name, prompt_format="plain"))


def test_plain_prompts_are_text(write):
    assert load_split(arguments(write(ROWS), prompt_format="plain", prompt_template="{prompt}="))["prompt"][0] == "1+1="


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "from 'assistant'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "not text"),
        (["a", "b"], "neither text nor a list of messages"),
        (3, "neither text nor a list of messages"),
    ],
)
def test_prompts_that_no_model_could_read(write, prompt, message):
    with pytest.raises(ValueError, match=f"row 0: .*{message}"):
        load_split(arguments(write([{"prompt": prompt, "answer": "1"}])))


# ---- filters -------------------------------------------------------------------------------------------------------


def test_rows_without_prompt_or_answer_are_counted_and_dropped(write, capsys):
    bad = [{"prompt": "  ", "answer": "1"}, {"prompt": "x", "answer": None}, {"prompt": "secret", "answer": ""}]
    rows = load_split(arguments(write([*ROWS, *bad])))
    assert texts(rows) == ["1+1", "2*5", "6/4"]
    printed = capsys.readouterr().out
    assert (
        "1 without a prompt (prompt; the first is row 3) and 2 without an answer (answer; the first is row 4)"
        in printed
    )
    assert "among 6 rows; they are dropped" in printed
    assert "secret" not in printed and "1+1" not in printed


def test_more_than_half_bad_rows_are_an_error(write):
    with pytest.raises(ValueError, match="3 without an answer .* among 5 rows: more than half. Check prompt_column"):
        load_split(arguments(write([*ROWS[:2], *[{"prompt": "x", "answer": None}] * 3])))


def test_long_prompts_are_dropped_under_the_chat_template(write, capsys):
    tokenizer = build_tokenizer()  # one token per byte and per word of the chat format
    length = 11  # <|im_start|> user \n 1 + 1 <|im_end|> \n <|im_start|> assistant \n
    name = write([*ROWS, {"prompt": "9" * 50, "answer": "9"}])
    rows = load_split(arguments(name, max_prompt_tokens=length), tokenizer=tokenizer)
    assert texts(rows) == ["1+1", "2*5", "6/4"]
    assert f"1 of 4 prompts are longer than max_prompt_tokens={length} (the longest has {length + 47})" in (
        capsys.readouterr().out
    )
    with pytest.raises(ValueError, match="all 4 prompts are longer .* the shortest has 11 tokens. .*=58 to keep"):
        load_split(arguments(name, max_prompt_tokens=3), tokenizer=tokenizer)
    plain = load_split(arguments(name, max_prompt_tokens=3, prompt_format="plain"), tokenizer=tokenizer)
    assert len(plain) == 3


def test_plain_prompts_count_the_special_tokens_that_the_tokenizer_adds(write):
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.pad_token_id)]
    )
    name = write(ROWS)
    for prompt_format, length in (("plain", 4), ("chat", 11)):  # the chat template holds every token itself
        args = arguments(name, prompt_format=prompt_format, max_prompt_tokens=length)
        assert len(load_split(args, tokenizer=tokenizer)) == 3
        with pytest.raises(ValueError, match=f"the shortest has {length} tokens"):
            load_split(dataclasses.replace(args, max_prompt_tokens=length - 1), tokenizer=tokenizer)


def test_max_samples_is_a_seeded_sample_in_the_order_of_the_data(write, capsys):
    name = write([{"prompt": f"p{i}", "answer": i} for i in range(50)])
    first, again = (texts(load_split(arguments(name, max_samples=10), seed=1)) for _ in range(2))
    assert len(first) == 10 and first == again
    assert first == sorted(first, key=lambda text: int(text[1:]))
    assert first != texts(load_split(arguments(name, max_samples=10), seed=2))
    assert first != [f"p{i}" for i in range(10)]
    assert "10 of 50 prompts are kept" in capsys.readouterr().out


def test_only_the_first_process_prints(write, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    load_split(arguments(write(ROWS)))
    assert capsys.readouterr().out == ""


# ---- train and eval ------------------------------------------------------------------------------------------------


def test_eval_size_holds_out_a_disjoint_seeded_part(write, capsys):
    name = write([{"prompt": f"p{i}", "answer": i} for i in range(40)])
    train, held_out = load_train_and_eval(arguments(name, eval_size=8), seed=3)
    assert (len(train), len(held_out)) == (32, 8)
    assert set(texts(train)).isdisjoint(texts(held_out))
    out = capsys.readouterr().out
    assert "also evaluation prompts" not in out and "eval: 8 of 40 training prompts are held out" in out
    assert texts(held_out) == texts(load_train_and_eval(arguments(name, eval_size=8), seed=3)[1])
    assert texts(held_out) != texts(load_train_and_eval(arguments(name, eval_size=8), seed=4)[1])


def test_copies_of_a_held_out_prompt_leave_training(write, capsys):
    name = write([{"prompt": f"p  {i}" if copy else f"p {i}", "answer": i} for i in range(10) for copy in (0, 1)])
    train, held_out = load_train_and_eval(arguments(name, eval_size=3))
    shared = {" ".join(text.split()) for text in texts(train)} & {" ".join(text.split()) for text in texts(held_out)}
    assert not shared
    assert "are also evaluation prompts; they are dropped" in capsys.readouterr().out


def test_training_rows_of_the_evaluation_file_are_dropped(write, capsys):
    train_name, eval_name = write(ROWS), write(ROWS[:1], "eval.jsonl")
    train, held_out = load_train_and_eval(arguments(train_name, eval_dataset_name=eval_name, system_prompt="S"))
    assert texts(train) == ["2*5", "6/4"] and texts(held_out) == ["1+1"]
    assert "1 of 3 prompts are also evaluation prompts" in capsys.readouterr().out
    with pytest.raises(ValueError, match="All 1 training prompts are among the 3 evaluation prompts"):
        load_train_and_eval(arguments(eval_name, eval_dataset_name=train_name))


def test_an_evaluation_file_may_have_the_usual_columns(write):
    """The column names given are those of the training file; a recipe's evaluation file keeps its own."""
    own = write([{"question": "1+1", "result": 2}, {"question": "2*5", "result": 10}])
    usual = write([{"prompt": "6/4", "answer": "1.5"}], "eval.jsonl")
    columns = {"prompt_column": "question", "answer_column": "result"}
    train, held_out = load_train_and_eval(arguments(own, eval_dataset_name=usual, **columns))
    assert texts(train) == ["1+1", "2*5"] and texts(held_out) == ["6/4"] and held_out["answer"][:] == ["1.5"]
    neither = write([{"text": "6/4", "answer": "1.5"}], "other.jsonl")
    with pytest.raises(ValueError, match="other.jsonl has no column 'question', only text, answer"):
        load_train_and_eval(arguments(own, eval_dataset_name=neither, **columns))


def test_max_samples_limits_training_only(write):
    train, held_out = load_train_and_eval(arguments(write(ROWS), eval_size=2, max_samples=1))
    assert (len(train), len(held_out)) == (1, 2)


def test_no_evaluation_set_is_none(write):
    name = write(ROWS)
    assert load_split(arguments(name), "eval") is None
    assert load_train_and_eval(arguments(name))[1] is None


def test_enough_prompts():
    check_enough_prompts(6, 6)
    with pytest.raises(ValueError, match="has 6 prompts and one rollout takes 8 .* Give at least 8 prompts"):
        check_enough_prompts(6, 8)


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        ('{"prompt": "a", "answer": 1}\n\n{"prompt": \n', {}, r"data\.jsonl, line 3, is not JSON"),
        ("[1, 2]\n", {}, r"line 1, is list, not an object"),
        ("", {}, "has no rows for train"),
        ([{"question": "a", "answer": "1"}], {}, "no column 'prompt', only question, answer. Did you mean 'question'"),
        ([{"prompt": "a", "answr": "1"}], {}, "no column 'answer', only prompt, answr. Did you mean 'answr'"),
        (ROWS, {"answer_column": "answer.text"}, "looks for 'text' in answer, which has str"),
        ([{"prompt": "a", "answer": {"value": "1"}}], {}, "answer holds dict"),
        ([{"prompt": "a", "answer": {"value": "1"}}], {"answer_column": "answer.text"}, "which has keys value"),
        (
            [{"prompt": "a", "answer": "1"}, {"prompt": {"b": 1}, "answer": "1"}],
            {},
            "row 1: the column prompt holds a dict",
        ),
        (ROWS, {"prompt_format": "chatml"}, "'chatml' is not known. Did you mean 'chat'"),
        (ROWS, {"prompt_template": "Solve it: prompt"}, r"has no \{prompt\}"),
        (ROWS, {"prompt_format": "plain", "system_prompt": "S"}, "system_prompt needs chat messages"),
        (ROWS, {"max_prompt_tokens": 5}, "max_prompt_tokens=5 counts tokens: pass the model's tokenizer"),
        (ROWS, {"dataset_config": "main"}, "dataset_config=main is for Hub datasets"),
        (ROWS, {"dataset_train_split": "train"}, "is one file and has no split 'train'"),
        (ROWS, {"eval_size": 3}, "eval_size=3 leaves nothing of 3 prompts"),
        (ROWS, {"eval_size": 1, "eval_dataset_name": "gsm8k"}, "Keep one of the two"),
        (ROWS, {"max_samples": 0}, "max_samples=0 is less than 1"),
        (ROWS, {"eval_size": -1}, "eval_size=-1 is less than 0"),
    ],
)
def test_a_mistake_is_one_clear_sentence(write, content, fields, message):
    with pytest.raises(ValueError, match=message):
        load_train_and_eval(arguments(write(content), **fields))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.json", '[{"prompt": "a"},\n {"prompt": }]', r"data\.json, line 2, is not JSON"),
        ("data.json", "[1]", "item 0 is int, not an object"),
        ("data.csv", "prompt,answer\na,1,2\n", "line 2, has 1 cells more than the header's 2 columns"),
        ("data.parquet", "no parquet", "is not a parquet file"),
        ("data.txt", "x", "suffix '.txt'"),
    ],
)
def test_a_broken_file_is_named(write, name, content, message):
    with pytest.raises(ValueError, match=message):
        load_split(arguments("./" + write(content, name)))


def test_a_missing_file_names_its_nearest_sibling(write):
    write(ROWS, "train.jsonl")
    with pytest.raises(FileNotFoundError, match=r"trian\.jsonl doesn't exist .* Did you mean 'train\.jsonl'\?"):
        load_split(arguments("trian.jsonl"))


def test_unknown_names(write):
    write(ROWS)
    with pytest.raises(ValueError, match=r"'deepmath-103' is not a preset\. Did you mean 'deepmath-103k'\?"):
        load_split(arguments("deepmath-103"))
    with pytest.raises(ValueError, match="dataset_name is not set. Use a preset"):
        load_split(ScriptArguments())
    with pytest.raises(ValueError, match="Use 'train' or 'eval'"):
        load_split(arguments("data.jsonl"), "test")


def test_a_tokenizer_without_chat_template_is_refused_early(write):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        load_split(arguments(write(ROWS)), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (ConnectionError("Couldn't reach it"), ConnectionError, "can't be reached on the Hub .* local .jsonl"),
        (datasets.exceptions.DatasetNotFoundError("no"), ValueError, "is not on the Hub, or is private"),
        (ValueError('Unknown split "trian"'), ValueError, "config None, split train.* Unknown split"),
    ],
)
def test_the_hub_fails(monkeypatch, error, raised, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(raised, match=message):
        load_split(arguments("someone/something"))
