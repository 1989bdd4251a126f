"""An algorithm from outside the package: a row of the table, a dotted path, a class, an instance or a function."""

import sys
import types
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from conftest import one_update, padded_rollout, sapo_config, sapo_trainer, tiny_model

from sapo_trl.algorithms import ALGORITHMS, Algorithm
from sapo_trl.objective import LossInputs, Objective


@dataclass(frozen=True)
class PolicyGradient(Objective):
    """scale * A * log pi, never clipped and whatever the ratio: its effective weight is `scale`."""

    zero_without_advantage: ClassVar[bool] = True
    scale: float = 1.0

    def __post_init__(self):
        if self.scale <= 0:
            raise ValueError(f"scale={self.scale} must be > 0.")

    def surrogate(self, tokens: LossInputs) -> torch.Tensor:
        return self.scale * tokens.advantages * tokens.policy_logps


ROW = Algorithm(PolicyGradient, "sequence-mean", title="Plain policy gradient", paper="1234.56789")


@pytest.fixture
def table(monkeypatch):
    for name, row in (ALGORITHMS | {"pg": ROW}).items():
        monkeypatch.setitem(ALGORITHMS, name, row)


def metrics_of(trainer):
    _, _, values = one_update(trainer, padded_rollout(trainer.model))
    return values


def right(values, scale):
    """Off-policy by 0.3, and yet the weight of every token is known by hand: scale / r."""
    assert values["log_ratio/abs_mean"] > 0.1
    assert values["gate/pull_mean"] == pytest.approx(scale, rel=1e-5)
    for group in ("pos", "neg", "corrective", "expansive"):
        assert values[f"gate/pull_{group}_mean"] == pytest.approx(scale, rel=1e-5)
    assert values["clip_ratio/region_mean"] == values["clip_ratio/low_mean"] == 0
    assert values["effective_update_ratio"] != pytest.approx(scale, rel=1e-3)  # w = w r / r


def test_a_row_of_the_table(tmp_path, tokenizer, table, capsys):
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), algorithm="pg", objective_kwargs={"scale": 2.0})
    right(metrics_of(trainer), 2.0)
    assert trainer._plan.skips_zero_advantage and "PG: pg" in capsys.readouterr().out
    trainer.create_model_card(model_name="x")
    assert "Plain policy gradient" in (tmp_path / "README.md").read_text()


def test_a_row_validates_its_own_options(tmp_path, table):
    with pytest.raises(ValueError, match="scale=-1 must be > 0"):
        sapo_config(tmp_path, algorithm="pg", objective_kwargs={"scale": -1})
    with pytest.raises(ValueError, match="'scal' in objective_kwargs is no option of PolicyGradient; it has scale"):
        sapo_config(tmp_path, algorithm="pg", objective_kwargs='{"scal": 2}')
    with pytest.raises(ValueError, match="epsilon=0.3 has no effect with algorithm='pg'"):
        sapo_config(tmp_path, algorithm="pg", epsilon=0.3)
    with pytest.raises(ValueError, match="objective_kwargs holds 'beta', which is a field of the config"):
        sapo_config(tmp_path, algorithm="pg", objective_kwargs={"beta": 2})


def test_a_dotted_path(tmp_path, tokenizer, monkeypatch):
    module = types.ModuleType("my_project")
    module.MINE, module.OTHER, module.PolicyGradient = ROW, 3, PolicyGradient
    monkeypatch.setitem(sys.modules, "my_project", module)
    right(metrics_of(sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), algorithm="my_project.MINE")), 1.0)
    config = sapo_config(tmp_path, algorithm="my_project.PolicyGradient", objective_kwargs={"scale": 3.0})
    assert config.build_objective() == PolicyGradient(3.0)
    for path, message in (
        ("my_project.OTHER", "is int, not an Algorithm or an Objective"),
        ("my_project.MINY", "module my_project has no MINY. Did you mean 'MINE'"),
        ("my_project:MINE", "is no dotted path. Write my_project.MINE"),
        ("no_such_module.X", "cannot be loaded: No module named 'no_such_module'"),
    ):
        with pytest.raises(ValueError, match=message):
            sapo_config(tmp_path, algorithm=path)


@pytest.mark.parametrize("objective", [PolicyGradient, PolicyGradient(), lambda t, c: t.advantages * t.policy_logps])
def test_a_class_an_instance_and_a_function(tmp_path, tokenizer, objective):
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), objective=objective)
    right(metrics_of(trainer), 1.0)


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        (
            "surrogate",
            lambda j: j.mean(),
            r"surrogate of Broken must return J per token, shape \(T,\) = \(\d+,\); got \(\)",
        ),
        ("surrogate", lambda j: 0.5, "got float"),
        (
            "surrogate",
            lambda j: j.detach(),
            "does not depend on tokens.policy_logps, or detaches it",
        ),
        ("weight", lambda j: j[:1].detach(), r"weight of Broken must return w r per token, .*; got \(1,\)"),
    ],
)
def test_values_that_are_not_one_per_token_are_refused(tmp_path, tokenizer, method, values, message):
    class Broken(PolicyGradient):
        pass

    setattr(Broken, method, lambda self, tokens: values(PolicyGradient.surrogate(self, tokens)))
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), objective=Broken)
    with pytest.raises(ValueError, match=message):
        metrics_of(trainer)


def test_an_objective_may_find_nothing_in_a_pack(tmp_path, tokenizer):
    class Winning(PolicyGradient):
        def surrogate(self, tokens):
            nothing = torch.zeros_like(tokens.policy_logps)
            return nothing if (tokens.advantages <= 0).all() else super().surrogate(tokens)

    fields = {"max_tokens_per_pack": 20, "share_prompts": False, "max_steps": 1}
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), objective=Winning, **fields)
    trainer.train()
    assert trainer.state.global_step == 1


def test_training_with_a_row_from_outside(tmp_path, tokenizer, table):
    """On-policy its weight is 1; one update later its pull is still 1, and its guard finds every signal it judges."""
    fields = {"algorithm": "pg", "max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2, "num_mini_batches": 2}
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), **fields)
    trainer.train()
    log = [record for record in trainer.state.log_history if "loss" in record]
    assert [record["gate/pull_mean"] for record in log] == pytest.approx([1.0] * 4, rel=1e-5)
    assert log[1]["log_ratio/abs_mean"] > 1e-4
