"""The laboratory: rewards by hand, equal runs for equal seeds, a sweep that goes on, an objective of one's own."""

import json
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from sapo_trl.cli.lab import main
from sapo_trl.lab import sweep as lab_sweep
from sapo_trl.lab.figure import lab_figure, lab_table
from sapo_trl.lab.judge import QUESTIONS, WORLDS, Question, compare, judge, line, per_seed
from sapo_trl.lab.run import Regime, Result, Trainer, find_method
from sapo_trl.lab.sweep import QUICK, Table, find_methods, full_regimes
from sapo_trl.lab.world import TASKS, World, make_world
from sapo_trl.objective import LossInputs, Objective

SHORT = Regime(4, 3e-3, rollouts=2)


@dataclass(frozen=True)
class Forwards(Objective):
    """A log pi."""

    def surrogate(self, tokens: LossInputs) -> torch.Tensor:
        return tokens.advantages * tokens.policy_logps


@dataclass(frozen=True)
class Backwards(Objective):
    """-A log pi, which unlearns."""

    def surrogate(self, tokens: LossInputs) -> torch.Tensor:
        return -tokens.advantages * tokens.policy_logps


def test_rewards_by_hand():
    right = torch.zeros(1, 64, 8, 20, dtype=torch.bool)
    right[0, 3, :, 5] = right[0, 3, :, 6] = True  # prompt 3: fives and sixes
    world = World(right, make_world("recall", 8, 0, 2).policies)
    answers = torch.tensor([[[9, 9, *[5] * 8], [9, 9, *[6, 5] * 4], [5, 5, *[5] * 7, 4], [5] * 10]])
    assert world.rewards(torch.tensor([[3, 3, 3, 2]]), answers).tolist() == [[1.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize(("task", "counts"), [("recall", 1), ("avoid", 16)])
def test_right_tokens(task, counts):
    right = TASKS[task].right_tokens(3, torch.Generator().manual_seed(0))
    assert right.shape == (3, 64, 8, 20) and (right.sum(-1) == counts).all()
    different = len({tuple(x.flatten().tolist()) for x in right[0]})
    assert different == TASKS[task].tables and not torch.equal(right[0], right[1])


def test_a_cold_started_policy_is_right_sometimes_and_its_log_probs_are_those_it_samples_with():
    world = make_world("recall", 8, 0, 2)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(64, (2, 400), generator=generator)
    answers = world.policies.sample(prompts, generator)
    assert 0.2 < world.rewards(prompts, answers).mean() < 0.6
    logps = world.policies.logps(prompts, answers).detach()
    # a draw's mean log-prob is minus the entropy of what it was drawn from
    probabilities = world.policies.logits(prompts, torch.zeros_like(prompts), torch.full_like(prompts, 20)).softmax(-1)
    entropy = torch.special.entr(probabilities).sum(-1).mean()
    assert -logps[:, :, 0].mean().item() == pytest.approx(entropy.item(), abs=0.08)


def test_a_run_is_repeated_bit_for_bit_and_learns():
    sapo = find_method("sapo")
    first, second = (Trainer(sapo, replace(SHORT, rollouts=8), seeds=2).run() for _ in range(2))
    assert (first.rewards, first.drift, first.curve) == (second.rewards, second.drift, second.curve)
    assert first.curve[-1] > first.curve[0] + 0.05
    assert Trainer(find_method("sapo"), replace(SHORT, world=1), seeds=2).run().curve != first.curve[:2]


def test_seeds_do_not_know_of_each_other():
    """The gradient of a seed is that of its own rows: set another seed's advantages to 0 and it stays."""
    trainer = Trainer(find_method("sapo-adaptive"), SHORT, seeds=2)
    rollout = trainer.rollout()
    chosen = torch.arange(8).expand(2, 8)

    def gradients(scale: torch.Tensor) -> list[torch.Tensor]:
        tokens = trainer.tokens(rollout, chosen)
        seed = tokens.rows // 8
        tokens = replace(tokens, advantages=tokens.advantages * scale[seed], old_logps=tokens.old_logps - 0.1)
        loss = trainer.method.objective.surrogate(tokens).sum()
        return list(torch.autograd.grad(loss, trainer.policies.parameters))

    both, alone = gradients(torch.tensor([1.0, 1.0])), gradients(torch.tensor([1.0, 0.0]))
    for x, y in zip(both, alone, strict=True):
        torch.testing.assert_close(x[0], y[0], rtol=1e-6, atol=1e-8)
    assert any(y[1].abs().max() == 0 and x[1].abs().max() > 0 for x, y in zip(both, alone, strict=True))


def test_staleness_and_noise_reach_the_objective():
    drift = {}
    for name, regime in {
        "none": SHORT,
        "ahead": replace(SHORT, rollouts_ahead=1, rollouts=3),
        "noise": replace(SHORT, engine_noise=0.5),
    }.items():
        drift[name] = max(Trainer(find_method("sapo"), regime, seeds=2).run().drift)
    assert drift["ahead"] > 1.5 * drift["none"] and drift["noise"] > 0.1  # 0.5^2 / 2 = 0.125


def test_options_and_names():
    method = find_method("dppo-tv dppo_divergence=kl dppo_threshold=1")
    assert (method.objective.dppo_threshold, method.objective.dppo_divergence) == (1.0, "kl")
    assert find_method("gspo").level == "sequence" and find_method("gspo").objective.epsilon == 3e-4
    with pytest.raises(ValueError, match="'tau=5' is no option of sapo; it has sapo_temperature_pos"):
        find_method("sapo tau=5")
    with pytest.raises(
        ValueError, match="'sapo_temperature_neg=x' of sapo needs a number, as in sapo_temperature_neg=1.05"
    ):
        find_method("sapo sapo_temperature_neg=x")
    with pytest.raises(ValueError, match="unknown; known"):
        find_methods(["sap"])
    with pytest.raises(ValueError, match="mini_batches=3 does not divide the rollout of 256"):
        Regime(3, 1e-3)
    names = [regime.name for regime in (*QUICK, *full_regimes())]
    assert "N=32 lr=5e-3" in names and "N=32 lr=5e-3 task=avoid length=64" in names
    assert len(set(names[8:])) == len(names) - 8


def test_collapsed_seeds_are_counted():
    result = Result("m", "r", 0.4, [0.1, 0.3, 0.5], [0.5, 0.5, 0.5], [0.2, 0.1, 0.4], 0.05, [], 1.0)
    assert result.collapsed == 1
    assert result.summary() == {"median": 0.3, "min": 0.1, "max": 0.5, "collapsed": 1, "drift": 0.2, "leak": 0.05}


def test_the_command_with_an_objective_of_ones_own_resumes(tmp_path, monkeypatch, capsys):
    module = types.ModuleType("my_losses")
    module.Forwards, module.Backwards = Forwards, Backwards
    monkeypatch.setitem(sys.modules, "my_losses", module)
    regimes = (replace(SHORT, rollouts=6), replace(SHORT, rollouts=6, task="avoid"))
    monkeypatch.setattr("sapo_trl.cli.lab.QUICK", regimes)
    monkeypatch.setattr(lab_sweep, "Trainer", lambda method, regime: Trainer(method, regime, seeds=2))
    mine = ["my_losses.Forwards", "my_losses.Backwards"]
    command = ["--quick", "--methods", "sapo", "--objective", *mine, "--output_dir", str(tmp_path)]
    assert main(command) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(summary) == ["N=4 lr=3e-3", "N=4 lr=3e-3 task=avoid"]
    recall = summary["N=4 lr=3e-3"]
    assert recall[mine[0]]["median"] > recall[mine[1]]["median"] + 0.2 and recall[mine[1]]["collapsed"] >= 1
    assert (tmp_path / "lab-figure.png").stat().st_size > 10_000
    rows = (tmp_path / "lab.csv").read_text().splitlines()
    (tmp_path / "lab.csv").write_text("\n".join([*rows[:-1], rows[-1][:40]]))  # a torn last row is run again

    def only_the_last(method, regime):
        assert (method.name, regime) == (mine[1], regimes[1])
        return Trainer(method, regime, seeds=2)

    monkeypatch.setattr(lab_sweep, "Trainer", only_the_last)
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == summary
    assert [row.split(",")[:9] for row in (tmp_path / "lab.csv").read_text().splitlines()] == [
        row.split(",")[:9] for row in rows
    ]


def test_an_edited_objective_is_run_again(tmp_path, monkeypatch, capsys):
    code = Path(__file__).read_text().split("@dataclass(frozen=True)\n")[1]
    head = "import torch\nfrom dataclasses import dataclass\nfrom sapo_trl.objective import LossInputs, Objective\n"
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "edited_losses.py").write_text(f"{head}@dataclass(frozen=True)\n{code}")
    table, made = Table(tmp_path / "lab.csv"), []
    monkeypatch.setattr(lab_sweep, "Trainer", lambda method, regime: made.append(method) or Trainer(method, regime, 2))
    for expected in (1, 1, 2):
        if expected == 2:
            (tmp_path / "edited_losses.py").write_text(f"{head}SCALE = 2\n@dataclass(frozen=True)\n{code}")
        lab_sweep.sweep([SHORT], [find_method("edited_losses.Forwards")], table)
        table = Table(tmp_path / "lab.csv")
        assert len(made) == expected and len(table.rows) == 1
    assert "its source has changed" in capsys.readouterr().out and find_method("sapo").source == ""
    monkeypatch.delitem(sys.modules, "edited_losses")


@dataclass(frozen=True)
class Explodes(Objective):
    """NaN."""

    def surrogate(self, tokens: LossInputs) -> torch.Tensor:
        return tokens.policy_logps * float("nan")


@dataclass(frozen=True)
class Mean(Objective):
    """One number in place of one per token."""

    def surrogate(self, tokens: LossInputs) -> torch.Tensor:
        return (tokens.advantages * tokens.policy_logps).mean()


def test_an_objective_whose_numbers_cannot_be_is_one_line(monkeypatch, capsys):
    module = types.ModuleType("my_losses")
    module.Explodes, module.Mean = Explodes, Mean
    monkeypatch.setitem(sys.modules, "my_losses", module)
    monkeypatch.setattr("sapo_trl.cli.lab.QUICK", (SHORT,))
    monkeypatch.setattr(lab_sweep, "Trainer", lambda method, regime: Trainer(method, regime, seeds=2))
    for name, message in (
        ("Explodes", "error: my_losses.Explodes in N=4 lr=3e-3: the policy is not finite any more"),
        ("Mean", "error: surrogate of Mean must return J per token, shape (T,) = (1024,); got ()"),
    ):
        assert main(["--quick", "--methods", f"my_losses.{name}"]) == 1
        assert message in capsys.readouterr().err


def test_a_wrong_method_is_one_line(capsys):
    assert main(["--quick", "--methods", "sapoo"]) == 1
    assert "Did you mean 'sapo'" in capsys.readouterr().err


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "rows").write_text("")
    with pytest.raises(SystemExit):
        main(["--quick", "--output_dir", str(tmp_path / "rows")])
    assert "rows is a file: name a folder" in capsys.readouterr().err


