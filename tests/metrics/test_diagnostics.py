"""Every metric of an update against numpy in float64 on a stored, off-policy rollout, row by row and token by token."""

import numpy as np
import pytest
import torch
from conftest import padded_rollout, plain_logps, sapo_config, sapo_trainer, tiny_model

from sapo_trl.algorithms import ALGORITHMS
from sapo_trl.metrics import histograms
from sapo_trl.metrics.histograms import EDGES, NUM_BINS, bin_middle, compact, counts_by_class, quantiles
from sapo_trl.report.ratios import bound_table, load_dump
from sapo_trl.rollout.rows import rows_from_padded

DRIFT = 0.4


def measured(tmp_path, tokenizer, name, index=1, **fields):
    """(metrics of the update, the same rollout as float64 columns)."""
    of_engine = {field: fields.pop(field) for field in [*fields] if "vllm" in field}
    if of_engine:  # no engine here: only the loss reads what follows from these
        given = vars(sapo_config(tmp_path, **of_engine).for_trl())
        of_engine = {field: value for field, value in given.items() if "vllm" in field}
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), algorithm=name, max_tokens_per_pack=40, **fields)
    vars(trainer.args).update(of_engine)
    batch = padded_rollout(trainer.model, tool_mask=True, drift=DRIFT)
    trainer.model.train()
    rows, tokens = rows_from_padded(batch), float(batch["num_items_in_batch"])
    (mini_batch,) = trainer._forward.plan_mini_batches([rows], trainer._plan.active([rows]), tokens)
    mini_batch.index = index
    with trainer._forward.packed(trainer.model):
        result, values = trainer.run_mini_batch(trainer.model, mini_batch, backward=True)
    reported = float(result.loss - result.at_old_policy)
    return values, columns(tiny_model(tokenizer), batch, name, fields), reported, trainer


def columns(model, batch, name, fields) -> dict[str, np.ndarray]:
    """z, A, row, entropy, ratio at the algorithm's level, gate weight and effective weight w r of every
    trained token of the active rows."""
    logps = plain_logps(model, batch, 1.0).double().numpy()
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool().numpy()
    advantages = batch["advantages"].double().numpy()
    active = [i for i in range(8) if advantages[i] != 0]
    z = [(logps[i] - batch["old_per_token_logps"][i].double().numpy())[mask[i]] for i in active]
    lengths = [len(x) for x in z]
    sequence = ALGORITHMS[name].level == "sequence"
    level = [np.full(len(x), x.mean()) if sequence else x for x in z]
    ratio = np.exp(np.concatenate(level))
    a = np.repeat(advantages[active], lengths)
    engine = [batch["sampling_per_token_logps"][i].double().numpy()[mask[i]] for i in active]
    old = [batch["old_per_token_logps"][i].double().numpy()[mask[i]] for i in active]
    effective = effective_by_hand(name, ratio, a, z, fields)
    flat = np.concatenate(z)
    gap = np.concatenate(old) - np.concatenate(engine)
    found = {"z": flat, "rows": z, "a": a, "advantages": advantages[active]}
    return found | {"ratio": ratio, "effective": effective, "gap": gap}


def effective_by_hand(name, r, a, z, fields):
    """d J / d log pi over A, from the papers' formulas."""
    if name == "sapo":
        tau = np.where(a > 0, 1.0, 1.05)
        sigma = 1 / (1 + np.exp(-tau * (r - 1)))
        return 4 * sigma * (1 - sigma) * r
    if name == "topr":
        taper = np.concatenate([np.full(len(x), np.exp(min(x.sum(), 0))) for x in z])
        return np.where(a > 0, 1.0, taper)
    if name == "cispo":
        return np.minimum(r, 5.0)
    if name == "vespo":
        w = np.concatenate([np.full(len(x), np.exp(x.sum())) for x in z])
        k, lam = np.where(a >= 0, 2.0, 3.0), np.where(a >= 0, 3.0, 2.0)
        return w**k * np.exp(lam * (1 - w))
    low, high = {"gspo": (3e-4, 4e-4), "grpo": (0.2, 0.27)}[name]
    upper = r > fields["delta"] if "delta" in fields else np.zeros(len(r), bool)
    return np.where(((a > 0) & (r > 1 + high)) | ((a < 0) & (r < 1 - low)) | upper, 0.0, r)


NAMES = [("sapo", {}), ("gspo", {}), ("grpo", {}), ("grpo", {"delta": 1.3}), ("cispo", {}), ("vespo", {}), ("topr", {})]


