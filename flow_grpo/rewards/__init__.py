"""What scores a picture: a name in config.reward_fn, and the scorer behind it.

Every scorer has the signature (images, prompts, metadata, references=None, group=None) -> dict of
(B,) arrays. images: uint8 (H, W, 3), or (F, H, W, 3) for video. The value under the reward's own
name is trained, others are logged, NaN means "could not be scored". A function is a scorer; a class
(base.Reward) becomes one when it is built, with what it needs of config.rewards.
"""

REWARDS = {
    "aesthetic": "flow_grpo.rewards.clip.aesthetic:Aesthetic",
    "clipscore": "flow_grpo.rewards.clip.clipscore:ClipScore",
    "deqa": "flow_grpo.rewards.judges.deqa:DeQA",
    "geneval": "flow_grpo.rewards.rules.geneval:GenEval",
    "hpsv2": "flow_grpo.rewards.clip.hpsv2:HPSv2",
    "hpsv3": "flow_grpo.rewards.judges.hpsv3:HPSv3",
    "image_similarity": "flow_grpo.rewards.clip.image_similarity:ImageSimilarity",
    "imagereward": "flow_grpo.rewards.clip.imagereward:ImageReward",
    "jpeg_compressibility": "flow_grpo.rewards.rules.jpeg:jpeg_compressibility",
    "jpeg_incompressibility": "flow_grpo.rewards.rules.jpeg:jpeg_incompressibility",
    "ocr": "flow_grpo.rewards.rules.ocr:OCR",
    "pickscore": "flow_grpo.rewards.clip.pickscore:PickScore",
    "qwenvl": "flow_grpo.rewards.judges.qwenvl:QwenVL",
    "shapes": "flow_grpo.rewards.rules.shapes:shapes",
    "shapes_dense": "flow_grpo.rewards.rules.shapes:shapes_dense",
    "shapes_strict": "flow_grpo.rewards.rules.shapes:shapes_strict",
    "unifiedreward": "flow_grpo.rewards.judges.unifiedreward:UnifiedReward",
    "unifiedreward_pairs": "flow_grpo.rewards.judges.unifiedreward:UnifiedRewardPairs",
    "video_ocr": "flow_grpo.rewards.rules.ocr:VideoOCR",
}
