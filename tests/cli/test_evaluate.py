"""`scripts/evaluate.py` on a tiny model: named sets, samples, engines, adapters, rewards and baselines."""

import json
import shutil
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import tiny_model
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sapo_trl.cli import evaluate
from sapo_trl.cli.models import adapter_base
from sapo_trl.data import loading
from sapo_trl.evaluation import engines
from sapo_trl.evaluation.samples import read_samples
from sapo_trl.evaluation.sampling import sample_completions

SHORT = ["--num_samples", "2", "--max_completion_length", "6", "--batch_size", "4"]


def by_length(completions, **columns):
    """1 for a completion of an even number of characters; for `--reward` by its dotted path."""
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [float(len(text) % 2 == 0) for text in texts]


REWARD = ["--reward", f"{__name__}.by_length"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer) -> Path:
    """A folder with `model`, `other` (random weights) and `adapter` (LoRA on `model`), and six problems."""
    folder = tmp_path_factory.mktemp("world")
    model = tiny_model(tokenizer)
    model.save_pretrained(folder / "model")
    torch.manual_seed(1)
    type(model)(model.config).save_pretrained(folder / "other")
    for name in ("model", "other"):
        tokenizer.save_pretrained(folder / name)
    based = AutoModelForCausalLM.from_pretrained(folder / "model")
    adapted = get_peft_model(based, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(6)]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def run(world: Path, *words, model: str = "model", data: bool = True) -> int:
    named = ["--dataset_name", str(world / "test.jsonl"), "--prompt_format", "plain"] if data else []
    return evaluate.main(["--model", str(world / model), *named, *SHORT, *REWARD, *map(str, words)])


def completions(path: Path) -> list[str]:
    return [sample.completion for sample in read_samples(path)]


def test_the_summary_and_every_sample_are_written(world, tmp_path, capsys):
    output = tmp_path / "result.json"
    assert run(world, "--output", output) == 0
    result, samples = json.loads(output.read_text()), read_samples(tmp_path / "result.samples.jsonl")
    assert result["num_problems"] == 6 and result["num_samples"] == 2 and len(samples) == 12
    assert result["pass_at_1"]["mean"] == sum(sample.reward for sample in samples) / 12
    assert set(result["scores"]) == {"pass_at_1", "pass_at_2"}  # ks: 1 and num_samples
    assert result["arguments"]["reward"] == REWARD[1] and "Pass@1 (avg@2)" in capsys.readouterr().out
    assert result["arguments"]["dataset_name"] == str(world / "test.jsonl")  # what two evaluations are compared by
    assert run(world, "--output", output) == 0 and "12 of 12 samples are there" in capsys.readouterr().out
    assert run(world, "--output", output, model="other") == 0  # never the samples of another model
    assert completions(tmp_path / "result.samples.jsonl") != [sample.completion for sample in samples]


def test_weights_that_were_trained_on_are_another_model(world, tmp_path, tokenizer, capsys):
    model = tiny_model(tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ["--dataset_name", world / "test.jsonl", "--prompt_format", "plain", "--output", tmp_path / "result.json"]
    assert run(tmp_path, *words, data=False) == 0
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.01)
    model.save_pretrained(tmp_path / "model")
    assert run(tmp_path, *words, data=False) == 0
    assert "samples of another model" in capsys.readouterr().out