def test_a_regime_stands_at_the_drift_of_sapo(tmp_path):
    table = Table(None)
    for method, drift in (("sapo", [0.5]), ("grpo", [0.1])):
        settings = {"task": "recall"}
        table.add(Result(method, "N=4 lr=3e-3", 0.4, [0.5], [0.5], drift, 0.0, [0.5], 1.0, settings))
    rows = lab_table(table)
    assert rows["regime_drift"].tolist() == [0.5, 0.5] and rows["drift"].tolist() == [0.1, 0.5]
    assert len(lab_figure(rows, ("sapo", "grpo")).axes) == 1


def row(regime: str, method: str, rewards: list[float], collapsed: int = 0) -> dict[str, str]:
    return {"regime": regime, "method": method, "rewards": json.dumps(rewards), "collapsed": str(collapsed)}


def test_differences_are_paired_over_the_seeds_of_a_world():
    """Seeds differ by 0.6, the methods by 0.1, 0.1, 0.1 and 0.3: the mean is 0.15, and the interval excludes 0."""
    table, regimes = Table(None), ["N=4 lr=3e-3 world=1", "N=8 lr=3e-3 world=1", "N=4 lr=3e-3 world=2"]
    mine, theirs = [[0.9, 0.3], [0.7, 0.3], [0.8, 0.5]], [[0.8, 0.2], [0.6, 0.2], [0.7, 0.2]]
    for name, a, b in zip(regimes, mine, theirs, strict=True):
        table.rows |= {(name, "a"): row(name, "a", a), (name, "b"): row(name, "b", b, 1)}
    assert per_seed([table.rows[name, "a"] for name in regimes]) == pytest.approx([0.8, 0.3, 0.8, 0.5])
    found = compare(table, regimes, "a", "b")
    assert found["difference"].mean == pytest.approx(0.15) and found["difference"].num_problems == 4
    assert found["difference"].low > 0 and found["collapsed"] == [0, 3] and found["rival"] == "b"
    entry = {"question": "q", "task": "recall", **found}
    assert "above" in line(entry) and "collapsed 0 against 3" in line(entry)
    turned = compare(table, regimes, "b", "a")
    assert "below" in line({"question": "q", "task": "recall", **turned})


def test_a_method_is_judged_on_worlds_that_no_choice_was_made_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lab_sweep, "Trainer", lambda method, regime: Trainer(method, regime, seeds=2))
    monkeypatch.setattr("sapo_trl.lab.judge.WORLDS", (1, 2))
    questions = (Question("q", ("sapo",), (replace(SHORT, rollouts=6),)),)
    monkeypatch.setattr("sapo_trl.cli.lab.judge", lambda method, table: judge(method, table, questions))
    module = types.ModuleType("my_losses")
    module.Backwards = Backwards
    monkeypatch.setitem(sys.modules, "my_losses", module)
    assert main(["--judge", "my_losses.Backwards", "--output_dir", str(tmp_path)]) == 0
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.startswith("q") and "recall  against sapo   -0." in verdict and "below" in verdict
    table = Table(tmp_path / "judge.csv")
    assert {regime for regime, _ in table.rows} == {"N=4 lr=3e-3 world=1", "N=4 lr=3e-3 world=2"}
    assert all(0 not in (question.worlds or WORLDS) for question in QUESTIONS)
    assert all(regime.world == 0 for question in QUESTIONS for regime in question.regimes)
