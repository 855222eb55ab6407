"""GenEval's models, a tiny Mask2Former and a tiny CLIP of random weights, and the whole scorer.

Not seen with the released weights. The rules have their own tests.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)
from transformers.models.mask2former.image_processing_pil_mask2former import (
    Mask2FormerImageProcessorPil,
)

from config.base import base
from flow_grpo.rewards import loading, options
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.rules import detector, geneval
from flow_grpo.rewards.rules.geneval_rules import CLASSES, COLORS, Found
from tests.test_clip_rewards import folder as clip_folder  # noqa: F401
from tests.test_clip_rewards import picture_features, text_features
from tests.tiny.parts import seeded

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 64
RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (*s, 3), dtype=np.uint8) for s in ((48, 48), (40, 80), (80, 48))]


def build(num_labels):
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            embed_dim=16,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=12,
        num_labels=num_labels,
    )
    return seeded(Mask2FormerForUniversalSegmentation, config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mask2former")
    model = build(len(CLASSES))
    with torch.no_grad():
        model.class_predictor.weight *= 300  # confident of something, as a trained one is
    model.save_pretrained(path)
    size = {"shortest_edge": SIDE, "longest_edge": 2 * SIDE}
    Mask2FormerImageProcessorPil(size=size).save_pretrained(path)
    return str(path)


def by_hand(path, image):
    """Resize to 64, ImageNet's mean and std, all queries at full size; [(class, confidence)]."""
    model = Mask2FormerForUniversalSegmentation.from_pretrained(path).eval()
    height, width = image.shape[:2]
    short = min(height, width)
    size = [32 * -(-int(edge * SIDE / short + 0.5) // 32) for edge in (width, height)]
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR), np.float64)
    pixels = torch.from_numpy((small / 255 - MEAN) / STD).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        output = model(pixel_values=pixels)
    masks = interpolate(output.masks_queries_logits, size[::-1], mode="bilinear")
    masks = interpolate(masks, (height, width), mode="bilinear")[0]
    found = []
    for logits, mask in zip(output.class_queries_logits[0], masks, strict=True):
        for name, share in zip(CLASSES, logits.softmax(-1).tolist(), strict=False):
            inside = mask > 0
            if inside.any() and share > 0.3:
                y, x = torch.where(inside)
                box = (x.min(), y.min(), x.max() + 1, y.max() + 1)
                quality = mask[inside].sigmoid().mean().item()
                found.append((name, round(share * quality, 4), tuple(float(e) for e in box)))
    return sorted(found)


def test_the_detector_finds_what_its_queries_say_at_full_size(folder):
    found = detector.Detector(folder, "cpu")(PICTURES)
    total = 0
    for image, objects in zip(PICTURES, found, strict=True):
        flat = [
            (name, round(thing.confidence, 4), thing.box)
            for name, things in objects.items()
            for thing in things
        ]
        wanted = by_hand(folder, image)
        assert [(n, b) for n, _, b in sorted(flat)] == [(n, b) for n, _, b in wanted]
        np.testing.assert_allclose(
            [c for _, c, _ in sorted(flat)], [c for _, c, _ in wanted], atol=2e-4
        )
        masks = [thing.mask.shape for things in objects.values() for thing in things]
        assert set(masks) <= {image.shape[:2]}
        total += len(flat)
    assert total >= 6


def test_a_query_says_class_mask_and_confidence():
    """2 queries of 3 classes on a 4 x 4 mask, enlarged to 8 x 8: arithmetic by hand."""
    logits = torch.tensor([[5.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 9.0]])
    masks = torch.full((2, 4, 4), -4.0)
    masks[0, 1:3, 2:] = 4.0
    (thing,) = detector.objects(logits, masks, (4, 4), (4, 4))[CLASSES[0]]
    assert thing.box == (2, 1, 4, 3) and thing.mask.sum() == 4
    class_share = np.exp(5) / (np.exp(5) + 3)
    assert thing.confidence == pytest.approx(class_share / (1 + np.exp(-4)), rel=1e-5)
    (large,) = detector.objects(logits, masks, (4, 4), (8, 8))[CLASSES[0]]
    assert large.box == (4, 2, 8, 6)


def test_no_confident_query_means_no_object():
    assert detector.objects(torch.zeros(5, 81), torch.zeros(5, 4, 4), (8, 8), (8, 8)) == {}


