"""Every objective trains, resumes to the bit and starts at ratio 1, on every kind of pipeline."""

import matrix
import pytest
import running
import tiny

from flow_grpo.objectives.registry import OBJECTIVES

OTHERS = [  # beyond SD3, a cover of model x objective x what trains
    (model, objective, (m + o) % 2 == 0)
    for m, model in enumerate((*matrix.MODELS[1:], "bagel"))
    for o, objective in enumerate(OBJECTIVES)
]

QUICK = {"shared_prefix", "per_step", "tree", "dropped"}  # the others are slow
LIKE_OTHERS = {"awm", "epg", "ram", "vgrpo", "dgpo"}  # and so are these


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return running.make_files(tmp_path_factory.mktemp("matrix"))


def test_every_objective_has_its_row():
    assert set(matrix.KEYS) == set(OBJECTIVES)


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in LIKE_OTHERS else name
        for name in OBJECTIVES
    ],
)
def test_an_objective_trains_a_lora_of_sd3_and_resumes_to_the_bit(folder, objective):
    matrix.check(folder, "sd3", objective, use_lora=True)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_does_so_in_a_full_fine_tune(folder, objective):
    matrix.check(folder, "sd3", objective, use_lora=False)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "objective", "use_lora"), OTHERS)
def test_it_does_so_on_other_models(folder, model, objective, use_lora):
    if not (folder / model).exists():
        tiny.save(model, folder / model)
    matrix.check(folder, model, objective, use_lora)


@pytest.mark.parametrize(
    "rollout",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in matrix.ROLLOUTS
    ],
)
def test_a_policy_gradient_starts_at_ratio_one_by_every_rollout(folder, rollout):
    kernel = matrix.KERNELS[list(matrix.ROLLOUTS).index(rollout) % 4]
    matrix.check(folder, "sd3", "grpo", True, rollout, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["sde", "dance"])
@pytest.mark.parametrize("rollout", matrix.ROLLOUTS)
@pytest.mark.parametrize("objective", ["grpo_guard", "flow_dppo"])
def test_so_do_its_kin(folder, objective, rollout, kernel):
    matrix.check(folder, "sd3", objective, True, rollout, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("rollout", ["tree", "strides", "per_step"])
def test_others_train_on_the_images_of_branches(folder, rollout):
    matrix.check(folder, "sd3", "nft", True, rollout)
