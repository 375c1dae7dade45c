"""The numbers of a step: what each name means, and those that follow from the rollouts alone.

    python -m espo_rl.record.metrics       prints the names as a Markdown table

Names are `group/name`; TensorBoard and Weights & Biases show a group as one section.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from espo_gateway.stop.rules import RULES, Gate
from espo_rl.gate.outcomes import weights, with_outcome
from espo_rl.record.totals import Totals
from espo_rl.types import EndReason, Rollout

Metric = float | str | bool | None

#: every name a run logs, and what it says; `*` stands for any word
METRICS = {
    "rollout/reward": "mean reward; a stopped rollout's is that of a failure",
    "rollout/accuracy": "share of right answers, had none been stopped: audited rollouts stand for "
    "the stopped ones",
    "rollout/completed_share": "share that ended by themselves",
    "rollout/truncated_share": "share cut off by rollout.max_tokens",
    "rollout/stop_share": "share that the stop rule stopped",
    "rollout/length": "mean tokens of the training samples",
    "rollout/length_max": "tokens of the longest training sample",
    "rollout/believed_errors": "share of wrong answers without a doubtful token: none of their "
    "tokens was over e times less likely than the best",
    "rollout/length_without_stopping": "estimate, from the audits: the same had none been stopped",
    "rollout/length_completed": "mean tokens of those that ended by themselves",
    "rollout/length_truncated": "mean tokens of those cut off by rollout.max_tokens",
    "rollout/length_stopped": "mean tokens up to the stop",
    "rollout/tokens": "tokens the servers sampled",
    "rollout/tokens_without_stopping": "estimate, from the audits: tokens of the same rollouts in "
    "full",
    "rollout/tokens_total": "tokens sampled since the run's start",
    "rollout/tokens_total_without_stopping": "estimate, from all audits so far: the same in full",
    "rollout/tokens_saved_share": "estimate: share of those that was not sampled",
    "rollout/questions": "to answer probes, along the rollouts",
    "rollout/overshoot": "tokens sampled between a decision and its abort",
    "rollout/audited": "stopped rollouts generated to their end all the same",
    "rollout/audited_correct": "of these, right in the end: false positives",
    "rollout/false_positive_rate": "the audited batch's share of false positives",
    "rollout/right": "right rollouts, an audited one standing for all that were stopped",
    "rollout/right_lost": "of these, the share that was stopped",
    "rollout/errors": "rollouts without a usable answer; the step trains without them",
    "rollout/grader_timeouts": "rollouts counted as wrong because grading took more than "
    "task.grader_timeout, or a built-in grader failed over them",
    "rollout/resampled": "rollouts asked for again because they had failed",
    "rollout/dropped": "rollouts of prompts that dynamic sampling dropped",
    "rollout/weights_version": "weights that most rollouts were sampled with",
    "rollout/staleness": "mean number of updates between the weights that sampled a rollout, over "
    "its tokens, and the trained ones",
    "rollout/staleness_max": "the largest, of any token",
    "rollout/partial": "share that was under way while weights changed",
    "stopping/on": "whether the gate could stop anything in this step",
    "stopping/reason": "why stopping is on or off",
    "stopping/rule": "the gate's rule in this step; `none` while stopping is off",
    "stopping/gate_version": "version of the gate; every rollout carries its own",
    "stopping/threshold": "what the rule compares with: β, p* or the hazard",
    "stopping/beta": "β of z > β·max(V, ε)",
    "stopping/p_star": "success probability under which a rollout is stopped",
    "stopping/hazard": "random stopping: its probability at each token",
    "stopping/bound_upper": "upper bound of the share of right rollouts lost (or, where those are "
    "bounded, of false positives) at this "
    "threshold, at stopping.confidence",
    "stopping/effective_n": "known outcomes that this bound rests on, as if weighted alike",
    "stopping/auc_within_prompts": "how well the gate tells right from wrong rollouts of one "
    "prompt, in a batch it had not seen: 0.5 is chance, and NaN where no prompt had both",
    "stopping/explained_variance": "of the outcome, by the estimate that gates, on rollouts it was "
    "not fitted on",
    "stopping/explained_variance_free": "the same without the sources that are asked, where they "
    "were: what they add is the difference",
    "stopping/regret_mean": "running mean of the surrogate regret g (row 2 of the method)",
    "stopping/regret_variance": "running variance of g",
    "stopping/z_p50": "median of z over the batch's tokens (row 4)",
    "stopping/z_p90": "90 % quantile of z",
    "stopping/z_p99": "99 % quantile of z",
    # of the update; a name is absent where its part of the recipe is not in use, means are over
    # tokens. Known before it, from `experience.prepare`
    "ppo/entropy": "of the policy that sampled, nats a token",
    "ppo/mismatch_kl": "KL(server‖trainer): mean of log π_server − log π_trainer of the tokens "
    "that the newest weights sampled",
    "ppo/mismatch_k3": "the same by the k3 estimate, which is never negative",
    "ppo/mismatch_max": "largest |log π_server − log π_trainer|",
    "ppo/kl_reference": "KL(policy‖reference) by ppo.kl_estimator",
    "ppo/importance_mean": "mean weight against the server's policy, after the cap",
    "ppo/importance_capped": "share of tokens whose weight was capped",
    "ppo/critic_explained_variance": "1 − var(returns − V)/var(returns); NaN when all are the same",
    "ppo/learning_rate": "of the actor's first step",
    "ppo/critic_learning_rate": "of the critic's first step",
    "ppo/dropped_rewards": "rollouts left out because their reward was not finite",
    "ppo/skipped_steps": "optimizer steps not taken because loss or gradient was not finite",
    # means over the update's passes
    "ppo/policy_loss": "clipped surrogate, importance weights included",
    "ppo/clip_share": "share of tokens whose ratio was clipped",
    "ppo/kl": "KL(old‖new) by the k3 estimate",
    "ppo/grad_norm": "of the actor, before clipping",
    "ppo/critic_loss": "half the squared error, clipped if so set",
    "ppo/critic_grad_norm": "of the critic, before clipping",
    "sync/parity": "mean |Δ logprob| of the probe after the weights reached the server",
    "sync/restarts": "servers restarted so far",
    "evaluation/*": "accuracy and the like on held-out problems, with rows of their own",
    "greedy/*": "the same at temperature 0, before and after training (evaluation.greedy)",
    "seconds/*": "time spent in a phase of the step",
}


def grouped(**groups: Mapping[str, Any]) -> dict[str, Metric]:
    """`grouped(ppo={"kl": 0.1})` -> `{"ppo/kl": 0.1}`; numpy's numbers become Python's."""
    return {
        f"{group}/{name}": value.item() if isinstance(value, np.generic) else value
        for group, metrics in groups.items()
        for name, value in metrics.items()
    }


def undocumented(names: Iterable[str]) -> set[str]:
    """Those that METRICS does not explain."""
    patterns = [name.removesuffix("*") for name in METRICS if name.endswith("*")]
    return {name for name in names if name not in METRICS and not name.startswith(tuple(patterns))}


def rollout_metrics(
    rollouts: Sequence[Rollout], *, tokens: int, audit_share: float, weights_version: str = ""
) -> dict[str, Metric]:
    """The numbers of the group `rollout`; those that nothing is known of are NaN.

    Args:
        rollouts: of one step, scored; those that failed included.
        tokens: sampled by the servers, the ones past a stop included.
        audit_share: stopped rollouts were audited with this probability.
        weights_version: of the weights that the step's update starts from, `step-N`.
    """
    usable = [rollout for rollout in rollouts if rollout.end is not EndReason.ERROR]
    known = with_outcome(usable)
    audited = [bool(rollout.correct) for rollout in known if rollout.audited]
    weight = weights(known, audit_share or 1.0)
    right = float(weight[[bool(rollout.correct) for rollout in known]].sum())
    totals = Totals()
    totals.add(rollouts, tokens, gated=True)
    without, _ = totals.tokens_without_stopping()
    versions = [rollout.weights_version for rollout in usable]
    now = _step(weights_version)
    # Of each rollout, by the weights of its tokens: their age, and how many there are.
    ages = [
        [(now - _step(version), tokens) for version, tokens in rollout.versions]
        for rollout in usable
    ]
    shares, lengths = {}, {}
    for name, end in (
        ("completed", EndReason.COMPLETED),
        ("truncated", EndReason.LENGTH),
        ("stopped", EndReason.EARLY_STOP),
    ):
        ended = [rollout.kept for rollout in usable if rollout.end is end]
        shares[name] = _ratio(len(ended), len(usable))
        lengths[f"length_{name}"] = _mean(ended)
    return {
        "reward": _mean([rollout.reward for rollout in usable]),
        "accuracy": _ratio(right, float(weight.sum())),
        "completed_share": shares["completed"],
        "truncated_share": shares["truncated"],
        "stop_share": shares["stopped"],
        "length": _mean([rollout.trained for rollout in usable]),
        "length_max": max((rollout.trained for rollout in usable), default=math.nan),
        "length_without_stopping": _ratio(without, len(usable)),
        **lengths,
        "believed_errors": _believed_errors(known, weight),
        "tokens": tokens,
        "tokens_without_stopping": without,
        "tokens_saved_share": 1.0 - _ratio(tokens, without),
        "questions": sum(len(rollout.probes) for rollout in usable),
        "overshoot": sum(rollout.overshoot for rollout in usable),
        "audited": len(audited),
        "audited_correct": sum(audited),
        "false_positive_rate": _mean(audited),
        "right": right,
        "right_lost": _ratio(sum(audited) / (audit_share or 1.0), right),
        "errors": len(rollouts) - len(usable),
        "grader_timeouts": sum(rollout.grader_timed_out for rollout in usable),
        "weights_version": Counter(versions).most_common(1)[0][0] if versions else "",
        "staleness": _mean([_age(spans) for spans in ages]),
        "staleness_max": max((age for spans in ages for age, _ in spans), default=math.nan),
        "partial": _mean([bool(rollout.weights_changes) for rollout in usable]),
    }


def gate_metrics(gate: Gate) -> dict[str, Metric]:
    """What the group `stopping` says of the gate that a step was sampled with."""
    threshold = RULES[gate.rule].threshold
    return {
        "rule": gate.rule,
        "gate_version": gate.version,
        "threshold": math.nan if threshold is None else threshold.of(gate),
        "beta": gate.beta,
        "p_star": gate.p_star,
        "hazard": gate.hazard,
    }


def _believed_errors(rollouts: Sequence[Rollout], weight: np.ndarray) -> float:
    """Weighted share of the wrong ones whose surrogate regret (row 1) never passed 1."""
    wrong = np.array([not rollout.correct for rollout in rollouts], dtype=bool)
    believed = np.array([_largest_regret(rollout) <= 1.0 for rollout in rollouts], dtype=bool)
    return _ratio(float(weight[wrong & believed].sum()), float(weight[wrong].sum()))


def _largest_regret(rollout: Rollout) -> float:
    regret = np.subtract(rollout.max_logprobs, rollout.logprobs)
    known = regret[np.isfinite(regret)]
    return float(known.max()) if known.size else math.nan


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _age(spans: Sequence[tuple[float, int]]) -> float:
    """Mean over tokens; of one without any, that of the weights that it was asked of."""
    ages, tokens = zip(*spans, strict=True)
    return float(np.average(ages, weights=tokens)) if any(tokens) else ages[0]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _step(version: str) -> float:
    number = version.removeprefix("step-")
    return int(number) if number.isdigit() else math.nan


def table() -> str:
    """METRICS in Markdown."""
    rows = [f"| `{name}` | {meaning} |" for name, meaning in METRICS.items()]
    return "\n".join(["| name | meaning |", "|---|---|", *rows])


if __name__ == "__main__":
    print(table())
