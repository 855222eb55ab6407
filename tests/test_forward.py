"""Losses on noised final images: their values on the fixture of noised.py, in fp64 by hand.

What stands here as a number was computed from the papers' formulas by clean predictions in numpy.
"""

import math

import pytest
import ratio
import running
import torch
from fixtures import F64, close
from noised import NOISE, SIGMA, TARGET, V_OLD, V_REF, V, noised, rollout
from toy import plan_of

from config.base import base
from flow_grpo.diffusers_patch.sd3 import SD3
from flow_grpo.objectives.base import Micro
from flow_grpo.objectives.forward.anchored import DECAYS
from flow_grpo.objectives.forward.elbo import adaptive, weighted_error
from flow_grpo.objectives.forward.grouped import group_sums
from flow_grpo.objectives.forward.guards import overrated, win_rate
from flow_grpo.objectives.registry import find
from flow_grpo.records import RowTable
from flow_grpo.sampling import Schedule
from flow_grpo.training import collect

SIGMAS = torch.tensor([1, 0.9, 0.7, 0.4, 0.1, 0])
VELOCITIES = {"policy": V, "old": V_OLD, "fast": V_OLD, "reference": V_REF}
RATIOS = {  # of AWM, policy to old
    "uniform": [1.0134648454, 1.0037570400],
    "t": [1.0080572866, 1.0022525331],
    "t2": [1.0048266107, 1.0013509117],
    "huber": [1.0227979007, 1.0064260070],
    "ghuber": [1.1129430167, 1.0310444370],
}
NEW = ("awm", "vgrpo", "epg", "ram", "crd", "dgpo")


def objective(name, **keys):
    """An objective after an epoch's first update."""
    config = base(name)
    plain = {key: 0.0 for key in find(name).keys if key.endswith(".kl_beta")}
    config.update_from_flattened_dict(plain | {k.replace("__", "."): keys[k] for k in keys})
    found = find(name)(config, Schedule(SIGMAS))
    found.after_update(Moves(), 1, {"kl": 0.0})
    return found


class Moves:
    def __init__(self):
        self.seen = []

    def update(self, name, decay):
        self.seen.append((name, decay))


def rows_of(advantages=(1.5, -0.5), group=(0, 0), member=(0, 1)):
    rows = rollout(advantages=advantages, group=group, member=member)
    rows.weights = torch.ones(len(rows), dtype=F64)
    return rows


def frozen(found, rows, points, velocities=VELOCITIES):
    """What freeze() gives at each point of these rows, where velocities are these everywhere."""

    def predict(micros, name="policy"):
        return [[velocities[name][: len(m.rows)] for _ in m.points] for m in micros]

    values = found.freeze([Micro(rows, points, None, [None] * len(points))], predict)
    return [{name: of[0][k] for name, of in values.items()} for k in range(len(points))]


def loss_and_gradient(found, advantages=(1.5, -0.5), velocities=VELOCITIES):
    """The loss of each row, and the gradient of their mean."""
    rows, point = rows_of(advantages), noised()
    (known,) = frozen(found, rows, [point], velocities)
    velocity = velocities["policy"].clone().requires_grad_()
    loss = found.loss(velocity, known, rows, point)
    loss.value.mean().backward()
    return loss, velocity.grad


def value(name, advantages=(1.5, -0.5), **keys):
    return loss_and_gradient(objective(name, **keys), advantages)[0].value.detach()


@pytest.mark.parametrize("weighting", RATIOS)
def test_awm_has_this_ratio_by_each_weighting(weighting):
    loss, _ = loss_and_gradient(objective("awm", awm__weighting=weighting))
    close(loss.stats["ratio"], RATIOS[weighting])


@pytest.mark.parametrize(
    ("weighting", "clip", "mean"),
    [
        ("uniform", 1.0, -0.5091593741),
        ("ghuber", 1.0, -0.5769461532),
        ("uniform", 1e-5, -0.4990682400),
        ("ghuber", 1e-5, -0.4922463907),
    ],
)
def test_awm_has_this_loss(weighting, clip, mean):
    close(value("awm", awm__weighting=weighting, awm__clip_range=clip).mean(), mean)


