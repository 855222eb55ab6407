"""ImageReward on random weights under the authors' names, beside their model done by hand.

Not seen with the released weights.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import BertTokenizer

from config.base import base
from flow_grpo.rewards import loading
from flow_grpo.rewards.batch import Batch
from tests.test_clip_rewards import prepared

WIDTH, PATCH, GRID = 64, 8, 4
SIDE = PATCH * GRID
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "cube", "cat"]
PROMPTS = ["a red cube", "a blue cat", "cat " * 60]
RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (*s, 3), dtype=np.uint8) for s in ((40, 40), (36, 70), (80, 33))]


def layer(name, size_in, size_out):
    return {f"{name}.weight": (size_out, size_in), f"{name}.bias": (size_out,)}


def norm(name):
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}


def shapes():
    """The authors' names and shapes: 2 layers of picture and of text, heads of 64."""
    seen = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, GRID**2 + 1, WIDTH)} | norm("norm")
    seen |= {"patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,)}
    read = {"embeddings.word_embeddings.weight": (len(WORDS), WIDTH)}
    read |= {"embeddings.position_embeddings.weight": (48, WIDTH)} | norm("embeddings.LayerNorm")
    for n in range(2):
        seen |= norm(f"blocks.{n}.norm1") | norm(f"blocks.{n}.norm2")
        seen |= layer(f"blocks.{n}.attn.qkv", WIDTH, 3 * WIDTH)
        seen |= layer(f"blocks.{n}.attn.proj", WIDTH, WIDTH)
        seen |= layer(f"blocks.{n}.mlp.fc1", WIDTH, 96) | layer(f"blocks.{n}.mlp.fc2", 96, WIDTH)
        for kind in ("attention", "crossattention"):
            at = f"encoder.layer.{n}.{kind}"
            for part in ("self.query", "self.key", "self.value", "output.dense"):
                read |= layer(f"{at}.{part}", WIDTH, WIDTH)
            read |= norm(f"{at}.output.LayerNorm")
        read |= layer(f"encoder.layer.{n}.intermediate.dense", WIDTH, 96)
        read |= layer(f"encoder.layer.{n}.output.dense", 96, WIDTH)
        read |= norm(f"encoder.layer.{n}.output.LayerNorm")
    found = {f"blip.visual_encoder.{k}": v for k, v in seen.items()}
    found |= {f"blip.text_encoder.{k}": v for k, v in read.items()}
    sizes = (WIDTH, 32, 16, 8, 4, 1)
    for number, (size_in, size_out) in zip((0, 2, 4, 6, 7), pairwise(sizes), strict=True):
        found |= {f"mlp.{k}": v for k, v in layer(f"layers.{number}", size_in, size_out).items()}
    return found


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.5)
        for name, shape in shapes().items()
    }


@pytest.fixture(scope="module")
def settings(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagereward")
    positions = {"blip.text_encoder.embeddings.position_ids": torch.arange(48)[None]}
    torch.save(weights | positions, folder / "ImageReward.pt")
    BertTokenizer(vocab={word: n for n, word in enumerate(WORDS)}).save_pretrained(folder)
    paths = {"imagereward": str(folder / "ImageReward.pt"), "imagereward_tokenizer": str(folder)}
    return loading.settings(base()) | paths


class ByHand:
    """A ViT and a BERT that looks at it, in fp64, one picture and one prompt at a time."""

    def __init__(self, weights):
        self.weights = {name: value.double() for name, value in weights.items()}

    def linear(self, name, x):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, name, x, epsilon):
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, (WIDTH,), weight, bias, epsilon)

    def look(self, image):
        v = "blip.visual_encoder."
        kernel, bias = (self.weights[f"{v}patch_embed.proj.{k}"] for k in ("weight", "bias"))
        patches = F.conv2d(prepared(image, SIDE), kernel, bias, PATCH)
        x = torch.cat([self.weights[f"{v}cls_token"][0], patches[0].flatten(1).T])
        x = x + self.weights[f"{v}pos_embed"][0]
        for n in range(2):
            b = f"{v}blocks.{n}."
            query, key, value = self.linear(f"{b}attn.qkv", self.norm(f"{b}norm1", x, 1e-6)).chunk(
                3, -1
            )
            x = x + self.linear(f"{b}attn.proj", attend(query, key, value))
            hidden = F.gelu(self.linear(f"{b}mlp.fc1", self.norm(f"{b}norm2", x, 1e-6)))
            x = x + self.linear(f"{b}mlp.fc2", hidden)
        return self.norm(f"{v}norm", x, 1e-6)

    def attention(self, name, x, other):
        query = self.linear(f"{name}.self.query", x)
        key, value = (self.linear(f"{name}.self.{part}", other) for part in ("key", "value"))
        out = self.linear(f"{name}.output.dense", attend(query, key, value))
        return self.norm(f"{name}.output.LayerNorm", out + x, 1e-12)

    def score(self, image, prompt):
        seen, t = self.look(image), "blip.text_encoder."
        tokens = [WORDS.index(word) for word in ["[CLS]", *prompt.split()[:33], "[SEP]"]]
        x = self.weights[f"{t}embeddings.word_embeddings.weight"][tokens]
        x = x + self.weights[f"{t}embeddings.position_embeddings.weight"][: len(tokens)]
        x = self.norm(f"{t}embeddings.LayerNorm", x, 1e-12)
        for n in range(2):
            name = f"{t}encoder.layer.{n}"
            x = self.attention(f"{name}.attention", x, x)
            x = self.attention(f"{name}.crossattention", x, seen)
            out = self.linear(
                f"{name}.output.dense", F.gelu(self.linear(f"{name}.intermediate.dense", x))
            )
            x = self.norm(f"{name}.output.LayerNorm", out + x, 1e-12)
        x = x[0]
        for number in (0, 2, 4, 6, 7):
            x = self.linear(f"mlp.layers.{number}", x)
        return (x.item() - 0.16717362830052426) / 1.0333394966054072


def attend(query, key, value):
    return (query @ key.T / 64**0.5).softmax(-1) @ value


def test_score_is_the_authors_model_done_by_hand(settings, weights):
    loading.check("imagereward", settings, PROMPTS, [{}] * 3)
    found = loading.load("imagereward", settings, "cpu")(Batch(PICTURES, PROMPTS, [{}] * 3))
    model = ByHand(weights)
    wanted = [model.score(*pair) for pair in zip(PICTURES, PROMPTS, strict=True)]
    assert np.ptp(wanted) > 0.05
    np.testing.assert_allclose(found["imagereward"], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lost", ["blip.visual_encoder.blocks.1.attn.proj.weight", "blip.", "mlp."])
def test_a_file_that_is_not_imagereward_is_refused(lost, settings, weights, tmp_path):
    path = str(tmp_path / "other.pt")
    torch.save({k: v for k, v in weights.items() if not k.startswith(lost)}, path)
    with pytest.raises(ValueError, match="config.rewards.imagereward|missing"):
        loading.load("imagereward", settings | {"imagereward": path}, "cpu")
