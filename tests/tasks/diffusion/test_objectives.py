"""The losses, against diffusers' schedulers and their papers."""

import diffusers
import pytest
import torch

from lora_plugins import ConfigError
from lora_plugins.tasks.diffusion.objectives import objective_of, with_offset

SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def objective(scheduler, prediction="auto", gamma=None):
    return objective_of(scheduler, prediction, gamma)


def latents(seed=0):
    return torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_noise_and_target_are_those_of_diffusers(prediction, kind):
    given = getattr(diffusers, kind)(prediction_type=prediction, **SCALED)
    reference = diffusers.DDPMScheduler(prediction_type=prediction, **SCALED)
    clean, noise = latents(), latents(1)
    found = objective(given)(clean, noise)
    torch.testing.assert_close(found.latents, reference.add_noise(clean, noise, found.times))
    target = noise if prediction == "epsilon" else reference.get_velocity(clean, noise, found.times)
    torch.testing.assert_close(found.target, target)
    assert torch.equal(found.weights, torch.ones(6))


def test_flow_matching_is_that_of_diffusers():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    clean, noise = latents(), latents(1)
    found = objective(scheduler)(clean, noise)
    spread = (found.times / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(found.latents, (1 - spread) * clean + spread * noise)
    # One Euler step from there to time 0 along the target is the clean picture.
    torch.testing.assert_close(found.latents - spread * found.target, clean)
    assert bool((found.times > 0).all() and (found.times < 1000).all())


@pytest.mark.parametrize(
    "flow",
    [
        lambda shift: diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
        lambda shift: diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        ),
        lambda shift: diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        ),
    ],
    ids=["euler", "dpm", "unipc"],
)
def test_shifted_times_are_noisier(flow):
    means = []
    for shift in (1.0, 3.0):
        torch.manual_seed(0)
        scheduler = flow(shift)
        many = torch.zeros(2000, 1, 1, 1)
        means.append(float(objective(scheduler)(many, many).times.mean()))
    assert means[0] == pytest.approx(500, abs=15)
    assert means[1] > 650


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_times_are_those_that_the_scheduler_has_for_training(dynamic):
    """Which diffusers' scripts draw from: shifted, unless the size of the picture says how much (Flux)."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    torch.manual_seed(0)
    drawn = torch.sigmoid(torch.randn(50))
    expected = scheduler.timesteps[(1000 * (1 - drawn)).long()]  # which stand in falling order
    torch.manual_seed(0)
    found = objective(scheduler)(torch.zeros(50, 1, 1, 1), torch.zeros(50, 1, 1, 1))
    torch.testing.assert_close(found.times, expected, rtol=0, atol=3)  # one of 1000 times, three apart when shifted


def test_a_solver_that_samples_with_a_shift_has_it_for_training():
    solver = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    assert objective(solver) == objective(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_the_paper(prediction):
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction, **SCALED)
    times = torch.tensor([0, 10, 500, 999])
    share = scheduler.alphas_cumprod[times].double()
    ratio = share / (1 - share)
    expected = ratio.clamp(max=5) / (ratio if prediction == "epsilon" else ratio + 1)
    torch.testing.assert_close(objective(scheduler, gamma=5.0).weights(times).double(), expected, rtol=1e-5, atol=0)


def test_min_snr_weighs_pure_noise_as_what_is_nearly_so():
    scheduler = diffusers.DDPMScheduler(rescale_betas_zero_snr=True, **SCALED)
    assert scheduler.alphas_cumprod[-1] == 0
    assert objective(scheduler, gamma=5.0).weights(torch.tensor([998, 999])).tolist() == [1, 1]
    scheduler = diffusers.DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", **SCALED)
    assert objective(scheduler, gamma=5.0).weights(torch.tensor([999])).tolist() == [0]


@pytest.mark.parametrize("kind", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "IPNDMScheduler"])
def test_schedules_without_betas_are_refused(kind):
    with pytest.raises(ConfigError, match=f"a {kind}, whose noise follows no schedule of betas"):
        objective(getattr(diffusers, kind)())


def test_offset_noise_is_the_same_in_all_pixels():
    noise = latents()
    added = with_offset(noise, 0.1) - noise
    assert bool((added.amax((2, 3)) - added.amin((2, 3)) < 1e-6).all())
    assert added.std() > 0.01
    assert with_offset(noise, 0.0) is noise


def test_bad_choices_are_named():
    ddpm, flow = diffusers.DDPMScheduler(**SCALED), diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ConfigError, match=r"'epsilom'.*'epsilon'"):
        objective(ddpm, "epsilom")
    with pytest.raises(ConfigError, match="flow matching has no"):
        objective(flow, gamma=5.0)
    with pytest.raises(ConfigError, match="flow matching has no"):
        objective(flow, "epsilon")
    with pytest.raises(ConfigError, match="min_snr_gamma is 0"):
        objective(ddpm, gamma=0)
    with pytest.raises(ConfigError, match="'sample'"):
        objective(diffusers.DDPMScheduler(prediction_type="sample", **SCALED))
