"""What runs with TRL's `GRPOTrainer` runs with `SAPOTrainer`: the forms that TRL's documentation shows, the two names
changed, on a tiny model and rows of our own. Each takes two optimizer steps of one rollout."""

import asyncio
import re
from pathlib import Path

import pytest
import trl
from conftest import PLAIN, tiny_model
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Qwen3ForSequenceClassification
from trl.rewards import accuracy_reward, think_format_reward

from sapo_trl import SAPOConfig, SAPOTrainer
from sapo_trl.tiny import build_tokenizer

TEXTS = Dataset.from_list([{"prompt": f"The sky at {i} is", "ground_truth": str(i)} for i in range(8)])
CHATS = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": f"What is {i}+1?"}],
            "solution": str(i + 1),
            "task": "math" if i % 2 else "code",
        }
        for i in range(8)
    ]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    tokenizer = build_tokenizer()
    tiny_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def train(tmp_path, folder):
    """Train two steps; returns the trainer and its log, one dictionary of everything."""

    def run(reward_funcs=None, train_dataset=None, cls=SAPOTrainer, model=folder, trl_arguments=None, **fields):
        usual = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 6, "max_steps": 2}
        usual |= {"num_mini_batches": 2, "logging_steps": 1, "disable_tqdm": True}
        config = SAPOConfig(output_dir=str(tmp_path / "run"), **(PLAIN | usual | fields))
        trainer = cls(
            model=model, reward_funcs=reward_funcs, args=config, train_dataset=train_dataset, **(trl_arguments or {})
        )
        trainer.train()
        assert trainer.state.global_step == 2
        log = {name: value for record in trainer.state.log_history for name, value in record.items() if value != 0.0}
        return trainer, log

    return run


# ---- reward functions ------------------------------------------------------------------------------------------------


def text_of(completion) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def reward_num_unique_chars(completions, **kwargs):
    return [float(len(set(text_of(completion)))) for completion in completions]


