"""The shell scripts that launch a run, on one machine and on several."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import running
from waiting import HANG_S

ROOT = Path(__file__).parent.parent
MULTI_NODE = sorted((ROOT / "scripts" / "multi_node").glob("*/main.sh"))
SINGLE_NODE = sorted((ROOT / "scripts" / "single_node").glob("*.sh"))
RUN_AS = r"^ *((?:\w+=\S+ )*)python (scripts/\S+\.py)"  # as a docstring shows it
ALONE = [
    (ROOT / found[2], dict(word.split("=") for word in found[1].split()))
    for path in sorted((ROOT / "scripts").rglob("*.py"))
    if (found := re.search(RUN_AS, path.read_text(), re.MULTILINE))
]


def environment(**more: str) -> dict[str, str]:
    """The environment in which `accelerate` and `python` are those of the tests."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | more


def run(*command: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", *command], env=environment(**env), cwd="/", capture_output=True, text=True
    )


def options(command: list[str]) -> dict[str, str]:
    return {k: v for k, v in zip(command, command[1:], strict=False) if k.startswith("--")}


@pytest.mark.parametrize("script", MULTI_NODE, ids=lambda path: path.parent.name)
def test_a_machine_launches_its_share(script):
    env = {"MASTER_ADDR": "10.0.0.1", "NUM_NODES": "3", "NUM_GPUS": "8", "DRY_RUN": "1"}
    done = run(str(script), "2", "--config.seed=7", **env)
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    said = options(command)
    assert said["--num_machines"] == "3" and said["--machine_rank"] == "2"
    assert said["--num_processes"] == "24"  # of all machines together
    assert said["--main_process_ip"] == "10.0.0.1" and said["--main_process_port"] == "29500"
    assert (ROOT / said["--config_file"]).is_file()
    (target,) = (part for part in command if part.endswith(".py"))
    assert (ROOT / target).is_file() and command[-1] == "--config.seed=7"
    path, _, name = said["--config"].partition(":")
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE)


FAKES = {  # of Slurm: three nodes, whose tasks run here, one after the other
    "scontrol": 'echo "$3" | tr "," "\\n"',
    "srun": 'for id in 0 1 2; do SLURM_NODEID=$id "${@:2}"; done',
}


def test_a_slurm_job_calls_the_same_script_on_each_node(tmp_path):
    for name, lines in FAKES.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    env = environment(NUM_GPUS="8", DRY_RUN="1", SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID="123456")
    env |= {"SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "gpu7,gpu8,gpu9"}
    slurm, main = (ROOT / "scripts/multi_node" / name for name in ("slurm.sh", "flux/main.sh"))
    job = run(
        str(slurm), "flux", "--config.run_name=a b", **env | {"PATH": f"{tmp_path}:{env['PATH']}"}
    )
    env |= {"MASTER_ADDR": "gpu7", "MASTER_PORT": "23456", "NUM_NODES": "3"}
    more = ["--config.resume_from=auto", "--config.run_name=a b"]
    assert job.stdout == "".join(run(str(main), str(n), *more, **env).stdout for n in range(3))
    assert job.stdout.count("--machine_rank 2") == 1 and job.returncode == 0


def test_deepspeed_is_launched_without_pdsh():
    env = {"MASTER_ADDR": "10.0.0.1", "NUM_NODES": "2", "NUM_GPUS": "8", "DRY_RUN": "1"}
    script = str(ROOT / "scripts" / "multi_node" / "launch.sh")
    done = run(script, "0", "flux", ACCELERATE_CONFIG="deepspeed_zero2", **env)
    assert options(shlex.split(done.stdout))["--deepspeed_multinode_launcher"] == "standard"


@pytest.mark.parametrize(
    "arguments, env, complaint",
    [
        (["2", "sd3"], {}, "RANK=2: a number from 0 to 1 is needed"),
        (["zero", "sd3"], {}, "RANK=zero: a number"),
        (["0", "sd4"], {}, "there is no scripts/train_sd4.py"),
        (["0", "sd3"], {"MASTER_ADDR": ""}, "usage: MASTER_ADDR=HOST"),
        ([], {}, "usage: MASTER_ADDR=HOST"),
    ],
)
def test_a_wrong_launch_is_refused_at_once(arguments, env, complaint):
    script = str(ROOT / "scripts" / "multi_node" / "launch.sh")
    done = run(script, *arguments, **({"MASTER_ADDR": "10.0.0.1", "NUM_NODES": "2"} | env))
    assert done.returncode != 0 and complaint in done.stderr


@pytest.mark.parametrize("script", SINGLE_NODE, ids=lambda path: path.stem)
def test_a_single_machines_script_launches_its_model(script):
    done = run(str(script), "--config.seed=7", NUM_GPUS="8", DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    said = options(command)
    assert said["--num_processes"] == "8" and (ROOT / said["--config_file"]).is_file()
    model = script.stem.partition("_")[2] or "sd3"
    assert command[-1] == "--config.seed=7"
    (target,) = (part for part in command if part.endswith(".py"))
    assert (ROOT / target).is_file() and Path(target).stem.startswith(f"train_{model}")


@pytest.mark.slow
def test_two_machines_train_together(files, tmp_path):
    """Two launches on this machine, a process each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = str(ROOT / "scripts" / "multi_node" / "launch.sh")
    arguments = running.arguments(files, num_epochs=1, run_name="two", logdir=tmp_path)[1:]
    env = environment(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        NUM_NODES="2",
        NUM_GPUS="1",
        ACCELERATE_USE_CPU="true",
        GLOO_SOCKET_IFNAME="lo",
    )
    machines = [
        subprocess.Popen(
            ["bash", script, str(rank), "sd3", *arguments],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [machine.communicate(timeout=HANG_S)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert "2 rank(s)" in outputs[0] and "8 groups x 4 = 32 images" in outputs[0]
    assert (tmp_path / "two" / "checkpoints" / "checkpoint-2" / "trainer.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("script", "given"), ALONE, ids=lambda part: getattr(part, "stem", ""))
def test_a_script_starts_as_its_docstring_says(script, given):
    """Alone, where nothing but what is installed can be imported."""
    without = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    command = [sys.executable, script.relative_to(ROOT), "--help"]
    done = subprocess.run(command, env=without | given, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
