"""Data that others hand to a rollout, and the settings of others that would change what tokens are drawn from."""

import numpy as np
import pytest
import torch
from conftest import sapo_trainer, tiny_model
from transformers import GenerationConfig

from sapo_trl.rollout.outside import check_rollout, check_sampling, plain_sampling, sampling_difference, short_row


def output(**changes) -> dict:
    """Two rows of three and two completion tokens."""
    right = {
        "prompt_ids": [[5, 6], [7]],
        "completion_ids": [[1, 2, 3], [4, 5]],
        "logprobs": [[-0.1, -0.2, -0.3], [-0.4, -0.5]],
        "env_mask": [[1, 0, 1], [1, 1]],
    }
    return right | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"logprobs": [[-0.1, -0.2, -0.3, -0.4], [-0.4, -0.5]]},
            "row 0 has 3 completion tokens and a list of length 4",
        ),
        (
            {"logprobs": [[-0.1, -0.2, -0.3], [-0.4]]},
            "row 1 has 2 completion tokens and a list of length 1 as logprobs",
        ),
        ({"logprobs": [[-0.1, -0.2, -0.3]]}, "logprobs is a list of length 1, and there are 2 completions"),
        ({"logprobs": [[-0.1, "x", -0.3], [-0.4, -0.5]]}, "logprobs of row 0, token 1 is a str"),
        ({"logprobs": [-0.1, -0.2]}, "row 0 has 3 completion tokens and a float"),
        ({"env_mask": [[1, 0, 1], [1, 1, 1]]}, "row 1 has 2 completion tokens and a list of length 3 as env_mask"),
        ({"completion_ids": [[1, 2, 3], []]}, "completion_ids of row 1 is not a list of at least one token id"),
        ({"completion_ids": [[1, 2.5, 3], [4, 5]]}, "completion_ids of row 0 holds 2.5; token ids are 0 to 9"),
        ({"completion_ids": [[1, 2, 3], [4, 10]]}, "completion_ids of row 1 holds 10; token ids are 0 to 9"),
        ({"completion_ids": [[1, -2, 3], [4, 5]]}, "completion_ids of row 0 holds -2"),
        ({"logprobs": [[-0.1, 0.7, -0.3], [-0.4, -0.5]]}, "logprobs of row 0, token 1 is 0.7; a log-prob is at most 0"),
        ({"env_mask": [[1, 0, 1], [1, 2]]}, "env_mask of row 1, token 1 is 2; a mask is 0 or 1"),
        ({"score": [1.0]}, "score is a list of length 1, and there are 2 prompts"),
        ({"score": [1.0, 0.0, 1.0]}, "score is a list of length 3, and there are 2 prompts"),
        ({"completion_ids": [[1, 2, 3]]}, "completion_ids is a list of length 1; give 2, one per prompt"),
        ({"completion_ids": None}, "completion_ids is a NoneType; give 2"),
        ({"prompt_ids": [[5, 6]]}, "prompt_ids is a list of length 1; give 2"),
        ({"prompt_ids": [[5, 6], 7]}, "prompt_ids of row 1 is not a list"),
    ],
)
def test_rows_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match="rollout_func 'mine': ") as error:
        check_rollout(output(**changes), 2, "mine", 10)
    assert message in str(error.value)


def test_what_fits_passes():
    assert check_rollout(output(), 2, "mine", 10) == output()
    check_rollout(output(logprobs=None, env_mask=None), 2, "mine", 10)
    check_rollout(output(logprobs=[[1e-6, -0.2, -0.3], [None, float("nan")]], source="mine"), 2, "mine", 10)
    arrays = {
        "completion_ids": [np.array([1, 2, 3]), [np.int64(4), np.int64(5)]],
        "logprobs": [torch.tensor([-0.5, -0.25, -1.0]), (np.float32(-0.5), torch.tensor(-2.0))],
        "env_mask": [np.array([True, False, True]), [True, True]],
    }
    plain = check_rollout(output(**arrays), 2, "mine", 10)
    assert plain["completion_ids"] == [[1, 2, 3], [4, 5]] and plain["logprobs"] == [[-0.5, -0.25, -1.0], [-0.5, -2.0]]
    with pytest.raises(ValueError, match="returned a list of length 2, not a mapping"):
        check_rollout([1, 2], 2, "mine", 10)


def test_the_check_stands_before_training(tmp_path, tokenizer):
    def too_long(prompts, trainer):
        completions = [[5, 6, 7]] * len(prompts)
        return {
            "prompt_ids": [[4]] * len(prompts),
            "completion_ids": completions,
            "logprobs": [[-1.0] * 4] * len(prompts),
        }

    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), rollout_func=too_long, max_steps=1)
    with pytest.raises(
        ValueError, match="rollout_func 'too_long': row 0 has 3 completion tokens and a list of length 4"
    ):
        trainer.train()


# what a model's folder may say about sampling
OF_MODELS = [
    {"top_k": 5, "do_sample": True},
    {"min_p": 0.3, "do_sample": True},
    {"temperature": 0.6, "do_sample": True},
    {"suppress_tokens": [5, 6]},
    {"no_repeat_ngram_size": 1},
    {"repetition_penalty": 1.5},
]


@pytest.mark.parametrize("own", OF_MODELS, ids=lambda own: next(iter(own)))
def test_a_models_own_generation_config_does_not_shape_rollouts(tmp_path, tokenizer, own):
    model = tiny_model(tokenizer)
    model.generation_config = GenerationConfig(**own, eos_token_id=model.config.eos_token_id)
    trainer = sapo_trainer(tmp_path, tokenizer, model, max_steps=4, logging_steps=1)
    trainer.train()  # compares the distributions itself
    with plain_sampling(model):
        assert vars(model.generation_config).get(next(iter(own))) is None
    assert vars(model.generation_config)[next(iter(own))] is not None  # for whoever uses the model afterwards


@pytest.mark.parametrize(
    "biased",
    [{"top_k": 3}, {"typical_p": 0.5}, {"no_repeat_ngram_size": 1}, {"temperature": 0.7}, {"suppress_tokens": [9]}],
    ids=lambda biased: next(iter(biased)),
)
def test_a_bias_is_measured_whatever_its_name(tokenizer, biased):
    model = tiny_model(tokenizer)
    ids = short_row(tokenizer, "1+1=")
    fair = {"do_sample": True, "top_k": 0, "temperature": 1.0, "pad_token_id": tokenizer.pad_token_id}
    state = torch.random.get_rng_state()
    check_sampling(model, GenerationConfig(**fair), ids, 1.0)
    assert torch.equal(torch.random.get_rng_state(), state)
    difference, _ = sampling_difference(model, GenerationConfig(**(fair | biased)), ids, 1.0)
    assert difference > 0.05
    with pytest.raises(ValueError, match="another distribution than the log-probs of the ratio: they differ by"):
        check_sampling(model, GenerationConfig(**(fair | biased)), ids, 1.0)


def test_a_rows_tokens_are_enough_to_compare(tokenizer):
    assert len(short_row(tokenizer, "1")) >= 16
    assert len(short_row(tokenizer, [{"role": "user", "content": [{"type": "image"}]}])) >= 16
