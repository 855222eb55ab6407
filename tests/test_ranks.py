"""Two ranks, each with half the rows, against one rank with all of them: the toy of toy.py."""

import os
from pathlib import Path

import torch
from forking import ON_CPU, on_ranks
from toy import make_run, plan_of, roll_out, weigh

from flow_grpo.training import loop

NUM_GROUPS, GROUP_SIZE = 3, 8  # the second group lies on both ranks
MISSING = [1, 2, 3, 5, 20]  # rows without a score: the ranks' weights differ


def one_update(folder):
    """Sample, score and update once with this rank's share of the rows; saves what came out."""
    update_once(folder, sample__sde_window_size=2, train__learning_rate=1.0)


def update_once(folder, num_updates=1, **keys):
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    run = make_run(
        folder,
        plan_of(NUM_GROUPS, GROUP_SIZE, 6 // num_ranks, num_updates, num_ranks),
        torch.optim.SGD,
        train__max_grad_norm=0.0,
        **keys,
    )
    rollout = roll_out(run)  # of every row: its noise and window know no rank
    scores = -((rollout.final.double() - 1) ** 2).mean(1)
    scores[MISSING] = torch.nan
    share = len(rollout) // num_ranks
    mine = slice(rank * share, (rank + 1) * share)
    rollout_images = rollout.images
    rollout, scores = rollout.rows(mine), scores[mine]
    rollout.images = rollout_images[mine]
    sampled, arranged, metrics = weigh(run, rollout, scores)
    loop.update(run, sampled, arranged, epoch=0)
    shift = run.snapshots.values("policy").popitem()[1]
    found = {name: getattr(rollout, name) for name in ("advantages", "weights", "steps")}
    torch.save({**found, "shift": shift, "metrics": metrics}, Path(folder) / f"{rank}.pt")


FORWARD = {  # whose second update is off policy
    "nft": {"nft__kl_beta": 0.1},
    "awm": {"forward__ema_beta": 0.1},
    "vgrpo": {},
    "epg": {"epg__proximal": 0.1},
    "ram": {"forward__reset_every": 1},
    "crd": {"crd__temperature": 0.05},
    "dgpo": {"forward__kl_beta": 0.1},
}


def forward_updates(folder):
    """The same for each loss on final images, two updates each."""
    for name, keys in FORWARD.items():
        keys = keys | {"objective": name, "sample__noise_level": 0.0, "train__learning_rate": 0.1}
        if name != "nft":
            keys |= {"forward__num_times": 3, "forward__levels": "uniform"}
        (folder / name).mkdir(exist_ok=True)
        update_once(folder / name, num_updates=2, **keys)


def test_two_ranks_train_on_final_images_as_one_does(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    forward_updates(tmp_path / "one")
    on_ranks(2, ON_CPU, forward_updates, tmp_path / "two")
    for name in FORWARD:
        one = torch.load(tmp_path / "one" / name / "0.pt")
        two = [torch.load(tmp_path / "two" / name / f"{rank}.pt") for rank in (0, 1)]
        assert torch.equal(two[0]["shift"], two[1]["shift"]) and one["shift"].any(), name
        torch.testing.assert_close(two[0]["shift"], one["shift"], rtol=1e-5, atol=1e-7, msg=name)


def test_two_ranks_weigh_their_rows_and_update_their_weights_as_one_does(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one_update(tmp_path / "one")
    one = torch.load(tmp_path / "one" / "0.pt")
    on_ranks(2, ON_CPU, one_update, tmp_path / "two")
    two = [torch.load(tmp_path / "two" / f"{rank}.pt") for rank in (0, 1)]
    for name in ("steps", "advantages", "weights"):
        assert torch.equal(torch.cat([rank[name] for rank in two]), one[name]), name
    assert one["weights"].sum() == NUM_GROUPS * GROUP_SIZE - len(MISSING)
    assert two[0]["metrics"] == two[1]["metrics"] == one["metrics"]
    assert torch.equal(two[0]["shift"], two[1]["shift"]) and one["shift"].any()
    torch.testing.assert_close(two[0]["shift"], one["shift"], rtol=1e-5, atol=1e-7)