def test_the_sets_of_a_training_config(world, tmp_path):
    config = {
        "prompt_format": "plain", "eval_dataset_name": str(world / "test.jsonl"), "temperature": 0.5, "lr": "not read",
        "eval_sets": {"greedy": {"temperature": 0, "num_samples": 1}, "few": {"num_problems": 2, "num_samples": 4}},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    output = tmp_path / "result.json"
    assert run(world, "--config", tmp_path / "config.yaml", "--output", output, data=False) == 0
    result = json.loads(output.read_text())
    assert {name: (x["num_problems"], x["num_samples"]) for name, x in result.items()} == {
        "greedy": (6, 1),
        "few": (2, 4),
    }
    assert result["few"]["arguments"]["temperature"] == "0.5" and "pass_at_4" in result["few"]["scores"]
    assert len(completions(tmp_path / "result.few.samples.jsonl")) == 8
    assert run(world, "--config", tmp_path / "config.yaml", "--output", output, "--baseline", output, data=False) == 0
    same = json.loads(output.read_text())["greedy"]["comparison"]
    assert (same["difference"]["mean"], same["gained"], same["lost"]) == (0, [], [])


@pytest.mark.parametrize(
    ("rewards", "words", "graded_by"),
    [
        (["reasoning_gym"], [], "reasoning_gym"),
        (["reasoning_gym"], ["--reward", "length"], "length"),
        ("my.module.reward", [], "my.module.reward"),  # text is a list of one
        (["multiple_choice", "repetition"], ["--reward", "multiple_choice"], "multiple_choice"),
        ([], [], "accuracy"),
    ],
)
def test_the_only_reward_of_a_training_config_grades(tmp_path, rewards, words, graded_by):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"reward_funcs": rewards}))
    options = ["--model", "any", "--config", str(tmp_path / "config.yaml"), *words]
    assert evaluate.parse_arguments(options).reward == graded_by


def test_several_rewards_of_a_training_config_are_no_choice(tmp_path):
    (tmp_path / "config.yaml").write_text("reward_funcs: [multiple_choice, repetition]")
    with pytest.raises(ValueError, match="--config has 2 reward_funcs; name one with --reward"):
        evaluate.parse_arguments(["--model", "any", "--config", str(tmp_path / "config.yaml")])


TRAINED = {"dataset_name": "me/sums", "dataset_config": "hard", "prompt_column": "sum"}


