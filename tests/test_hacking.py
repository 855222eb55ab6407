"""Signs of reward hacking: what images look like, how alike they are, and what the report says."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import running
import torch
from transformers import Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from config.base import base
from flow_grpo.evaluation.looks import looks, means
from flow_grpo.report import charts, facts, recorded
from flow_grpo.report.recorded import read_metrics
from flow_grpo.rewards import loading
from flow_grpo.rewards.batch import Batch
from tests.tiny.parts import seeded

RNG = np.random.default_rng(0)


def test_looks_are_those_of_images_whose_colours_and_edges_are_known():
    flat = np.full((6, 8, 3), 90, dtype=np.uint8)
    assert looks(flat) == (0, 0)
    red = np.zeros((6, 8, 3), dtype=np.uint8)
    red[..., 0] = 255
    assert looks(red) == (1, 0)
    stripes = flat.copy()
    stripes[:, ::2] = 141  # 51 of 255 apart from each neighbour along one axis, 0 along the other
    assert looks(stripes) == pytest.approx((0, 0.1))
    assert looks(np.stack([flat, red, stripes])) == looks(red)
    found = {"saturation": 0.5, "sharpness": pytest.approx(0.05)}
    assert means([looks(red), looks(stripes)]) == found


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    path = tmp_path_factory.mktemp("dino")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = seeded(Dinov2Model, Dinov2Config(**sizes, image_size=28, patch_size=14))
    with torch.no_grad():  # random features hardly differ otherwise
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and "position" not in name:
                weight *= 6
            if name.endswith("lambda1"):
                weight.fill_(1.0)
    model.save_pretrained(path)
    size = {"height": 28, "width": 28}
    BitImageProcessorPil(size={"shortest_edge": 28}, crop_size=size).save_pretrained(path)
    return str(path)


def test_diversity_by_features_is_the_mean_distance_from_the_others_of_a_group(dino):
    images = [RNG.integers(0, 256, (28, 28, 3), dtype=np.uint8) for _ in range(5)]
    images[1] = images[0]
    settings = loading.settings(base()) | {"dino": dino}
    loading.check("dino_diversity", settings, ["a"] * 6, [{}] * 6)
    batch = Batch([*images, images[2]], ["a"] * 6, [{}] * 6, group=[0, 0, 0, 1, 1, 2])
    found = loading.load("dino_diversity", settings, "cpu")(batch)["dino_diversity"]
    model = Dinov2Model.from_pretrained(dino).eval()
    mean, std = (
        np.array([0.48145466, 0.4578275, 0.40821073]),
        np.array([0.26862954, 0.26130258, 0.27577711]),
    )
    features = []
    for image in images:
        pixels = torch.from_numpy((image / 255 - mean) / std).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            token = model(pixel_values=pixels).last_hidden_state[0, 0].double().numpy()
        features.append(token / np.linalg.norm(token))

    def distance(a, b):
        return 1 - features[a] @ features[b]

    first, last = distance(0, 2) / 2, distance(3, 4)
    wanted = [first, first, (distance(2, 0) + distance(2, 1)) / 2, last, last, np.nan]
    assert min(first, last) > 0.01
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_run_says_what_its_evaluations_look_like_and_its_page_draws_it(files):
    run = running.train(running.arguments(files, run_name="looks", eval_freq=1))
    rows = read_metrics(run.folder, "look")
    assert [row["step"] for row in rows] == [
        row["step"] for row in read_metrics(run.folder, "eval")
    ]
    assert all(0 < row[name] < 1 for row in rows for name in ("saturation", "sharpness"))
    page = (run.folder / "report.html").read_text()
    titles = [chart.title for chart in charts.hacking(recorded.load(run.folder))]
    assert titles == ["Diversity", "Saturation", "Sharpness"]
    assert "Signs of reward hacking" in page and all(f"<b>{title}</b>" in page for title in titles)


def test_the_page_says_which_signs_a_run_shows():
    rows = {"evals": [{"step": 0}, {"step": 8, "hacking_alarm": 1}]}
    rows |= {"epochs": [{"diversity": 0.5}, {"diversity": 0.3}]}
    rows |= {"updates": [{"norm_ratio": 1.0}, {"norm_ratio": 1.12}]}
    rows |= {
        "looks": [{"saturation": 0.1, "sharpness": 0.02}, {"saturation": 0.2, "sharpness": 0.021}]
    }
    calm = recorded.Recorded(Path(), {}, [], {}, {}, [{"step": 0}], [], [], [])
    assert facts.signs(calm) == []
    alarm, alike, colours, norm = facts.signs(replace(calm, **rows))
    assert (
        "step 8" in alarm and "differ 0.60 times" in alike and "2.00 times as colourful" in colours
    )
    assert "1.12 times the reference's" in norm
    collapsed = replace(calm, epochs=[{"diversity": 0.5}, {"diversity": 0.3}, {"diversity": 0.0}])
    assert facts.signs(collapsed) == ["A prompt's images differ 0.00 times as much as at first."]


@pytest.mark.slow
def test_the_run_that_is_hacked_on_purpose_is_caught(tmp_path, capsys):
    argv = ["train", "--config=config/testbed.py:shapes_sd3_hacked", f"--config.logdir={tmp_path}"]
    run = running.train(argv)
    evaluations = read_metrics(run.folder, "eval")
    reward = [row["avg"] for row in evaluations]
    assert reward == sorted(reward)
    assert any(row["hacking_alarm"] for row in evaluations)
    assert "warning: reward hacking" in capsys.readouterr().out
    alarm, *others = facts.signs(recorded.load(run.folder))
    assert "Held-out rewards fell" in alarm and any("colourful" in each for each in others)
