"""Names of what an update sums."""

GROUP_NAMES = ("pos", "neg", "corrective", "expansive")
MEANS = (
    "entropy", "ratio/mean", "log_ratio/abs_mean", "log_ratio/clamped_frac", "sequence/log_ratio_var",
    "sequence/gate_gap", "sequence/within_bound_frac", "sampling/kl", "sampling/log_ratio_abs_mean",
    "update/skipped_rows_frac", "update/skipped_tokens", "update/forwarded_tokens", "update/shared_tokens",
    "update/trained_tokens", "update/packs", "update/oom_retries",
    "effective_update_ratio", "gate/pull_mean", "gate/expansive_frac",
    *(f"gate/{kind}_{name}_mean" for kind in ("weight", "pull") for name in GROUP_NAMES),
    "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean",
    "sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/mean", "sampling/lost_frac",
    "kl", "aux_loss", "entropy_bonus",
)  # fmt: skip
MAXIMA = ("ratio/max",)