@pytest.mark.parametrize(
    ("config", "words", "source"),
    [
        ({"eval_dataset_name": "me/sums"}, [], ("me/sums", "hard", "test", "sum")),
        ({"eval_dataset_split": "held_out"}, [], ("me/sums", "hard", "held_out", "sum")),
        ({"eval_dataset_name": "me/other"}, [], ("me/other", None, "test", "sum")),
        ({"eval_dataset_name": "me/other"}, ["--dataset_config", "easy"], ("me/other", "easy", "test", "sum")),
        ({}, ["--dataset_name", "me/sums"], ("me/sums", "hard", "test", "sum")),
        ({}, ["--dataset_name", "me/other"], ("me/other", None, "test", "sum")),
    ],
)
def test_the_dataset_config_of_a_training_config_is_for_its_own_dataset(tmp_path, monkeypatch, config, words, source):
    """As in training, where it describes dataset_name, and other datasets only where they are the same one."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(TRAINED | config))
    read = []

    def no_hub(name, config, split):
        read.append((name, config, split))
        return Dataset.from_dict({"sum": ["1+1"], "answer": ["2"]})

    monkeypatch.setattr(loading, "_read_hub", no_hub)
    arguments = evaluate.parse_arguments(["--model", "any", "--config", str(tmp_path / "config.yaml"), *words])
    sets = evaluate.check_arguments(arguments)
    problems = evaluate.load_problems(arguments, sets, None)
    assert read == [source[:3]] and problems[""]["answer"][:] == ["2"]


def test_options_of_the_chat_template_reach_the_engine_and_name_the_samples(world, tmp_path, monkeypatch, capsys):
    config, seen = tmp_path / "config.yaml", []
    config.write_text("chat_template_kwargs: {enable_thinking: false}\nreward_funcs: [accuracy]")
    real = evaluate.sample_completions
    monkeypatch.setattr(
        evaluate,
        "sample_completions",
        lambda *args, **kwargs: seen.append(kwargs.get("chat_template_kwargs")) or real(*args, **kwargs),
    )
    words = ["--config", config, "--num_problems", "1", "--output", tmp_path / "result.json"]
    assert run(world, *words) == 0
    assert run(world, *words, "--chat_template_kwargs", '{"enable_thinking": true}') == 0
    assert "samples of another model or other options" in capsys.readouterr().out
    assert run(world, *words, "--chat_template_kwargs", "null") == 0
    assert seen == [{"enable_thinking": False}, {"enable_thinking": True}, None]


def test_samples_of_another_server_or_of_changed_reward_code_are_other_samples(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    code = tmp_path / "graded_here.py"
    code.write_text("def reward(completions, **columns):\n    return [1.0] * len(completions)\n")

    def made_by(url, reward="accuracy"):
        words = ["--model", "m", "--dataset_name", "d.jsonl", "--engine", "openai", "--base_url", url]
        arguments = evaluate.parse_arguments([*words, "--reward", reward])
        return evaluate.made_by(arguments, "m", evaluate.check_arguments(arguments)[""])

    assert made_by("http://a/v1") == made_by("http://a/v1/") != made_by("http://b/v1")
    before = made_by("http://a/v1", "graded_here.reward")
    assert before == made_by("http://a/v1", "graded_here.reward")
    code.write_text(code.read_text().replace("1.0", "0.0"))
    assert made_by("http://a/v1", "graded_here.reward") != before


def test_a_tokenizer_without_a_pad_token_is_padded_with_its_end_token(world, tmp_path):
    shutil.copytree(world / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").pad_token is None
    words = ["--dataset_name", world / "test.jsonl", "--prompt_format", "plain", "--num_problems", "2"]
    assert run(tmp_path, *words, data=False) == 0


def test_a_baseline_is_a_model_or_its_samples(world, tmp_path, capsys):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert run(world, "--output", first, "--baseline", world / "other") == 0
    told = capsys.readouterr().out
    assert run(world, "--output", second, "--baseline", tmp_path / "first.baseline.samples.jsonl") == 0
    found, again = (json.loads(path.read_text())["comparison"] for path in (first, second))
    assert found == again and set(found) == {"difference", "gained", "lost"}
    shares = []
    for path in (tmp_path / "first.baseline.samples.jsonl", tmp_path / "first.samples.jsonl"):
        rewards = [sample.reward for sample in read_samples(path)]
        shares.append([sum(rewards[i : i + 2]) / 2 for i in range(0, 12, 2)])
    assert found["difference"]["mean"] == pytest.approx((sum(shares[1]) - sum(shares[0])) / 6)
    assert found["gained"] == [i for i, (a, b) in enumerate(zip(*shares)) if b == 1 and a < 1]
    assert "difference of Pass@1" in told and "problems lost" in told


def test_an_adapter_is_loaded_onto_its_base(world, tmp_path):
    assert run(world, "--output", tmp_path / "base.json") == 0
    assert run(world, "--output", tmp_path / "lora.json", model="adapter") == 0
    assert completions(tmp_path / "base.samples.jsonl") != completions(tmp_path / "lora.samples.jsonl")


@pytest.fixture
def server(world):
    """An OpenAI-compatible server of the tiny model; it is busy the first time. `seen`: (path, body) of requests."""
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    seen, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append((self.path, body))
                status, answer = self.answer(body)
            content = json.dumps(answer).encode()
            if status == 700:  # less than is announced: http.client.IncompleteRead
                self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\n{")
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def answer(self, body):
            if body["model"] == "garbled":
                return 700, {}
            if len(seen) == 1:
                return 503, {"error": "still loading"}
            if body["model"] != "served":
                return 404, {"error": f"no model {body['model']}"}
            prompt = body.get("prompt") or body["messages"]
            sampling = {"temperature": body["temperature"], "top_p": body["top_p"], "seed": body["seed"]}
            sample = sample_completions(model, tokenizer, [prompt], 1, body["max_tokens"], **sampling)[0][0]
            text = {"text": sample.text} if "prompt" in body else {"message": {"content": sample.text}}
            choice = {**text, "finish_reason": "length" if sample.truncated else "stop"}
            return 200, {"choices": [choice], "usage": {"completion_tokens": sample.num_tokens}}

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/v1", seen, partial(sample_completions, model, tokenizer)
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.mark.parametrize("prompt_format, place", [("plain", "/v1/completions"), ("chat", "/v1/chat/completions")])
def test_a_server_gives_the_samples_of_its_model(world, tmp_path, server, monkeypatch, prompt_format, place):
    url, seen, local = server
    waits = []
    monkeypatch.setattr(engines.time, "sleep", waits.append)
    words = ["--dataset_name", str(world / "test.jsonl"), "--prompt_format", prompt_format, *SHORT, *REWARD]
    words += ["--engine", "openai", "--base_url", url, "--output", str(tmp_path / "result.json")]
    assert evaluate.main(["--model", "served", *words, "--num_problems", "3"]) == 0
    samples = read_samples(tmp_path / "result.samples.jsonl")
    assert waits == [1.0] and len(seen) == 7 and {path for path, _ in seen} == {place}  # one was tried again
    for i, sample in enumerate(samples):
        number = i if sample.problem < 2 else i - 4  # two problems a unit
        ((expected,),) = local([sample.prompt], 1, max_new_tokens=6, seed=(sample.seed + number) % 2**31)
        assert (sample.completion, sample.num_tokens, sample.truncated) == (
            expected.text, expected.num_tokens, expected.truncated,
        )  # fmt: skip


def test_a_server_that_refuses_or_is_not_there_is_named_with_its_address(world, server, monkeypatch, capsys):
    monkeypatch.setattr(engines.time, "sleep", lambda seconds: None)
    url = server[0]
    words = ["--dataset_name", str(world / "test.jsonl"), *SHORT, *REWARD, "--engine", "openai", "--base_url"]
    assert evaluate.main(["--model", "wrong", *words, url]) == 1
    told = capsys.readouterr().err
    assert f"{url}/chat/completions can't be used" in told and "404" in told and "no model wrong" in told
    assert evaluate.main(["--model", "served", *words, "http://127.0.0.1:9/v1"]) == 1
    assert "the server at http://127.0.0.1:9/v1/chat/completions can't be used" in capsys.readouterr().err
    assert evaluate.main(["--model", "garbled", *words, url, "--num_problems", "1", "--num_samples", "1"]) == 1
    assert "IncompleteRead" in capsys.readouterr().err
    monkeypatch.setattr(engines.time, "sleep", lambda seconds: pytest.fail("tried again"))
    assert evaluate.main(["--model", "served", *words, "http://host:port/v1"]) == 1
    assert "nonnumeric port: 'port'" in capsys.readouterr().err


def test_a_server_gets_the_options_of_the_chat_template_with_chat_messages(monkeypatch):
    sent = []

    def answer(url, body):
        sent.append((url, body.get("chat_template_kwargs")))
        text = {"text": "2", "message": {"content": "2"}, "finish_reason": "stop"}
        return {"choices": [text], "usage": {"completion_tokens": 1}}

    monkeypatch.setattr(engines, "_post", answer)
    chat = [{"role": "user", "content": "1+1"}]
    for prompt in (chat, "1+1"):
        engines.sample_from_server("http://a", "m", [prompt], chat_template_kwargs={"enable_thinking": False})
    engines.sample_from_server("http://a", "m", [chat])
    assert sent == [
        ("http://a/chat/completions", {"enable_thinking": False}),
        ("http://a/completions", None),
        ("http://a/chat/completions", None),
    ]


def test_vllm_gets_token_ids_and_a_seed_per_problem(world, monkeypatch):
    """On a stand-in with the names of vLLM's interface that are used; `make test-vllm` runs vLLM itself."""
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    asked = []

    class LLM(SimpleNamespace):
        def generate(self, inputs, params):
            asked.extend(zip(inputs, params, strict=True))
            ids = tokenizer("12").input_ids
            halves = [SimpleNamespace(text="12", token_ids=ids, finish_reason=x) for x in ("stop", "length")]
            return [SimpleNamespace(outputs=halves) for _ in inputs]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    llm = engines.load_vllm(str(world / "model"), seed=3)
    assert vars(llm) == {"model": str(world / "model"), "seed": 3, "enforce_eager": True, "dtype": "float32"}
    found = engines.sample_with_vllm(llm, tokenizer, ["1+", "7"], 2, max_new_tokens=5, temperature=0.5, seed=9)
    assert [inputs["prompt_token_ids"] for inputs, _ in asked] == [tokenizer("1+").input_ids, tokenizer("7").input_ids]
    assert [vars(params) for _, params in asked] == [
        {"n": 2, "max_tokens": 5, "temperature": 0.5, "top_p": 1.0, "seed": seed} for seed in (9, 10)
    ]
    assert [[x.truncated for x in row] for row in found] == [[False, True]] * 2 and found[0][0].num_tokens == 2
    template = "{{ messages[0]['content'] }}{% if enable_thinking is false %}=0{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    chat = [{"role": "user", "content": "1+1"}]
    engines.sample_with_vllm(llm, tokenizer, [chat], chat_template_kwargs={"enable_thinking": False})
    assert asked[-1][0]["prompt_token_ids"] == tokenizer("1+1=0").input_ids