def test_awm_takes_another_power_and_divides_its_advantages_by_their_bound():
    keys = {"train__adv_clip_max": 1.5, "sample__global_std": False}
    found = objective("awm", awm__power=0.5, awm__clip_range=0.0, **keys)
    loss, _ = loss_and_gradient(found)
    close(loss.stats["ratio"], [each**2 for each in RATIOS["huber"]])  # 1 / power
    scores = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=F64)
    advantages, _ = found.targets(scores, torch.zeros(4, dtype=torch.int64))
    close(advantages * 1.5, [-0.5772169666, 1.5, -0.5772169666, -0.5772169666])


@pytest.mark.parametrize("weighting", [*RATIOS, "adaptive"])
def test_every_weighting_rises_with_the_error(weighting):
    scale = torch.linspace(0.1, 3, 50, dtype=F64)[:, None]
    rows, point = rollout(torch.zeros(50, 4, dtype=F64), (0.0,) * 50), noised()
    sigma = torch.full((50,), SIGMA, dtype=F64)
    point.noise, point.sigma = torch.zeros(50, 4, dtype=F64), sigma
    errors = weighted_error(weighting, scale * V[:1], rows, point)
    assert (errors.diff() > 0).all()


@pytest.mark.parametrize(
    ("weighting", "slope"),
    [
        ("uniform", lambda e: 1),
        ("t", lambda e: SIGMA),
        ("t2", lambda e: SIGMA**2),
        ("huber", lambda e: SIGMA / 2 * (e + 1e-10) ** -0.5),
        ("ghuber", lambda e: SIGMA * (e + 1e-10) ** -0.75),
    ],
)
def test_a_weighting_has_this_slope_in_the_matching_error(weighting, slope):
    velocity = V.clone().requires_grad_()
    weighted_error(weighting, velocity, rollout(), noised()).sum().backward()
    error = ((V - TARGET) ** 2).mean(1, keepdim=True)
    close(velocity.grad, slope(error) * 2 * (V - TARGET) / 4)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [-1.539518899714, 0.503430834705]),
        ({"vgrpo__clip_range": 0.005}, [-1.5075, 0.503430834705]),
        ({"vgrpo__clip_range": 0.0, "vgrpo__old_beta": 0.3}, [-1.539300199714, 0.503576634705]),
    ],
)
def test_vgrpo_has_this_loss(keys, expected):
    close(value("vgrpo", **keys), expected)


def test_vgrpos_advantages_may_be_bounded_by_a_tanh():
    scores, group = torch.tensor([0, 1, 0, 0], dtype=F64), torch.zeros(4, dtype=torch.int64)
    plain, _ = objective("vgrpo", sample__global_std=False).targets(scores, group)
    bounded, _ = objective("vgrpo", sample__global_std=False, vgrpo__squash=3.0).targets(
        scores, group
    )
    close(bounded, 3 * torch.tanh(plain / 3))


