"""What scores a picture: a name in config.reward_fn, and the scorer behind it.

Every scorer has the signature (images, prompts, metadata, references=None, group=None) -> dict of
(B,) arrays. images: uint8 (H, W, 3), or (F, H, W, 3) for video. The value under the reward's own
name is trained, others are logged, NaN means "could not be scored".
"""

REWARDS = {
    "jpeg_compressibility": "flow_grpo.rewards.jpeg:jpeg_compressibility",
    "jpeg_incompressibility": "flow_grpo.rewards.jpeg:jpeg_incompressibility",
    "shapes": "flow_grpo.rewards.shapes:shapes",
    "shapes_strict": "flow_grpo.rewards.shapes:shapes_strict",
    "shapes_dense": "flow_grpo.rewards.shapes:shapes_dense",
}