@pytest.mark.parametrize(("name", "fields"), NAMES)
def test_gate_and_ratio(tmp_path, tokenizer, name, fields):
    values, true, _, _ = measured(tmp_path, tokenizer, name, **fields)
    z, r, a, effective = true["z"], true["ratio"], true["a"], true["effective"]
    weight, side = effective / r, np.sign(a) * np.sign(r - 1)
    assert np.std(r) > 0.01 and len(z) == values["update/trained_tokens"]
    token_r, pulls = np.exp(z), np.abs(a) * effective
    expected = {
        "log_ratio/drift": (z**2).mean() / 2,
        "gate/leak_neg": pulls[(a < 0) & (token_r < 0.8)].sum() / pulls.sum(),
        "log_ratio/abs_pos_expansive_mean": np.abs(z)[(a > 0) & (r > 1)].mean(),
        "log_ratio/abs_pos_corrective_mean": np.abs(z)[(a > 0) & (r < 1)].mean(),
        "log_ratio/abs_neg_expansive_mean": np.abs(z)[(a < 0) & (r < 1)].mean(),
        "log_ratio/abs_neg_corrective_mean": np.abs(z)[(a < 0) & (r > 1)].mean(),
        "ratio/mean": r.mean(),
        "ratio/max": r.max(),
        "log_ratio/abs_mean": np.abs(z).mean(),
        "log_ratio/clamped_frac": 0.0,
        "effective_update_ratio": np.minimum(weight, 1).mean(),
        "gate/pull_mean": effective.mean(),
        "gate/expansive_frac": (side > 0).mean(),
    }
    groups = {"pos": a > 0, "neg": a < 0, "corrective": side < 0, "expansive": side > 0}
    for group, inside in groups.items():
        assert inside.any()
        expected[f"gate/weight_{group}_mean"] = weight[inside].mean()
        expected[f"gate/pull_{group}_mean"] = effective[inside].mean()
    if name in ("gspo", "grpo"):
        expected["clip_ratio/region_mean"] = (effective == 0).mean()
        assert values["effective_update_ratio"] == pytest.approx(1 - values["clip_ratio/region_mean"])
    if name == "topr":  # weight 1, which is 1/r of the plain gradient's on fallen tokens, is no share above all of it
        assert weight[(a > 0) & (r < 1)].mean() > 1.1 and values["effective_update_ratio"] < 1
    for key, value in expected.items():
        assert values[key] == pytest.approx(value, rel=2e-4, abs=2e-6), key
        assert values[f"mini_batch_1/{key}"] == values[key]
    for level in (0.1, 1, 10, 50, 90, 99, 99.9):  # the value that at least this share lies at or below
        exact = np.log(np.quantile(r, level / 100, method="inverted_cdf"))
        assert np.log(values[f"ratio/p{level:g}"]) == pytest.approx(exact, rel=0.03, abs=2e-6)
    for group, inside in groups.items():
        lost = np.quantile(1 - weight[inside], 0.9, method="inverted_cdf")
        assert 1 - values[f"gate/weight_{group}_p10"] == pytest.approx(lost, rel=0.03, abs=2e-6)
        gained = np.quantile(effective[inside] - 1, 0.99, method="inverted_cdf")
        assert values[f"gate/pull_{group}_p99"] - 1 == pytest.approx(gained, rel=0.03, abs=2e-6)


@pytest.mark.parametrize("name", ["sapo", "gspo"])
def test_sequence_bound_rollout_engine_and_counts(tmp_path, tokenizer, name):
    values, true, _, _ = measured(tmp_path, tokenizer, name)
    gate = lambda x, tau: np.cosh(tau * x / 2) ** -2.0  # noqa: E731
    taus = np.where(true["advantages"] > 0, 1.0, 1.05)
    variance = np.array([x.var() for x in true["rows"]])
    gaps = np.array([abs(gate(x, t).mean() - gate(x.mean(), t)) for x, t in zip(true["rows"], taus, strict=True)])
    assert values["sequence/log_ratio_var"] == pytest.approx(variance.mean(), rel=1e-4)
    assert values["sequence/gate_gap"] == pytest.approx(gaps.mean(), rel=1e-3, abs=1e-7)
    assert values["sequence/within_bound_frac"] == pytest.approx((gaps <= taus**2 / 4 * variance + 1e-9).mean())
    gap = true["gap"]
    assert values["sampling/kl"] == pytest.approx((np.expm1(gap) - gap).mean(), rel=1e-4)
    assert values["sampling/log_ratio_abs_mean"] == pytest.approx(np.abs(gap).mean(), rel=1e-4)
    assert not any(name.startswith("sampling/removed") for name in values)  # no correction without use_vllm
    skipped = 5  # trained tokens of the one row with A = 0: 7 tokens, every fourth from the third on a tool's
    assert values["update/skipped_tokens"] == skipped and values["update/skipped_rows_frac"] == 1 / 8