def test_a_detector_of_other_classes_is_refused(tmp_path):
    build(3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="knows 3 classes; .* on the 80 of COCO"):
        detector.Detector(str(tmp_path), "cpu")


def test_a_crop_is_the_box_on_plain_ground_outside_the_mask():
    image = PICTURES[0]
    mask = np.zeros(image.shape[:2], bool)
    mask[10:20, 5:25] = True
    cut = np.asarray(geneval.crop(image, Found((5, 8, 25, 22), 1.0, mask)))
    assert cut.shape == (14, 20, 3) and (cut[:2] == 0x99).all() and (cut[-2:] == 0x99).all()
    np.testing.assert_array_equal(cut[2:12], image[10:20, 5:25])
    whole = np.asarray(geneval.crop(image, Found((5, 8, 25, 22))))
    np.testing.assert_array_equal(whole, image[8:22, 5:25])


@pytest.fixture(scope="module")
def settings(folder, clip_folder):  # noqa: F811
    return loading.settings(base()) | {"geneval_detector": folder, "clip": clip_folder}


def test_a_color_is_the_nearest_of_ten_texts_of_three_templates(settings, clip_folder):  # noqa: F811
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip_folder).eval()
    things = [Found((0, 0, 40, 30)), Found((10, 10, 48, 48)), Found((3, 20, 20, 48))]
    with torch.no_grad():
        texts = []
        for color in COLORS:
            spoken = (f"{color} dog", f"{color}-colored dog", f"{color} object")
            mean = torch.stack([text_features(model, f"a photo of a {s}") for s in spoken]).mean(0)
            texts.append(mean / mean.norm())
        wanted = []
        for thing in things:
            left, top, right, bottom = (int(edge) for edge in thing.box)
            seen = picture_features(model, PICTURES[0][top:bottom, left:right])
            wanted.append(COLORS[(torch.stack(texts) @ seen).argmax()])
    scorer = loading.load("geneval", settings, "cpu")
    assert scorer.colors(PICTURES[0], "dog", things) == wanted


@pytest.mark.parametrize("trained", ["soft", "strict", "official", "flow_grpo"])
def test_scores_are_the_rules_verdicts_on_what_was_found(trained, settings, monkeypatch):
    scorer = loading.load("geneval", settings | {"geneval_score": trained}, "cpu")
    dog = Found((0, 0, 20, 20), 0.95)
    sure = [{"dog": [dog] * 3}, {"dog": [dog]}, {"dog": [dog._replace(confidence=0.5)]}]
    monkeypatch.setattr(scorer, "detect", lambda images: sure)
    row = {"tag": "counting", "include": [{"class": "dog", "count": 1}]}
    found = scorer(Batch(PICTURES, ["a dog"] * 3, [row] * 3))
    columns = {
        "soft": [0, 1, 0],
        "strict": [0, 1, 0],
        "official": [1, 1, 0],  # 0.5 is below counting's 0.9
        "flow_grpo": [-1, 1, 0],
    }
    assert found["geneval"].tolist() == columns[trained]
    for name in ("soft", "strict", "official"):
        assert found[f"geneval_{name}"].tolist() == columns[name]


def test_the_scorer_runs_from_pictures_to_scores(settings):
    rows = [{"tag": "colors", "include": [{"class": c, "count": 1, "color": "red"}]}
            for c in CLASSES[:3]]  # fmt: skip
    loading.check("geneval", settings, ["p"] * 3, rows)
    found = loading.load("geneval", settings, "cpu")(Batch(PICTURES, ["p"] * 3, rows))
    assert {"geneval", "geneval_soft", "geneval_strict", "geneval_official"} == set(found)
    assert all(np.isin(found[f"geneval_{n}"], (0, 1)).all() for n in ("strict", "official"))
    assert ((found["geneval"] >= 0) & (found["geneval"] <= 1)).all()


def test_a_prompt_that_can_not_be_judged_is_named_before_anything_loads(settings):
    row = {"include": [{"class": "unicorn", "count": 1}]}
    with pytest.raises(ValueError, match="'a unicorn' can't be judged: 'unicorn' is none of"):
        loading.check("geneval", settings, ["a unicorn"], [row])
    with pytest.raises(ValueError, match="geneval_score='best': one of soft, strict"):
        options.settings(["geneval_score=best"], ["geneval"])
