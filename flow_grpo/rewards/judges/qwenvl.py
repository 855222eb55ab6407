"""Qwen-VL (arXiv:2502.13923) or any other chat model as a judge of single images."""

from __future__ import annotations

from flow_grpo.rewards.judges.judge import JudgeReward


class QwenVL(JudgeReward):
    """Score 0 to 1, in steps of 1/5, what the model answers as <Score>0 to 5</Score>."""

    name = endpoint = "qwenvl"
    pattern = r"<score>([^<]*)</score>"
    lowest, highest = 0, 5
