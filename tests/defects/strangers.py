"""Defects of what a reward server and its client make of strangers' input."""

from defects.defect import SLIP, Defect

APP = "flow_grpo/reward_server/app.py"
BOUNDED = "flow_grpo/rewards/remote/bounded.py"
COMBINE = "flow_grpo/rewards/combine.py"
WIRE = "flow_grpo/rewards/remote/wire.py"

DEFECTS = [
    Defect(
        "key-without-its-body",
        "another request's scores for a key that came twice",
        APP,
        "found[0] != digest",
        "not found[0]",
        "test_hostile_requests.py::test_a_key_that_comes_with_another_body_gets_no_scores[afterwards]",
    ),
    Defect(
        "brackets-in-texts-are-counted",
        SLIP,
        BOUNDED,
        """.split(b'"')[::2]""",
        """.split(b'"')""",
        "test_server_limits.py::test_the_count_is_near_the_number_of_values",
    ),
    Defect(
        "a-column-of-whoever-came-last",
        "a reward's figure overwritten by another's helper column",
        COMBINE,
        "scores |= {name: part[name] for name, part in columns.items() if name in part}",
        "scores |= {}",
        "test_columns.py::test_rewards_that_give_each_other_s_score_must_agree",
    ),
    Defect(
        "tensor-beyond-the-body",
        SLIP,
        WIRE,
        "end > len(data) or ",
        "",
        "test_hostile_requests.py::test_random_requests_are_answered_as_promised",
    ),
]