@pytest.mark.parametrize("name", ["sapo", "grpo", "cispo"])
def test_reported_loss_is_zero_on_policy_and_moves_with_the_ratio(tmp_path, tokenizer, name):
    """-sum of weights x (J(r) - J(1)), with J from the papers; weights 1/(|o_i| N), N counting the row with A = 0."""
    _, true, reported, trainer = measured(tmp_path, tokenizer, name)
    r, a = true["ratio"], true["a"]
    weights = np.concatenate([np.full(len(x), 1 / (len(x) * 8)) for x in true["rows"]])
    if name == "sapo":
        tau = np.where(a > 0, 1.0, 1.05)
        gain = 4 / tau * (1 / (1 + np.exp(-tau * (r - 1))) - 0.5) * a
    elif name == "grpo":
        gain = np.minimum(r * a, r.clip(0.8, 1.27) * a) - a
    if name != "cispo":  # CISPO's J holds log pi itself
        assert reported == pytest.approx(-(weights * gain).sum(), rel=1e-4, abs=1e-7)
    batch = padded_rollout(trainer.model, tool_mask=True)
    del batch["old_per_token_logps"]
    rows = rows_from_padded(batch)
    (mini_batch,) = trainer._forward.plan_mini_batches([rows], [rows], 100.0)
    with trainer._forward.packed(trainer.model):
        result, values = trainer.run_mini_batch(trainer.model, mini_batch, backward=True)
    assert float(result.loss - result.at_old_policy) == 0 and float(result.loss) != 0
    assert values["gate/weight_pos_mean"] == values["gate/weight_neg_mean"] == 1
    assert values["gate/expansive_frac"] == 0 and "gate/weight_expansive_mean" not in values


def test_dump_is_what_was_trained_on(tmp_path, tokenizer):
    values, true, _, trainer = measured(tmp_path, tokenizer, "sapo", dump_ratios_every=1)
    dump = load_dump(tmp_path)
    assert sorted(dump.log_ratio.tolist()) == pytest.approx(sorted(true["z"].tolist()), abs=2e-6)
    table = bound_table(dump)
    assert len(table) == 7 and table["tokens"].sum() == len(true["z"])
    assert table["variance"].mean() == pytest.approx(values["sequence/log_ratio_var"], rel=1e-4)
    assert set(trainer.histograms()) == {"log_ratio", "gate_weight"}
    counts, edges = trainer.histograms()["log_ratio"]
    assert counts.sum() == len(true["z"]) and edges[0] <= true["z"].min() and true["z"].max() <= edges[-1]
    measured(tmp_path / "on-policy", tokenizer, "sapo", index=0, dump_ratios_every=1)
    assert not (tmp_path / "on-policy" / "dump").exists()


def test_histograms_hold_every_value_and_their_quantiles():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5000, generator=g) * 10 ** (4 * torch.rand(5000, generator=g) - 5)
    x[:40], x[40], x[41] = 0.0, 1e9, -1e9
    classes = torch.arange(5000) % 3
    counts = counts_by_class(x, classes, 2)
    assert counts.sum(1).tolist() == [(classes == c).sum() for c in (0, 1)]  # class 2 is not counted
    levels = (0.001, 0.05, 0.5, 0.95, 0.999)
    every = counts_by_class(x, torch.zeros_like(classes), 1)[0]
    exact = np.quantile(x.double().numpy(), levels, method="inverted_cdf")
    assert quantiles(every, levels) == pytest.approx(exact, rel=0.026, abs=1.1e-6)
    assert bin_middle(int(torch.bucketize(torch.tensor(0.0), EDGES))) == 0.0 and len(EDGES) == NUM_BINS - 1
    assert all(np.isnan(quantiles(torch.zeros(NUM_BINS), levels)))
    assert quantiles(every, (0.0, 1.0)) == pytest.approx([-histograms.LARGEST, histograms.LARGEST])
    small, edges = compact(every, max_bins=30)
    assert len(small) <= 30 and len(edges) == len(small) + 1 and small.sum() == 5000 and (np.diff(edges) > 0).all()


@pytest.mark.parametrize("mode", ["icepop", "geometric_mask"])
def test_what_a_mask_for_the_rollout_engine_removes(tmp_path, tokenizer, mode):
    """Shares of tokens, of sequences and of |A|, counted by hand; the range splits rows and tokens."""
    own = {"vllm_importance_sampling_clip_min": 0.9, "vllm_importance_sampling_clip_max": 1.2}
    values, true, *_ = measured(tmp_path, tokenizer, "sapo", use_vllm=True, vllm_importance_sampling_mode=mode, **own)
    lengths = [len(x) for x in true["rows"]]
    gaps = np.split(true["gap"], np.cumsum(lengths)[:-1])
    level = gaps if mode == "icepop" else [np.full(len(x), x.mean()) for x in gaps]
    kept = [(np.exp(x) >= 0.9) & (np.exp(x) <= 1.2) for x in level]
    removed, sizes = ~np.concatenate(kept), np.abs(true["a"])
    expected = {
        "removed_tokens_frac": removed.mean(),
        "removed_sequences_frac": np.mean([not x.any() for x in kept]),
        "removed_advantage_frac": sizes[removed].sum() / sizes.sum(),
        "lost_frac": removed.mean(),
    }
    assert 0 < removed.mean() < 1 and 0 < expected["removed_sequences_frac"] < 1
    ratio = np.exp(true["gap"]) if mode == "icepop" else np.ones(len(removed))
    expected["importance_sampling_ratio/mean"] = (ratio * ~removed).mean()
    for name, value in expected.items():
        assert values[f"sampling/{name}"] == pytest.approx(value, rel=1e-5), name
