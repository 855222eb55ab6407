"""Keys that trade time for memory, or one kernel for another, and leave the mathematics alone."""

from __future__ import annotations

import math

import pytest
import running
import tiny
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from tiny import LENGTH, prompt_batch

from config.base import base
from flow_grpo import records
from flow_grpo.conditioning import collate
from flow_grpo.diffusers_patch.flux import Flux
from flow_grpo.launch import build
from flow_grpo.parallel import speed
from flow_grpo.records import Size
from flow_grpo.training import snapshots

SIGN = 'a sign that says "Grüße 42"'
MODELS = pytest.mark.parametrize("name", list(tiny.MODELS))
VAES = pytest.mark.parametrize("name", ["sd3", "flux2_klein", "qwenimage", "wan", "wan2_2"])


def size_of(name: str) -> Size:
    return Size(64, 64, 5 if name.startswith("wan") else 1)


def noise_of(model, size: Size, rows: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, *model.noise_shape(size), generator=generator)


def gradients(name: str, checkpointing: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Return the gradient of every weight, and how often a block ran."""
    model, config = tiny.patched(name), base()
    config.activation_checkpointing, config.use_lora = checkpointing, False
    build.add_trained_weights(model, config)
    size, calls = size_of(name), []
    batch = prompt_batch(model, size, [SIGN], [tiny.pictures(name)], model.unguided)
    latents, sigma = model.initial_latents(size, noise_of(model, size)), torch.tensor([0.7])
    inputs = latents, sigma, collate(model, batch, LENGTH)
    block = speed.repeated_blocks(model.transformer)[0]
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    model.velocity(model.transformer, *inputs).square().mean().backward()
    found = model.transformer.named_parameters()
    return {key: p.grad for key, p in found if p.grad is not None}, len(calls)


@MODELS
def test_checkpointed_activations_give_the_same_gradient(name):
    plain, once = gradients(name, checkpointing=False)
    again, twice = gradients(name, checkpointing=True)
    assert plain.keys() == again.keys() and (once, twice) == (1, 2)
    for key, value in plain.items():
        torch.testing.assert_close(
            again[key], value, rtol=0, atol=1e-6 * value.abs().max().item(), msg=key
        )


@VAES
def test_slices_decode_to_the_same_pictures_and_tiles_to_similar_ones(name):
    model, size = tiny.patched(name), size_of(name)
    latents = model.initial_latents(size, noise_of(model, size, rows=2))
    whole = model.decode(latents, size)
    model.pipe.vae.enable_slicing()
    torch.testing.assert_close(model.decode(latents, size), whole, rtol=0, atol=1e-5)
    model.pipe.vae.enable_tiling()
    assert model.decode(latents, size).shape == whole.shape


@pytest.mark.parametrize("objective", ["grpo", "nft"])
def test_what_waits_on_the_host_changes_no_bit(files, tmp_path, monkeypatch, objective):
    waited, on_host = [], records.on_host

    def watched(tensor):
        waited.append(tensor.numel())
        return on_host(tensor)

    monkeypatch.setattr(records, "on_host", watched)
    monkeypatch.setattr(snapshots, "on_host", watched)
    keys = {"objective": objective, "use_lora": False, "train__ema": True, "logdir": tmp_path}
    keys |= {"train__beta": 0.1} if objective == "grpo" else {"nft__kl_beta": 0.1}
    found = []
    for name, offload in (("stays", "()"), ("waits", "('snapshots', 'rollouts')")):
        more = keys | {"run_name": f"{objective}-{name}", "offload": offload}
        found.append(running.train(running.arguments(files, **more)))
        assert bool(waited) == (name == "waits")
    one, other = (running.weights(run.folder) for run in found)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    held = sum(value.numel() for value in found[1].snapshots.state_dict().values())
    finals = 2 * 16 * math.prod(found[1].pipeline.noise_shape(Size(32, 32)))
    assert sum(waited) > held + finals


@pytest.fixture
def backend_restored():
    """Choosing a backend also makes it the process's default."""
    registry = attention_dispatch._AttentionBackendRegistry
    before = registry._active_backend
    yield
    registry._active_backend = before


def chosen_backends(transformer) -> set:
    """What the attention layers were told to take."""
    processors = [
        module.processor
        for module in transformer.modules()
        if isinstance(module, (Attention, AttentionModuleMixin))
    ]
    none = {"torch's"}
    return {getattr(each, "_attention_backend", "torch's") for each in processors} or none


@pytest.mark.usefixtures("backend_restored")
@MODELS
def test_a_model_says_whether_its_attention_can_be_chosen(name):
    model = tiny.patched(name)
    model.transformer.set_attention_backend("_native_math")
    taken = {"_native_math"} if model.has_attention_backends else {"torch's"}
    assert chosen_backends(model.transformer) == taken


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return tiny.save("flux", tmp_path_factory.mktemp("flux"))


@pytest.mark.usefixtures("fresh_logs", "backend_restored")
def test_the_keys_reach_the_model(files, flux):
    keys = {"attention_backend": "_native_math", "vae_tiling": True, "vae_slicing": True}
    keys |= {"sample__batched_guidance": True}
    argv = running.arguments(files, run_name="keys", pretrained__model=flux, **keys)
    run = running.prepare(argv, Flux)
    vae = run.pipeline.pipe.vae
    assert vae.use_tiling and vae.use_slicing and run.pipeline.batches_guidance
    assert chosen_backends(run.pipeline.transformer) == {"_native_math"}


@pytest.mark.usefixtures("fresh_logs")
@pytest.mark.parametrize(
    "name, message", [("fast", "one of diffusers' is needed: flash, "), ("flash", "flash-attn")]
)
def test_a_backend_that_is_unknown_or_not_installed_is_refused(files, flux, name, message):
    argv = running.arguments(files, run_name="no", pretrained__model=flux, attention_backend=name)
    with pytest.raises(ValueError, match=f"config.attention_backend='{name}'.*{message}"):
        running.prepare(argv, Flux)


@pytest.mark.usefixtures("fresh_logs")
def test_a_backend_that_would_not_be_used_is_refused(files):
    with pytest.raises(ValueError, match="config.attention_backend='native': SD3 has no choice"):
        running.prepare(running.arguments(files, run_name="no", attention_backend="native"))
