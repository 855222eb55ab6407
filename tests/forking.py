"""Processes that start fast: forked from one that has loaded the libraries and none of our code."""

from multiprocessing import get_context

LIBRARIES = [
    "accelerate",
    "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "peft",
    "pytest",
]
FORKED = get_context("forkserver")
FORKED.set_forkserver_preload(LIBRARIES)
