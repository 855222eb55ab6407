"""Keys of all objectives of importance ratios; under train, as published configs have them."""

from flow_grpo.keys import Key

KEYS = {
    "train.clip_range": Key(1e-4, "epsilon, of the per-element mean log-ratio", least=0, most=1),
    "train.old_log_prob": Key(
        "rollout", "replay: scored again before the first update", choices=("rollout", "replay")
    ),
    "train.gate_tolerance": Key(
        0.025, "with replay: relative error of the velocity at the start", above=0, most=1
    ),
    "train.step_weight": Key(
        "none", "std: each step's loss times its std over the mean std", choices=("none", "std")
    ),
    "train.beta": Key(0.0, "KL coefficient", least=0, most=10**6),
    "train.kl_mode": Key("kl_dt", choices=("kl_dt", "kl_true", "x", "v")),
}