@pytest.mark.parametrize("clip", [0.0, 0.005])
def test_an_image_of_several_noisings_has_one_ratio_and_its_exact_gradient(clip):
    found, rows = objective("vgrpo", vgrpo__clip_range=clip, vgrpo__old_beta=0.3), rows_of()
    points, shift = [noised(), noised()], 0.1 * NOISE
    points[1].sigma = points[1].sigma / 2
    at = [VELOCITIES, {name: each + shift for name, each in VELOCITIES.items()}]

    def predict(micros, name="policy"):
        return [[of[name] for of in at]]

    values = found.freeze([Micro(rows, points, None, [None, None])], predict)
    velocities = [of["policy"].clone().requires_grad_() for of in at]
    losses = []
    for k, velocity in enumerate(velocities):
        known = {name: of[0][k] for name, of in values.items()}
        losses.append(found.loss(velocity, known, rows, points[k]).value)
    (sum(losses) / 2).mean().backward()

    ours = [of["policy"].clone().requires_grad_() for of in at]
    sigmas = [point.sigma[:, None] for point in points]
    new, old = (
        sum(adaptive(s * (v - TARGET)) for s, v in zip(sigmas, of, strict=True)) / 2
        for of in (ours, [each["old"] for each in at])
    )
    ratio, advantages = (old - new).exp(), rows.advantages
    bound = clip or math.inf
    clipped = advantages * ratio.clamp(1 - bound, 1 + bound)
    whole = -torch.minimum(advantages * ratio, clipped)
    kl = sum(
        ((s * (v - each["old"])) ** 2).mean(1) for s, v, each in zip(sigmas, ours, at, strict=True)
    )
    whole = whole + 0.3 * kl / 2
    whole.mean().backward()
    close(sum(losses).detach() / 2, whole.detach(), atol=1e-12)
    for one, other in zip(velocities, ours, strict=True):
        close(one.grad, other.grad, atol=1e-12)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [0.157344827586, -0.054375]),
        ({"epg__weighting": "uniform"}, [0.038025, -0.0145]),
        ({"epg__proximal": 0.3}, [0.157563527586, -0.0542292]),
    ],
)
def test_epg_has_this_loss(keys, expected):
    close(value("epg", **keys), expected)


def test_ram_has_this_loss_and_gradient():
    loss, gradient = loss_and_gradient(objective("ram"))
    close(loss.value.detach(), [0.0465625, 0.01025])
    close(gradient, [[0.01875, -0.05625, 0.05, 0.075], [0.0175, -0.025, -0.015, 0.0375]])
    close(value("ram", ram__scale=2.0), [0.205225, 0.03375])


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, 0.035303368866),
        ({"crd__beta": 0.1}, 0.484155370812),
        ({"crd__temperature": 0.05}, 0.068112525601),
        ({"crd__temperature": 1e-9}, 0.0706067377),  # the best and the worst as centres
        ({"crd__loss": "cross_entropy"}, 3.46390048432),
    ],
)
def test_crd_has_this_loss(keys, expected):
    loss, _ = loss_and_gradient(objective("crd", **keys))
    close(loss.value.detach(), expected)
    close(loss.stats["implicit_reward"], [0.043341427878, 0.011397058824])


def test_crds_pull_to_the_reference_grows_with_the_reward():
    plain, pulled = value("crd"), value("crd", forward__kl_beta=0.1)
    close(pulled - plain, [1.28444125e-04, 5.63187500e-05])
    pulled = value("crd", forward__kl_beta=0.1, crd__least_pull=1.0)
    close(pulled - plain, [0.1 * 0.001975, 0.1 * 0.00125])


def test_dgpo_has_this_weight_and_loss():
    loss, _ = loss_and_gradient(objective("dgpo"), (1.0, -1.0))
    close(loss.stats["group_weight"], 0.4313733772738)
    close(loss.value.detach(), [0.010935315114, -0.012509827941])
    close(loss.value.detach().mean(), -7.872564135e-4)


def test_dgpos_exact_loss_of_a_pair_is_dpos_and_its_gradient_beta_times_ours():
    found, rows, point = objective("dgpo", dgpo__beta=20.0), rows_of((1.0, -1.0)), noised()
    exact, dpo = V.clone().requires_grad_(), objective("dpo", train__beta=20.0)
    loss = dpo.loss(exact, {"reference": V_REF}, rows, point).value
    loss.mean().backward()
    _, coded = loss_and_gradient(found, (1.0, -1.0))
    close(20.0 * coded, exact.grad)
    # -log sigmoid(-S), S = beta / G sum A (e - e_ref)
    moved = ((V - TARGET) ** 2).mean(1) - ((V_REF - TARGET) ** 2).mean(1)
    total = 20.0 / 2 * (moved[0] - moved[1])
    close(loss.detach(), -torch.nn.functional.logsigmoid(-total))


def test_at_the_reference_a_group_weighs_one_half():
    at = VELOCITIES | {"policy": V_REF}
    loss, _ = loss_and_gradient(objective("dgpo"), velocities=at)
    close(loss.stats["group_weight"], 0.5)


