"""HPSv2 on random weights in open_clip's layout, beside that model done by hand.

Not seen with the released weights.
"""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from config.base import base
from flow_grpo.rewards import loading
from flow_grpo.rewards.batch import Batch
from tests.test_clip_rewards import prepared
from tests.tiny.parts import clip_tokenizer

PATCH, GRID = 8, 4
SIDE = PATCH * GRID
SEEN, READ, SHARED, LENGTH = 160, 128, 48, 40  # widths; tokens of a prompt
HEADS = 2  # of 80 and of 64, as a ViT-H/14 has
PROMPTS = ["a red cube", "make it blue", "sign that says three " * 30]
RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (*s, 3), dtype=np.uint8) for s in ((40, 40), (36, 70), (80, 33))]


def shapes(vocabulary):
    """open_clip's names and shapes: 2 layers of picture and of text."""
    found = {
        "logit_scale": (),
        "visual.class_embedding": (SEEN,),
        "visual.positional_embedding": (GRID**2 + 1, SEEN),
        "visual.conv1.weight": (SEEN, 3, PATCH, PATCH),
        "visual.proj": (SEEN, SHARED),
        "token_embedding.weight": (vocabulary, READ),
        "positional_embedding": (LENGTH, READ),
        "text_projection": (READ, SHARED),
    }
    norms = {"visual.ln_pre": SEEN, "visual.ln_post": SEEN, "ln_final": READ}
    for prefix, width in (("visual.transformer", SEEN), ("transformer", READ)):
        for n in range(2):
            at = f"{prefix}.resblocks.{n}"
            norms |= {f"{at}.ln_1": width, f"{at}.ln_2": width}
            for name, size_in, size_out in (
                ("attn.out_proj", width, width),
                ("mlp.c_fc", width, 96),
                ("mlp.c_proj", 96, width),
            ):
                found |= {
                    f"{at}.{name}.weight": (size_out, size_in),
                    f"{at}.{name}.bias": (size_out,),
                }
            found[f"{at}.attn.in_proj_weight"] = (3 * width, width)
            found[f"{at}.attn.in_proj_bias"] = (3 * width,)
    for name, width in norms.items():
        found |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return found


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * (0.15 if len(shape) > 1 else 0.5)
        for name, shape in shapes(len(clip_tokenizer())).items()
    }


@pytest.fixture(scope="module")
def settings(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hpsv2")
    torch.save({"epoch": 1, "state_dict": weights}, folder / "HPS_v2.1_compressed.pt")
    clip_tokenizer().save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(folder)
    paths = {"hpsv2": str(folder / "HPS_v2.1_compressed.pt"), "hpsv2_processor": str(folder)}
    return loading.settings(base()) | paths


class ByHand:
    """open_clip's two transformers in fp64, one picture and one prompt at a time."""

    def __init__(self, weights):
        self.weights = {name: value.double() for name, value in weights.items()}

    def norm(self, name, x):
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)

    def layers(self, prefix, x, mask=None):
        for n in range(2):
            w = {k: self.weights[f"{prefix}.resblocks.{n}.{k}"] for k in (
                "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight",
                "attn.out_proj.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight",
                "mlp.c_proj.bias")}  # fmt: skip
            y = self.norm(f"{prefix}.resblocks.{n}.ln_1", x)[:, None]
            seen, _ = F.multi_head_attention_forward(
                y, y, y, x.shape[-1], HEADS, w["attn.in_proj_weight"], w["attn.in_proj_bias"],
                None, None, False, 0.0, w["attn.out_proj.weight"], w["attn.out_proj.bias"],
                attn_mask=mask,
            )  # fmt: skip
            x = x + seen[:, 0]
            y = self.norm(f"{prefix}.resblocks.{n}.ln_2", x)
            y = F.gelu(F.linear(y, w["mlp.c_fc.weight"], w["mlp.c_fc.bias"]))
            x = x + F.linear(y, w["mlp.c_proj.weight"], w["mlp.c_proj.bias"])
        return x

    def look(self, image):
        patches = F.conv2d(prepared(image, SIDE), self.weights["visual.conv1.weight"], stride=PATCH)
        x = torch.cat([self.weights["visual.class_embedding"][None], patches[0].flatten(1).T])
        x = self.norm("visual.ln_pre", x + self.weights["visual.positional_embedding"])
        x = self.norm("visual.ln_post", self.layers("visual.transformer", x)[0])
        return F.normalize(x @ self.weights["visual.proj"], dim=0)

    def read(self, prompt):
        tokens = clip_tokenizer()(prompt, truncation=True, max_length=LENGTH).input_ids
        x = self.weights["token_embedding.weight"][tokens]
        x = x + self.weights["positional_embedding"][: len(tokens)]
        later = torch.full((len(tokens), len(tokens)), float("-inf"), dtype=torch.double).triu(1)
        x = self.norm("ln_final", self.layers("transformer", x, later))
        return F.normalize(x[int(np.argmax(tokens))] @ self.weights["text_projection"], dim=0)


def test_score_is_the_cosine_of_open_clips_model_done_by_hand(settings, weights):
    loading.check("hpsv2", settings, PROMPTS, [{}] * 3)
    found = loading.load("hpsv2", settings, "cpu")(Batch(PICTURES, PROMPTS, [{}] * 3))["hpsv2"]
    model = ByHand(weights)
    pairs = zip(PICTURES, PROMPTS, strict=True)
    wanted = [(model.look(image) @ model.read(prompt)).item() for image, prompt in pairs]
    assert np.ptp(wanted) > 0.05
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_file_without_the_training_state_around_it_is_the_same(settings, weights, tmp_path):
    path = str(tmp_path / "bare.pt")
    torch.save(weights, path)
    scores = [
        loading.load("hpsv2", settings | change, "cpu")(Batch(PICTURES, PROMPTS, [{}] * 3))["hpsv2"]
        for change in ({}, {"hpsv2": path})
    ]
    np.testing.assert_array_equal(*scores)


@pytest.mark.parametrize("lost", ["visual.", "transformer.resblocks.1.mlp", "logit_scale"])
def test_a_file_that_is_not_hpsv2_is_refused(lost, settings, weights, tmp_path):
    path = str(tmp_path / "other.pt")
    torch.save({k: v for k, v in weights.items() if not k.startswith(lost)}, path)
    with pytest.raises(ValueError, match="config.rewards.hpsv2='.*other.pt' is no CLIP"):
        loading.load("hpsv2", settings | {"hpsv2": path}, "cpu")


def test_a_file_that_is_not_there_is_named_before_anything_loads():
    with pytest.raises(ValueError, match="reward 'hpsv2': config.rewards.hpsv2='': .*xswu/HPSv2"):
        loading.check("hpsv2", loading.settings(base()), PROMPTS, [{}] * 3)
