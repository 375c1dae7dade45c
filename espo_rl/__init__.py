"""Early-Stopping PPO (arXiv 2605.29860): gated rollouts, DeepSpeed updates, live weight sync."""

from importlib.util import find_spec as _find_spec

_missing = [
    name for name in ("deepspeed", "openai", "torch", "transformers") if not _find_spec(name)
]
if _missing:
    raise ImportError(
        f"espo_rl needs {', '.join(_missing)}; in the repository: pip install '.[gpu]' on a GPU "
        "machine, or scripts/setup.sh for CPU"
    )
