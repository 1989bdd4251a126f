"""Tools, environments and rollout functions that a config names by their dotted paths, through the training command."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import tiny_model

from sapo_trl import SAPOTrainer
from sapo_trl.cli.parse import parse_run
from sapo_trl.cli.train import build_trainer, train
from sapo_trl.tiny import build_tokenizer, make_problems
from sapo_trl.tiny_tools import answered, give_calls

RECIPE = Path(__file__).parents[2] / "configs/tiny/calculator.yaml"
MODULE = """
class Counter:
    def reset(self, **columns):
        self.total = 0
        return "Count to 12."

    def calculator(self, expression: str) -> int:
        '''
        Adds to the counter.

        Args:
            expression: What is added.

        Returns:
            The counter.
        '''
        self.total += int(expression)
        return self.total

    def get_reward(self) -> float:
        return float(self.total)

def generate(prompts, trainer):
    ids = [trainer.processing_class.apply_chat_template(x, tokenize=True)["input_ids"] for x in prompts]
    rows = range(len(prompts))
    return {
        "prompt_ids": ids,
        "completion_ids": [[5 + i % 7, 6, 7, 8] for i in rows],
        "logprobs": [[-1.0, -2.0, 0.0, -0.5] for _ in rows],
        "env_mask": [[1, 1, 0, 1] for _ in rows],
        "mark": [float(i % 4) for i in rows],
    }

def marked(mark, **_):
    return mark

number = 3
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tokenizer = give_calls(build_tokenizer())
    tiny_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    problems = make_problems(16, 0, ("modular",))
    rows = [json.dumps({"prompt": problem.prompt, "answer": problem.answer}) for problem in problems]
    (folder / "train.jsonl").write_text("\n".join(rows))
    (folder / "own_environment.py").write_text(MODULE)
    return folder


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """One rollout of a recipe with a model that writes a call in every second first turn; trainer, first metrics."""
    monkeypatch.syspath_prepend(str(world))
    generate = SAPOTrainer._generate_single_turn

    def calls(self, prompt_ids, *args, **kwargs):
        ids, logprobs = generate(self, prompt_ids, *args, **kwargs)
        if not any("</call>" in self.processing_class.decode(prompt) for prompt in prompt_ids):
            call = self.processing_class(f"<call>{CALL}</call><|im_end|>")["input_ids"]
            ids = [call if i % 2 else row for i, row in enumerate(ids)]
        return ids, logprobs

    monkeypatch.setattr(SAPOTrainer, "_generate_single_turn", calls)

    def start(**values):
        recipe = yaml.safe_load(RECIPE.read_text())
        own = {"model_name_or_path": str(world / "model"), "dataset_name": str(world / "train.jsonl")}
        own |= {"per_device_train_batch_size": 8, "num_mini_batches": 1, "num_generations": 4, "max_steps": 1}
        own |= {"eval_strategy": "no", "eval_steps": None, "eval_dataset_name": None}
        own |= {"require_off_policy": False, "dump_ratios_every": 0}
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(recipe | own | {"output_dir": str(tmp_path / "run")} | values))
        arguments = parse_run(["--config", str(config)])
        trainer = build_trainer(arguments)
        assert train(arguments, trainer) == 0
        lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
        return trainer, json.loads(lines[0])

    return start


CALL = "12"


def trained_lengths(trainer):
    return [int(row.trained.sum()) for part in trainer._rollout.mini_batches for row in part.rows]


def test_tools(run):
    trainer, metrics = run()
    assert metrics["tools/call_frequency"] == 0.5
    own, told = [], []
    for part in trainer._rollout.mini_batches:
        for row in part.rows:
            own.append(int(row.trained.sum()))
            told.append(trainer.processing_class.decode(row.input_ids[row.num_prompt :][~row.trained]))
    assert sorted(told) == [""] * 4 + ["\n<|im_start|>tool\n12<|im_end|>\n<|im_start|>assistant\n"] * 4
    assert metrics["completions/mean_length"] == sum(own) / 8


def test_an_environment_that_brings_prompts_and_rewards(run):
    own = {"environment_factory": "own_environment.Counter", "tools": [], "dataset_name": None, "reward_funcs": []}
    _, metrics = run(**own)
    assert metrics["reward"] == 6.0 and metrics["tools/call_frequency"] == 0.5


def test_a_rollout_function(run):
    own = {"rollout_func": "own_environment.generate", "tools": [], "max_tool_calling_iterations": None}
    trainer, metrics = run(**own, reward_funcs=["own_environment.marked"])
    assert metrics["reward"] == 1.5 and trained_lengths(trainer) == [3] * 8


REFUSED = [
    (["--tools", "sapo_trl.tiny_tools.calculater"], "has no 'calculater'. The nearest name is 'calculator'"),
    (["--tools", "no_such_module.tool"], "tools: 'no_such_module.tool' cannot be loaded: No module named"),
    (["--environment_factory", "own_environment.number"], "own_environment.number' is a int, not a function"),
    (["--environment_factory", "calculator"], "environment_factory: 'calculator' cannot be loaded: Empty module name"),
    (["--rollout_func", "own_environment.generate"], "tools and environment_factory would not be used"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_refused_before_the_model_loads(world, monkeypatch, words, message):
    monkeypatch.syspath_prepend(str(world))
    with pytest.raises(ValueError, match=message):
        parse_run(["--config", str(RECIPE), *words])


def test_a_first_turn_with_its_answer():
    assert [answered(x) for x in ("<call>7*3+8%20</call>", "\\boxed{3}", "<call>7**3</call>", "<call>7%0</call>")] == [
        "\\boxed{9}", "\\boxed{3}", "<call>7**3</call>", "<call>7%0</call>",
    ]  # fmt: skip
