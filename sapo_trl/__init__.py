"""sapo_trl: Soft Adaptive Policy Optimization (arXiv 2511.20347) on TRL."""

from importlib import import_module

__version__ = "0.2.0"

_LAZY = {"SAPOConfig": "sapo_trl.config", "SAPOTrainer": "sapo_trl.trainer"}
__all__ = ["SAPOConfig", "SAPOTrainer", "__version__"]


def __getattr__(name: str):
    """Import on first use: `import sapo_trl` alone does not pay for torch and TRL."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'sapo_trl' has no attribute {name!r}")