@pytest.mark.parametrize(("clip", "kept"), [(1e-3, [0, 1]), (0.02, [1, 1])])
def test_dgpo_drops_the_gradient_of_rows_that_went_on_where_they_were_pushed(clip, kept):
    loss, gradient = loss_and_gradient(objective("dgpo", dgpo__clip_range=clip), (1.0, -1.0))
    assert gradient.ne(0).any(1).int().tolist() == kept
    close(loss.value.detach(), [0.010935315114, -0.012509827941])
    assert loss.stats["clipped"].tolist() == [1 - each for each in kept]


@pytest.mark.parametrize(
    ("name", "keys", "times", "error"),
    [
        ("nft", {"nft__kl_beta": 0.0}, 1, "adaptive"),
        ("awm", {"awm__weighting": "ghuber"}, 1, "ghuber"),
        ("awm", {"awm__weighting": "t2", "awm__clip_range": 1e-5}, 1, "t2"),
        ("vgrpo", {}, 1, "adaptive"),
        ("epg", {}, 1, "adaptive"),
        ("epg", {"epg__weighting": "huber", "epg__proximal": 2.0}, 1, "huber"),
        ("ram", {"ram__scale": 3.0}, 3, "uniform"),
        ("crd", {}, 1, "unit"),
        ("crd", {"crd__beta": 0.2}, 1, "unit"),
        ("dgpo", {}, 0.5, "uniform"),
    ],
)
def test_at_the_start_the_gradient_is_the_advantage_times_that_of_the_matching_loss(
    name, keys, times, error
):
    start = dict.fromkeys(VELOCITIES, V_OLD)
    advantages = torch.tensor([1.5, -1.5], dtype=F64)  # that sum to 0, as those of a group do
    _, gradient = loss_and_gradient(objective(name, **keys), tuple(advantages.tolist()), start)
    velocity = V_OLD.clone().requires_grad_()
    if error == "unit":
        matching = adaptive(velocity - TARGET)
    else:
        matching = weighted_error(error, velocity, rollout(), noised())
    (times * advantages * matching).mean().backward()
    close(gradient, velocity.grad, atol=1e-12)
    assert gradient.ne(0).all()


@pytest.mark.parametrize("name", ["nft", *NEW])
def test_without_an_advantage_there_is_no_gradient_at_the_start(name):
    start = dict.fromkeys(VELOCITIES, V_OLD)
    _, gradient = loss_and_gradient(objective(name), (0.0, 0.0), start)
    close(gradient, 0.0, atol=1e-15)


