"""The rewards: a name in config.reward_fn, and the class or function behind it.

The value under its own name is trained, others are logged; NaN: "could not be scored".
"""

from collections.abc import Callable

from flow_grpo.rewards.base import Reward
from flow_grpo.rewards.clip.aesthetic import Aesthetic
from flow_grpo.rewards.clip.aesthetic_v2_5 import AestheticV25
from flow_grpo.rewards.clip.clipscore import ClipScore
from flow_grpo.rewards.clip.dino_diversity import DinoDiversity
from flow_grpo.rewards.clip.hpsv2 import HPSv2
from flow_grpo.rewards.clip.image_similarity import ImageSimilarity
from flow_grpo.rewards.clip.imagereward import ImageReward
from flow_grpo.rewards.clip.pickscore import PickScore
from flow_grpo.rewards.judges.deqa import DeQA
from flow_grpo.rewards.judges.hpsv3 import HPSv3
from flow_grpo.rewards.judges.qwenvl import QwenVL
from flow_grpo.rewards.judges.rubric import Editing, Rubric
from flow_grpo.rewards.judges.trained import EditReward, EditScore, VideoAlign
from flow_grpo.rewards.judges.unifiedreward import UnifiedReward, UnifiedRewardPairs
from flow_grpo.rewards.judges.vqa import DPG, SoftTIFA, VQAScore
from flow_grpo.rewards.rules.geneval import GenEval
from flow_grpo.rewards.rules.jpeg import jpeg_compressibility, jpeg_incompressibility
from flow_grpo.rewards.rules.ocr import OCR, VideoOCR
from flow_grpo.rewards.rules.shapes import shapes, shapes_dense, shapes_strict

REWARDS: dict[str, type[Reward] | Callable] = {
    "aesthetic": Aesthetic,
    "aesthetic_v2_5": AestheticV25,
    "clipscore": ClipScore,
    "deqa": DeQA,
    "dino_diversity": DinoDiversity,
    "dpg": DPG,
    "editing": Editing,
    "editreward": EditReward,
    "editscore": EditScore,
    "geneval": GenEval,
    "hpsv2": HPSv2,
    "hpsv3": HPSv3,
    "image_similarity": ImageSimilarity,
    "imagereward": ImageReward,
    "jpeg_compressibility": jpeg_compressibility,
    "jpeg_incompressibility": jpeg_incompressibility,
    "ocr": OCR,
    "pickscore": PickScore,
    "qwenvl": QwenVL,
    "rubric": Rubric,
    "shapes": shapes,
    "shapes_dense": shapes_dense,
    "shapes_strict": shapes_strict,
    "soft_tifa": SoftTIFA,
    "unifiedreward": UnifiedReward,
    "unifiedreward_pairs": UnifiedRewardPairs,
    "videoalign": VideoAlign,
    "video_ocr": VideoOCR,
    "vqascore": VQAScore,
}
