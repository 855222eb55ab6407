"""The rewards on CLIP, on a tiny one of random weights, beside their formulas done by hand.

Not seen with the released weights.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from config.base import base
from flow_grpo.rewards import loading
from flow_grpo.rewards.batch import Batch
from flow_grpo.rewards.clip import encoder
from tests.tiny.parts import clip_tokenizer, seeded

SIDE, WIDTH = 32, 16
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROMPTS = ["a red cube", "make it blue", "a red cube", "sign that says three " * 30]
RNG = np.random.default_rng(0)
PICTURES = [
    RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    for height, width in ((48, 48), (40, 90), (90, 33), (20, 25))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, tokenizer = tmp_path_factory.mktemp("clip"), clip_tokenizer()
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    marks = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")}
    config = CLIPConfig(
        text_config=layers
        | marks
        | {"num_attention_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 40},
        vision_config=layers | {"num_attention_heads": 2, "image_size": SIDE, "patch_size": 8},
        projection_dim=WIDTH,
    )
    model = seeded(CLIPModel, config)
    with torch.no_grad():  # random features hardly differ otherwise
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "position" not in name:
                weight *= 4
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def settings(folder):
    found = loading.settings(base())
    return found | {"clip": folder, "pickscore": folder, "pickscore_processor": folder}


def prepared(image, side):
    """Shorter side to `side`, bicubic; the middle; CLIP's mean and std. (1, 3, side, side) fp64."""
    height, width = image.shape[:2]
    short = min(height, width)
    size = int(width * side / short), int(height * side / short)
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC), np.float64)
    top, left = (small.shape[0] - side) // 2, (small.shape[1] - side) // 2
    pixels = (small[top : top + side, left : left + side] / 255 - MEAN) / STD
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def picture_features(model, image):
    """Projected, of unit length."""
    pixels = prepared(image, SIDE).float()
    pooled = model.vision_model(pixel_values=pixels).pooler_output[0]
    found = model.visual_projection.weight.double() @ pooled.double()
    return found / found.norm()


def text_features(model, text):
    """The state of the end mark, without any padding; projected; unit length."""
    tokens = clip_tokenizer()(text, truncation=True, max_length=40, return_tensors="pt").input_ids
    state = model.text_model(input_ids=tokens).last_hidden_state[0, -1]
    found = model.text_projection.weight.double() @ state.double()
    return found / found.norm()


@pytest.fixture(scope="module")
def truth(folder):
    """Return (exp(logit scale), picture features, text features)."""
    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        pictures = torch.stack([picture_features(model, image) for image in PICTURES])
        texts = torch.stack([text_features(model, text) for text in PROMPTS])
        return model.logit_scale.exp().item(), pictures, texts


def score(name, settings, references=None):
    loading.check(name, settings, PROMPTS, [{"image": "a.png"}] * len(PROMPTS))
    scorer = loading.load(name, settings, "cpu")
    return scorer(Batch(PICTURES, PROMPTS, [{}] * len(PROMPTS), references))[name]


@pytest.mark.parametrize(("name", "divisor"), [("pickscore", 26), ("clipscore", 30)])
def test_score_is_the_scaled_cosine_of_picture_and_prompt(name, divisor, settings, truth):
    scale, pictures, texts = truth
    wanted = scale * (pictures * texts).sum(1).numpy() / divisor
    assert np.ptp(wanted) > 0.05
    np.testing.assert_allclose(score(name, settings), wanted, atol=1e-5)


def test_image_similarity_is_the_cosine_with_the_reference(settings, truth):
    _, pictures, _ = truth
    references = [(PICTURES[1],), (PICTURES[1],), (PICTURES[0],), (PICTURES[0], PICTURES[3])]
    cosines = (pictures @ pictures.T).numpy()
    wanted = [cosines[0, 1], 1.0, cosines[2, 0], (cosines[3, 0] + 1) / 2]
    np.testing.assert_allclose(score("image_similarity", settings, references), wanted, atol=1e-5)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_aesthetic_is_the_mlp_on_the_unit_features(suffix, settings, truth, tmp_path):
    """1 -> ... -> 1 without anything between the layers; dropout took the other numbers."""
    generator = torch.Generator().manual_seed(0)
    layers, state = [], {}
    for number, (size_in, size_out) in enumerate([(WIDTH, 12), (12, 8), (8, 6), (6, 4), (4, 1)]):
        weight = torch.randn(size_out, size_in, generator=generator)
        bias = torch.randn(size_out, generator=generator)
        layers.append((weight.double(), bias.double()))
        key = f"layers.{(0, 2, 4, 6, 7)[number]}"
        state |= {f"{key}.weight": weight, f"{key}.bias": bias}
    path = str(tmp_path / f"head{suffix}")
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    wanted = truth[1]
    for weight, bias in layers:
        wanted = wanted @ weight.T + bias
    found = score("aesthetic", settings | {"aesthetic_head": path})
    np.testing.assert_allclose(found, wanted.squeeze(1).numpy(), rtol=1e-5, atol=1e-4)


def test_a_head_of_another_width_is_refused(settings, tmp_path):
    path = str(tmp_path / "head.pth")
    torch.save({"layers.0.weight": torch.ones(1, 7), "layers.0.bias": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="takes 7 features, config.rewards.clip gives 16"):
        loading.load("aesthetic", settings | {"aesthetic_head": path}, "cpu")


def test_a_head_with_code_in_it_is_not_run(settings, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    path = str(tmp_path / "head.pth")
    torch.save({"layers.0.weight": Hostile()}, path)
    with pytest.raises(Exception, match="weights_only"):
        loading.load("aesthetic", settings | {"aesthetic_head": path}, "cpu")
    assert not (tmp_path / "written").exists()


def test_rewards_of_one_clip_share_it(settings):
    first, second = (loading.load(n, settings, "cpu") for n in ("clipscore", "image_similarity"))
    assert first.clip is second.clip and first.clip.model.dtype == torch.float32


def test_scores_do_not_depend_on_how_pictures_are_batched(settings, monkeypatch):
    together = score("clipscore", settings)
    monkeypatch.setattr(encoder, "BATCH_SIZE", 3)
    np.testing.assert_allclose(score("clipscore", settings), together, atol=1e-6)


def test_a_video_is_refused(settings):
    with pytest.raises(ValueError, match=r"clipscore scores pictures .* got \(2, 8, 8, 3\)"):
        scorer = loading.load("clipscore", settings, "cpu")
        scorer(Batch([np.zeros((2, 8, 8, 3), np.uint8)], ["a"], [{}]))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("pickscore", {"pickscore": ""}, "config.rewards.pickscore is empty"),
        ("clipscore", {"clip": "./nowhere"}, "config.rewards.clip='./nowhere': there is no such"),
        ("aesthetic", {"aesthetic_head": "x.pth"}, "config.rewards.aesthetic_head='x.pth'"),
        ("imagereward", {}, "config.rewards.imagereward='': there is no such file"),
    ],
)
def test_a_model_that_is_not_there_is_named_before_anything_loads(name, change, message, settings):
    with pytest.raises(ValueError, match=f"reward '{name}': {message}"):
        loading.check(name, settings | change, PROMPTS, [{}] * len(PROMPTS))


def test_a_prompt_without_a_reference_picture_is_named(settings):
    with pytest.raises(ValueError, match="the prompt 'make it blue' has no reference picture"):
        loading.check("image_similarity", settings, PROMPTS[:2], [{"image": ["a.png"]}, {}])
