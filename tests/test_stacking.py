"""Several trained steps or noise levels of a micro-batch in one forward and one backward."""

import matrix
import pytest
import running
import tiny
import torch

from flow_grpo.diffusers_patch.sd3 import SD3

pytestmark = pytest.mark.usefixtures("fresh_logs")

GRPO = {"train__old_log_prob": "replay", "train__beta": 0.1, "sample__sde_window_size": 3}
NFT = {"objective": "nft", "nft__num_times": 3, "nft__kl_beta": 0.1, "train__cfg": False}


def trained(files, monkeypatch, name, **keys):
    """Train for an epoch; return the weights, the updates and the rows of each prediction."""
    sizes, honest = [], SD3.velocity

    def counted(self, model, latents, sigma, conditioning):
        sizes.append((len(latents), torch.is_grad_enabled()))
        return honest(self, model, latents, sigma, conditioning)

    monkeypatch.setattr(SD3, "velocity", counted)
    keys |= {"sample__num_image_per_prompt": 2}  # two prompts a micro-batch
    run = running.train(running.arguments(files, run_name=name, num_epochs=1, **keys))
    monkeypatch.setattr(SD3, "velocity", honest)
    updates = [row for row in running.metrics(run.folder) if row["kind"] == "update"]
    return running.weights(run.folder), updates, sizes


@pytest.mark.parametrize("keys", [GRPO, NFT], ids=["grpo", "nft"])
def test_stacked_points_give_the_same_update_in_fewer_calls(files, monkeypatch, keys):
    alone, updates, each = trained(files, monkeypatch, "alone", **keys)
    for stacked, calls in ((2, (8, 4)), (3, (12,))):  # three points: 2 + 1, or all
        weights, same, sizes = trained(
            files, monkeypatch, f"stacked-{stacked}", train__stacked_points=stacked, **keys
        )
        of_update = [size for size, with_gradient in sizes if with_gradient]
        assert of_update == 4 * list(calls)  # micro-batches of 4 rows
        assert sum(size for size, _ in sizes) == sum(size for size, _ in each)
        for one, other in zip(updates, same, strict=True):
            for key in ("loss", "grad_norm"):
                assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-6)
            assert one.keys() == other.keys()
        for name, value in alone.items():
            torch.testing.assert_close(weights[name], value, atol=2e-5, rtol=0)


def test_what_was_sampled_one_step_at_a_time_is_not_scored_in_stacks(files):
    with pytest.raises(ValueError, match="config.train.old_log_prob=replay"):
        running.prepare(running.arguments(files, train__stacked_points=2))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["flux", "qwenimage", "flux2_klein", "zimage", "wan"])
def test_every_family_s_conditioning_stands_beside_its_rows(tmp_path, model):
    folder = running.make_files(tmp_path)
    tiny.save(model, folder / model)
    keys = matrix.overrides("nft", True, "window", "sde") | {"nft__num_times": 2, "num_epochs": 1}
    keys |= {"pretrained__model": folder / model, "sample__num_image_per_prompt": 2}
    keys |= {"num_frames": 5} if model == "wan" else {}
    norms = []
    for stacked in (1, 2):
        line = running.arguments(
            folder, run_name=f"{stacked}", train__stacked_points=stacked, **keys
        )
        run = running.train(line, tiny.MODELS[model][0])
        rows = running.metrics(run.folder)
        norms.append([row["grad_norm"] for row in rows if row["kind"] == "update"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