REFUSED = [
    (["--engine", "vllm"], "--engine vllm: vLLM can't be imported"),
    (["--engine", "vllmm"], "--engine vllmm is not one of transformers, vllm, openai. Did you mean 'vllm'?"),
    (["--engine", "openai"], "--engine openai and --base_url http://… go together"),
    (["--base_url", "http://host/v1"], "--engine openai and --base_url http://… go together"),
    (
        ["--engine", "openai", "--base_url", "host:8000/v1"],
        "--base_url host:8000/v1 must begin with http:// or https://",
    ),
    (
        ["--eval_sets", '{"a": {"dataset_name": "aime25"}}'],
        "every set of eval_sets has its own dataset, so that --dataset",
    ),
    (
        ["--eval_sets", '{"a": {"dataset_split": "b"}}', "--dataset_split", "c"],
        "every set of eval_sets has its own split, so that --dataset_split does nothing",
    ),
    (
        ["--dataset_name", "null", "--dataset_config", "c", "--eval_sets", '{"a": {"dataset_name": "aime25"}}'],
        "so that --dataset_config does nothing",
    ),
    (["--chat_template_kwargs", "[1]"], "--chat_template_kwargs [1] is not a JSON object"),
    (["--chat_template_kwargs", "{a}"], "--chat_template_kwargs is not JSON"),
    (["--chat_template_kwargs", '{"tokenize": true}'], "has tokenize, which is no option of a template"),
    (["--reward", "acuracy"], "'acuracy' is no reward. The nearest name is 'accuracy'"),
    (["--seed", "-1"], "--seed -1 is less than 0"),
    (["--ks", "0"], "--ks 0: pass@k needs k from 1 to --num_samples 2"),
    (["--eval_sets", '{"a": {"num_samples": "two"}}'], "eval_sets.a.num_samples two is no integer"),
    (["--eval_sets", "{aime}"], "--eval_sets is not JSON"),
    (["--eval_sets", "[1]"], "eval_sets is [1], not a mapping"),
    (["--baseline", "no/result.json"], "there is no no/result.samples.jsonl"),
    (["--baseline", "no/model"], "the model no/model"),
]


