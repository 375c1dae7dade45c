"""Early-Stopping PPO (arXiv 2605.29860): gated rollouts, DeepSpeed updates, live weight sync."""

from importlib.util import find_spec as _find_spec

_missing = [
    name for name in ("deepspeed", "openai", "torch", "transformers") if not _find_spec(name)
]
if _missing:
    raise ImportError(
        f"espo_rl needs {', '.join(_missing)}: pip install 'espo[gpu]' on a GPU machine, or "
        "scripts/setup.sh of the repository for CPU"
    )