def test_a_groups_sums_do_not_depend_on_ranks_or_micro_batches():
    generator = torch.Generator().manual_seed(0)
    group, member = [i // 5 for i in range(20)], [i % 5 for i in range(20)]
    rows = rollout(torch.zeros(20, 4), (0.0,) * 20, group, member)
    rows.weights = torch.ones(20)
    rows.weights[3] = 0
    values = torch.randn(20, 2, generator=generator)

    def summed(parts, gather):
        micros = [Micro(rows.rows(part), [noised()] * 2, None, []) for part in parts]
        of = {"a": [list(values[part].T) for part in parts]}
        return [torch.stack(columns, 1) for columns in group_sums(micros, of, gather)["a"]]

    (whole,) = summed([slice(0, 20)], lambda mine: [mine])
    kept = rows.weights[:, None] * values
    expected = torch.stack([kept[i : i + 5].double().sum(0) for i in (0, 5, 10, 15)])
    close(whole, expected.repeat_interleave(5, 0).float(), atol=1e-6)
    sent = {}
    ranks = ([slice(0, 3), slice(3, 11)], [slice(11, 20)])
    for rank, parts in enumerate(ranks):
        summed(parts, lambda mine, rank=rank: sent.update({rank: mine}) or [mine])
    again = [summed(parts, lambda mine: [sent[1], sent[0]]) for parts in ranks]
    assert torch.equal(torch.cat([part for of_rank in again for part in of_rank]), whole)


@pytest.mark.parametrize("selects", [False, True])
def test_every_update_has_whole_groups_and_a_row_stays_on_its_rank(selects):
    group = torch.tensor([n // 4 for n in range(24)])
    rows = RowTable(
        group=group,
        member=torch.arange(24) % 4,
        rank=torch.tensor([n // 6 % 2 for n in range(24)]),  # which cuts two groups
        leaf=torch.ones(24, dtype=torch.bool),
        parent=torch.full((24,), -1),
        steps=torch.zeros(24, 0, dtype=torch.int64),
        branch=torch.full((24,), -1),
    )
    scores = torch.arange(24).double() % 4
    scores[:4] = 1.0
    scores[9] = torch.nan
    found = objective("dgpo", train__drop_equal_groups=selects)
    plan = plan_of(6, 4, num_micro_batches=4, num_updates=2, world_size=2)
    (updates,) = found.arrange(scores, rows, plan, 0).updates
    trained = torch.isin(group, torch.arange(1, 6)) & ~scores.isnan() if selects else group >= 0
    seen = []
    for of_ranks in updates:
        assert len(of_ranks[0]) == len(of_ranks[1])
        for rank, micros in enumerate(of_ranks):
            assert all((rows.rank[micro[micro >= 0]] == rank).all() for micro in micros)
        numbers = [n for of_rank in of_ranks for micro in of_rank for n in micro[micro >= 0]]
        whole = torch.isin(group, group[numbers]) & trained
        assert sorted(numbers) == whole.nonzero().flatten().tolist() and len(numbers) >= 7
        seen += numbers
    assert sorted(seen) == trained.nonzero().flatten().tolist()


def test_a_fast_average_may_roll_out_and_be_compared_with():
    found = objective("dgpo", dgpo__fast_from=3, dgpo__reference="fast")
    assert [found.samples_with(0, n) for n in (0, 2, 3, 9)] == ["policy"] * 2 + ["fast"] * 2
    assert found.snapshots == ("fast",)
    drawn_alone = objective("dgpo", dgpo__fast_from=3)
    assert drawn_alone.snapshots == ("reference", "fast") and drawn_alone.passes(0).frozen == 8
    at = VELOCITIES | {"fast": V_REF, "reference": V}
    loss, _ = loss_and_gradient(found, (1.0, -1.0), at)
    close(loss.stats["group_weight"], 0.4313733772738)


def test_the_ratio_of_velocities_norms_is_measured_and_its_excess_costs():
    plain, _ = loss_and_gradient(objective("ram"))
    close(plain.stats["norm_ratio"], [0.991820379345, 1.01984662865])
    guarded, gradient = loss_and_gradient(objective("ram", forward__norm_beta=0.2))
    close(guarded.value.detach() - plain.value.detach(), [0, 0.2 * 0.000338990436])
    _, usual = loss_and_gradient(objective("ram"))
    assert torch.equal(gradient[0], usual[0]) and not torch.equal(gradient[1], usual[1])


def test_a_win_rate_is_the_share_of_its_group_that_a_row_beats():
    scores = torch.tensor([0.2, 0.9, 0.2, math.nan, 3.0, 5.0, 1.0], dtype=F64)
    group = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    expected = [0.25, 1.0, 0.25, math.nan, 0.0, 1.0, math.nan]
    torch.testing.assert_close(
        win_rate(scores, group), torch.tensor(expected, dtype=F64), equal_nan=True
    )


def test_images_are_uncertain_whose_place_others_see_lower():
    scores = torch.tensor([0.0, 1, 2, 3, 0, 1, 2, math.nan], dtype=F64)
    group = torch.tensor([0] * 4 + [1] * 4)
    other = torch.tensor([3.0, 1, 2, 0, 0, 2, 1, 9], dtype=F64)
    third = torch.tensor([0.0, 1, 2, 3, 0, 1, 2, 3], dtype=F64)
    # the excess of win rates: -1, 0, 0, 1; 0, -1/2, 1/2
    assert overrated(scores, [other], group, 2 / 7).nonzero().flatten().tolist() == [3, 6]
    assert overrated(scores, [other, third], group, 1 / 7).nonzero().flatten().tolist() == [3]
    assert overrated(scores, [third], group, 0.0).sum() == 0
    assert overrated(scores, [third], group, 1.0).tolist() == [1] * 7 + [0]


def test_the_kl_holds_uncertain_images_alone():
    found, rows, point = objective("ram", forward__kl_beta=0.2), rows_of(), noised()
    (known,) = frozen(found, rows, [point])
    plain = found.loss(V, known, rows, point)
    rows.uncertain = torch.tensor([0.0, 1.0], dtype=F64)
    held = found.loss(V, known, rows, point)
    close(plain.value - held.value, [0.2 * 0.001975, 0])
    assert torch.equal(held.stats["kl"], plain.stats["kl"])


def test_uncertain_images_are_those_of_the_run_that_a_reward_of_weight_0_sees_lower(
    files, tmp_path
):
    rewards = {"jpeg_incompressibility": 1.0, "jpeg_compressibility": 0.0}
    keys = {"forward__uncertain": 0.25, "reward_fn": rewards, "logdir": tmp_path}
    run = running.prepare(running.arguments(files, objective="ram", train__cfg=False, **keys))
    sampled = collect.roll_out(run, 0)
    scores = collect.score(run, sampled)
    collect.weigh(run, sampled, scores, 0)
    marked, group = sampled.rollout.uncertain, sampled.rollout.batch.group
    best = torch.from_numpy(scores["avg"]).reshape(-1, 4).argmax(1)
    assert marked.sum() == 4 == len(group.unique())
    assert marked.reshape(-1, 4).argmax(1).tolist() == best.tolist()


def test_uncertainty_needs_a_second_opinion():
    config = base("ram")
    config.forward.uncertain = 0.1
    with pytest.raises(ValueError, match="config.forward.uncertain=0.1 compares .* 'pickscore'"):
        find("ram").check(config, SD3)
    with config.unlocked():
        config.reward_fn = {"jpeg_compressibility": 1.0, "pickscore": 0.0}
    find("ram").check(config, SD3)
    config.sample.source = "data"
    with pytest.raises(ValueError, match="config.sample.source='data' asks none"):
        find("ram").check(config, SD3)


def test_every_loss_that_has_a_reference_measures_the_ratio_of_norms():
    known, rows = {"reference": V_REF, "old": V_OLD}, rows_of((1.0, -1.0))
    for name, keys in (("dpo", {}), ("sft", {"train__beta": 0.1}), ("nft", {"nft__kl_beta": 0.1})):
        loss = objective(name, **keys).loss(V, known, rows, noised())
        close(loss.stats["norm_ratio"], [0.991820379345, 1.01984662865])
    for name in ("grpo", "grpo_guard", "flow_dppo"):
        found, drawn = ratio.objective(name=name, beta=0.1), ratio.fixture()
        loss, _ = ratio.loss_and_gradient(found, drawn, 2 * V_REF, V_REF)
        close(loss.stats["norm_ratio"], 2.0)


@pytest.mark.parametrize("name", NEW[:4])
def test_what_a_loss_is_anchored_to_is_held_and_pulls(name):
    plain = objective(name)
    anchored = objective(name, forward__kl_beta=0.2, forward__ema_beta=0.3)
    assert set(anchored.snapshots) - set(plain.snapshots) >= {"fast"}
    assert {"fast", "reference"} <= set(anchored.snapshots)
    loss, gradient = loss_and_gradient(anchored)
    usual, pull = loss_and_gradient(plain)
    added = 0.2 * torch.tensor([0.001975, 0.00125]) + 0.3 * torch.tensor([0.002025, 0.00135])
    close(loss.value.detach() - usual.value.detach(), added.double())
    close(gradient - pull, (0.2 * (V - V_REF) + 0.3 * (V - V_OLD)) / 4)


def test_the_fast_average_and_the_reference_move_with_updates_and_the_old_policy_with_epochs():
    keys = {"forward__ema_beta": 1.0, "forward__kl_beta": 1.0, "forward__reset_every": 2}
    found, moves = objective("epg", **keys, forward__decay="rising", epg__proximal=1.0), Moves()
    assert found.samples_with(0, 0) == "old"
    for done in (1, 2):
        found.after_update(moves, done, {})
    found.after_epoch(moves, 2)
    assert moves.seen == [
        ("fast", pytest.approx(0.001)),
        ("fast", pytest.approx(0.002)),
        ("reference", 0.0),
        ("old", pytest.approx(0.26)),
    ]
    moves.seen.clear()
    found.after_update(moves, 1000, {})
    assert moves.seen[0] == ("fast", 0.3)


def test_the_reference_becomes_the_policy_where_it_is_too_far():
    keys = {"forward__kl_beta": 1.0, "forward__reset_every": 3, "forward__reset_kl": 0.2}
    found, moves = objective("epg", **keys), Moves()
    for done, kl in ((1, 0.1), (2, 0.3), (3, 0.1), (4, 0.2)):
        found.after_update(moves, done, {"kl": kl})
    assert moves.seen == [("reference", 0.0)] * 2
    config = base("epg")
    config.forward.reset_kl = 0.2
    with pytest.raises(ValueError, match="reset_kl=0.2 .* config.forward.kl_beta=0"):
        find("epg").check(config, SD3)


def test_a_slow_old_policy_rolls_out_for_losses_that_do_not_compare_with_it():
    assert objective("ram").snapshots == ("reference",)
    found = objective("ram", forward__decay="slow")
    assert found.snapshots == ("old", "reference") and found.samples_with(0, 0) == "old"
    assert set(frozen(found, rows_of(), [noised()])[0]) == {"reference"}


@pytest.mark.parametrize("name", ["nft", "awm", "vgrpo", "crd"])
def test_no_forward_is_made_of_an_old_policy_that_is_the_policy(name):
    keys = {"nft__decay": "on_policy"} if name == "nft" else {"forward__decay": "on_policy"}
    found = objective(name, **keys)
    found.after_epoch(Moves(), 12)
    rows, point, asked = rows_of(), noised(), []

    def predict(micros, name="policy"):
        asked.append(name)
        return [[V_OLD for _ in m.points] for m in micros]

    micro = Micro(rows, [point], None, [None])
    first = found.freeze([micro], predict)
    assert not {"old", "policy"} & set(asked)
    known = {key: of[0][0] for key, of in first.items()}
    saved = found.loss(V_OLD.clone().requires_grad_(), known, rows, point)
    found.after_update(Moves(), 13, {})
    second = found.freeze([micro], predict)
    assert "old" in asked
    known = {key: of[0][0] for key, of in second.items()}
    made = found.loss(V_OLD.clone().requires_grad_(), known, rows, point)
    assert torch.equal(saved.value, made.value)
    assert saved.stats.keys() == made.stats.keys()
    found.after_epoch(Moves(), 13)
    asked.clear()
    found.freeze([micro], predict)
    assert "old" not in asked


@pytest.mark.parametrize("kind", ["half", "slow", "rising"])
def test_an_old_policy_that_lags_is_asked_in_a_first_update_too(kind):
    found = objective("awm", forward__decay=kind)
    assert "old" in frozen(found, rows_of(), [noised()])[0]
    found.after_epoch(Moves(), 9)
    assert "old" in frozen(found, rows_of(), [noised()])[0]
    assert DECAYS.keys() == {"on_policy", "half", "slow", "rising"}


def test_the_passes_that_a_plan_counts_leave_out_what_is_known():
    sample = {"sample__num_batches_per_epoch": 4, "train__gradient_accumulation_steps": 2}
    one = {**sample, "forward__num_times": 3}
    assert objective("awm", **one).passes(0)[:4] == (3, 1.5, 0, 1)  # the second of two updates
    assert objective("awm", **one, forward__decay="slow").passes(0)[:4] == (3, 3, 0, 1)
    assert objective("vgrpo", **one).passes(0)[:4] == (3, 3, 0, 1)
    assert objective("ram", **one).passes(0) == (3, 3, 0, 1, (3, 0))
    assert objective("dgpo", **one, forward__antithetic=True).passes(0) == (6, 12, 0, 1, (6, 0))