@pytest.mark.parametrize("words, message", REFUSED, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_what_could_not_end_well_is_refused_before_anything_is_sampled(world, words, message, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "collect", lambda *_: pytest.fail("sampled"))
    assert run(world, *words) == 1
    assert message in capsys.readouterr().err


def test_a_baseline_on_other_problems_and_a_reserved_column_are_refused(world, tmp_path, monkeypatch, capsys):
    assert run(world, "--output", tmp_path / "result.json", "--num_problems", "4") == 0
    monkeypatch.setattr(evaluate, "collect", lambda *_: pytest.fail("sampled"))
    assert run(world, "--baseline", tmp_path / "result.json") == 1
    assert "the baseline has 4 problems and the evaluation 6" in capsys.readouterr().err
    (tmp_path / "test.jsonl").write_text('{"prompt": "1+1", "answer": "2", "completions": "x"}\n')
    assert run(world, "--dataset_name", tmp_path / "test.jsonl") == 1
    assert "has a column 'completions'" in capsys.readouterr().err
    assert run(world, data=False) == 1
    assert "--dataset_name is missing" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{}", '{"base_model_name_or_path": null}', "[1]", "{"])
def test_an_adapter_without_its_model_is_refused(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"adapter_config\.json (has no base_model_name_or_path|is not JSON)"):
        adapter_base(str(tmp_path))