def reward_tokens(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def reward_format(completions, **kwargs):
    pattern = re.compile(r"^<think>.*?</think><answer>.*?</answer>$")
    return [1.0 if pattern.match(text_of(completion)) else 0.0 for completion in completions]


def reward_reference(completions, ground_truth, **kwargs):
    found = [re.search(r"\\boxed\{(.*?)\}", completion) for completion in completions]
    return [float(bool(match) and match[1] == truth) for match, truth in zip(found, ground_truth, strict=True)]


def reward_math(completions, task, **kwargs):
    return [float(len(text_of(c)) % 3) if t == "math" else None for c, t in zip(completions, task, strict=True)]


def reward_code(completions, task, **kwargs):
    return [float(len(text_of(c)) % 2) if t == "code" else None for c, t in zip(completions, task, strict=True)]


async def reward_waits(prompts, completions, **kwargs):
    await asyncio.sleep(0.01)
    return [float(bool(text_of(completion))) for completion in completions]


def reward_logs(completions, trainer_state, log_extra, log_metric, **kwargs):
    log_extra("length", [len(text_of(completion)) for completion in completions])
    log_metric("steps_so_far", trainer_state.global_step + 1.0)
    return reward_num_unique_chars(completions)


FUNCTIONS = {
    "quick start": (TEXTS, reward_num_unique_chars),
    "tokens": (TEXTS, reward_tokens),
    "format of a chat": (CHATS, [reward_format, reward_num_unique_chars]),
    "reference": (TEXTS, [reward_reference, reward_tokens]),
    "TRL's own": (CHATS, [accuracy_reward, think_format_reward]),
    "asynchronous": (CHATS, [reward_num_unique_chars, reward_waits]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_reward_functions(train, name):
    dataset, funcs = FUNCTIONS[name]
    trainer, _ = train(funcs, dataset)
    logged = trainer.state.log_history[0]
    names = [func.__name__ for func in (funcs if isinstance(funcs, list) else [funcs])]
    assert logged["reward"] == pytest.approx(sum(logged[f"rewards/{name}/mean"] for name in names))


def test_tasks_with_a_reward_each(train):
    """What one function leaves to the other (None) counts in neither mean."""
    trainer, _ = train([reward_math, reward_code], CHATS, reward_weights=[1.0, 2.0])
    logged = trainer.state.log_history[0]
    assert logged["rewards/unscorable_frac"] == 0
    means, kinds = [logged[f"rewards/reward_{kind}/mean"] for kind in ("math", "code")], range(5)
    assert any(logged["reward"] == pytest.approx((k * means[0] + (4 - k) * 2 * means[1]) / 4) for k in kinds)


def test_what_a_reward_logs(train):
    trainer, log = train(reward_logs, CHATS, log_completions=True)
    assert log["steps_so_far"] == 1.0 and len(trainer._logs["extra"]["length"]) == 8


def test_a_reward_model_beside_a_function(train, tmp_path):
    """A folder is loaded as a sequence classifier; its score and the function's add up."""
    config = tiny_model(build_tokenizer()).config
    config.num_labels, config.pad_token_id = 1, build_tokenizer().pad_token_id
    Qwen3ForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    build_tokenizer().save_pretrained(tmp_path / "judge")
    _, log = train([str(tmp_path / "judge"), reward_num_unique_chars], CHATS)
    both = log["rewards/judge/mean"] + log["rewards/reward_num_unique_chars/mean"]
    assert log["reward"] == pytest.approx(both, abs=1e-5) and log["rewards/judge/std"] > 0


# ---- models and data -------------------------------------------------------------------------------------------------


def test_a_model_object_with_adapters_and_a_reference(train, folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer, log = train(
        reward_num_unique_chars,
        TEXTS,
        model=model,
        beta=0.04,
        learning_rate=1e-2,
        trl_arguments={"peft_config": lora, "processing_class": build_tokenizer()},
    )
    assert trainer.ref_model is None and log["kl"] > 0


def test_streams(train):
    _, log = train(
        reward_num_unique_chars,
        TEXTS.to_iterable_dataset(),
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=4,
        trl_arguments={"eval_dataset": TEXTS.select(range(2)).to_iterable_dataset()},
    )
    assert log["eval_reward"] > 0


# ---- tools, environments, rollouts of one's own ----------------------------------------------------------------------


def multiply(a: int, b: int) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first.
        b: The second.

    Returns:
        The product.
    """
    return a * b


class Counter:
    """An environment: its public methods are tools, and it gives the reward."""

    def reset(self, **kwargs) -> str | None:
        self.total = 0
        return "Count to 12."

    def increment(self, step: int) -> int:
        """
        Adds to the counter.

        Args:
            step: What is added.

        Returns:
            The counter.
        """
        self.total += step
        return self.total

    def get_reward(self) -> float:
        return float(self.total)


def tool_tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    return tokenizer


class CallsTools(SAPOTrainer):
    """Every second completion is replaced by a call, which no untrained model would write."""

    call = ""
    answers = 0

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self.answers += 1
        if self.answers % 2:  # the turn after a call is the model's own
            written = self.processing_class(f"<tool_call>\n{self.call}\n</tool_call><|im_end|>")["input_ids"]
            completion_ids = [written if i % 2 else ids for i, ids in enumerate(completion_ids)]
        return completion_ids, logprobs


def test_tools(train):
    class Multiplies(CallsTools):
        call = '{"name": "multiply", "arguments": {"a": 3, "b": 4}}'

    tools = {"tools": [multiply], "processing_class": tool_tokenizer()}
    trainer, log = train(
        reward_num_unique_chars, CHATS, Multiplies, max_completion_length=160, max_tool_calling_iterations=1,
        trl_arguments=tools, log_completions=True,
    )  # fmt: skip
    assert log["tools/call_frequency"] == 0.5 and "tools/failure_frequency" not in log
    assert any("12" in str(completion) for completion in trainer._logs["completion"])
    untrained = [int((~row.trained).sum()) for part in trainer._rollout.mini_batches for row in part.rows]
    assert sum(n > 0 for n in untrained) == 4  # the tool's answer is not trained on


def test_an_environment_that_brings_prompts_and_rewards(train):
    class Increments(CallsTools):
        call = '{"name": "increment", "arguments": {"step": 12}}'

    own = {"environment_factory": Counter, "processing_class": tool_tokenizer()}
    _, log = train(None, None, Increments, max_completion_length=160, trl_arguments=own)
    assert log["reward"] == log["rewards/Counter/mean"] == 6.0


def test_a_rollout_function(train):
    def rollout(prompts, trainer):
        num = len(prompts)
        return {
            "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": [[5 + i, 6, 7] for i in range(num)],
            "logprobs": [[-1.0, -2.0, -0.5]] * num,
            "env_reward": [float(i) for i in range(num)],
        }

    _, log = train(lambda env_reward, **_: env_reward, TEXTS, trl_arguments={"rollout_func": rollout})
    assert log["reward"] == 3.5 and log["sampling/kl"] > 0
