"""The paper's decision (arXiv 2605.29860), and nothing else: numpy in, a cut out.

No network, no asyncio, no torch. In reading order:

    regret             surrogate regret g, its statistics over batches, z          rows 1 to 4
    told               what else may be known of a stream, and when it is asked
    estimate           V from the stream's own statistics, and from what is told
    tracks             what other rules follow beside z
    recorded           many rollouts as arrays
    rules              every rule, its threshold, and the gate                     row 5
    watch              one live stream under a gate, token by token
    replay             recorded rollouts under a gate, to the same last bit
    threshold_control  how a threshold moves between batches                       row 6
    fit                fits the estimate to known outcomes
    gate_json          gates as JSON and back

Absorbing failure (row 7) and the critic's warm-up (row 8) are the trainer's: `espo_rl.ppo` and
`espo_rl.gate`.
"""
