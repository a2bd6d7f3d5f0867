"""Plans inside stock diffusers pipelines, which know nothing of them, and from several threads and pipelines at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler

from dydit_cli.errors import DyditError
from dydit_cli.execution import DenseExecutor
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.registry import SIT
from tests.tiny import bits, relative_difference, tiny_inputs, tiny_model

SCHEDULERS = [DDIMScheduler, DPMSolverMultistepScheduler]
DTYPES = [torch.float32, torch.bfloat16]


def model_of(dtype: torch.dtype = torch.float32) -> DynamicTransformer:
    return tiny_model(learn_sigma=False).to(dtype).requires_grad_(False).set_execution("compact")


def pipeline_of(
    model: DynamicTransformer,
    scheduler: Callable[[], Any] = DDIMScheduler,
    dtype: torch.dtype = torch.float32,
) -> DiTPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=1).to(dtype).eval()
    pipeline = DiTPipeline(transformer=model, vae=vae, scheduler=scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: DiTPipeline, steps: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = pipeline(
        class_labels=[3, 7],
        num_inference_steps=steps,
        generator=generator,
        output_type="np",
        guidance_scale=1.5,
    ).images
    return torch.from_numpy(images)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_announced_schedule_has_no_misses(scheduler: type, dtype: torch.dtype) -> None:
    model = model_of(dtype)
    pipeline = pipeline_of(model, scheduler, dtype)
    for steps in (4, 7):
        pipeline.scheduler.set_timesteps(steps)
        plan = model.plan(pipeline.scheduler.timesteps, [3, 7, 1000])
        draw(pipeline, steps)
        assert (plan.hits, plan.misses) == (steps, 0)
        assert plan.modulation is not None


def flow_scheduler() -> DPMSolverMultistepScheduler:
    """As an export of a SiT has it."""
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=1, flow_shift=1.0
    )


def flow_model(dtype: torch.dtype) -> DynamicTransformer:
    """A SiT in the convention of pipelines."""
    native = tiny_model("sit", learn_sigma=False)
    model = SIT.pipeline_class(**native.config)
    model.load_state_dict(native.state_dict())
    return model.eval().to(dtype).requires_grad_(False).set_execution("compact")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("announced", [True, False])
def test_flow_matching_in_a_stock_pipeline(dtype: torch.dtype, announced: bool) -> None:
    """Planned are the scheduler's values, the forward's own convention turns them."""
    model = flow_model(dtype)
    pipeline = pipeline_of(model, flow_scheduler, dtype)
    for steps in (4, 7, 4):
        pipeline.scheduler.set_timesteps(steps)
        if announced:
            model.plan(pipeline.scheduler.timesteps, [3, 7, 1000])
        else:
            draw(pipeline, steps)
        plan = model.current_plan
        assert plan is not None
        hits, misses = plan.hits, plan.misses
        first, again = draw(pipeline, steps), draw(pipeline, steps)
        assert (plan.hits - hits, plan.misses - misses) == (2 * steps, 0)
        assert torch.equal(bits(first), bits(again))


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_timesteps_after_a_cast(dtype: torch.dtype) -> None:
    """A pipeline that casts its schedule sends rounded values, two steps perhaps the same: these are planned, and found."""
    model = flow_model(dtype)
    images, _, labels = tiny_inputs(model)
    scheduler = flow_scheduler()
    for steps in (30, 12):
        scheduler.set_timesteps(steps)
        sent = scheduler.timesteps.to(dtype)
        plan = model.plan(sent, labels)
        for t in sent:
            model(images, t.expand(3), labels)
        assert (plan.hits, plan.misses) == (steps, 0)
        assert len(plan) == len(set(sent.tolist()))


@torch.no_grad()
def test_another_batch_size_is_still_planned_and_another_resolution_refused() -> None:
    """The size of a model is fixed by its table of positions; a plan knows nothing of the batch."""
    model = model_of()
    plan = model.plan([500.0], [1, 2, 10])
    for batch in (1, 2, 5):
        model(torch.randn(batch, 4, 8, 8), 500.0, torch.arange(batch) % 3)
    with pytest.raises(DyditError, match="expects inputs of 4x8x8, got 4x16x16") as caught:
        model(torch.randn(1, 4, 16, 16), 500.0, torch.tensor([1]))
    assert "resolution" in caught.value.fix
    model(torch.randn(1, 4, 8, 8), 500.0, torch.tensor([1]))
    assert (plan.hits, plan.misses) == (4, 0)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stock_pipeline_misses_in_its_first_run_alone(scheduler: type, dtype: torch.dtype) -> None:
    model = model_of(dtype)
    pipeline = pipeline_of(model, scheduler, dtype)
    first = draw(pipeline, 5)
    plan = model.current_plan
    assert plan is not None
    assert (plan.hits, plan.misses) == (0, 5)
    again = draw(pipeline, 5)
    assert (plan.hits, plan.misses) == (5, 5)
    assert torch.equal(bits(first), bits(again))
    draw(pipeline, 8)
    misses = plan.misses
    draw(pipeline, 8)
    draw(pipeline, 5)
    assert plan.misses == misses
    assert model.current_plan is plan


def test_what_is_remembered_follows_the_model() -> None:
    model = model_of()
    pipeline = pipeline_of(model)
    draw(pipeline)
    for change in (
        lambda: model.blocks[0].head_router.linear.weight.neg_(),
        lambda: model.load_state_dict(tiny_model(seed=4, learn_sigma=False).state_dict()),
        lambda: pipeline.to(torch.bfloat16),
        lambda: pipeline.to(torch.float32),
    ):
        before = model.current_plan
        change()
        draw(pipeline)
        plan = model.current_plan
        assert plan is not before
        assert plan.misses == 4
        draw(pipeline)
        assert (plan.hits, plan.misses) == (4, 4)


@torch.no_grad()
def test_each_dial_is_remembered_by_itself() -> None:
    model = model_of()
    images, _, labels = tiny_inputs(model)
    for dial in (0.0, 1.0, -1.0, 1.0):
        model.set_keep_bias(dial)
        dense, _ = model.denoise(images, 500.0, labels, executor=DenseExecutor())
        assert relative_difference(model(images, 500.0, labels).sample, dense) < 1e-5
    assert (model.current_plan.hits, model.current_plan.misses) == (1, 3)


@torch.no_grad()
def test_a_batch_of_mixed_timesteps_is_known_if_each_of_them_is() -> None:
    model = model_of()
    images, times, labels = tiny_inputs(model)
    dense, _ = model.denoise(images, times, labels, executor=DenseExecutor())
    for hits, misses in ((0, 1), (1, 1)):
        assert relative_difference(model(images, times, labels).sample, dense) < 1e-5
        assert (model.current_plan.hits, model.current_plan.misses) == (hits, misses)
    model(images, times[1], labels)
    assert (model.current_plan.hits, model.current_plan.misses) == (2, 1)
    model(images, times + torch.tensor([0.0, 1.0, 0.0]), labels)
    assert (model.current_plan.hits, model.current_plan.misses) == (2, 2)


@torch.no_grad()
def test_what_is_remembered_is_bounded() -> None:
    model = tiny_model(num_layers=1).set_execution("compact")
    images, _, labels = tiny_inputs(model, 1)
    for t in range(1100):
        model(images, t, labels)
    assert len(model.current_plan) == 1024
    model(images, 1099, labels)
    assert model.current_plan.hits == 1


@pytest.mark.parametrize("planned", [False, True])
def test_pipelines_and_threads_that_share_a_transformer(planned: bool) -> None:
    """Each has its own scheduler and number of steps; nobody gets another's widths."""
    model = model_of()
    jobs = [(scheduler, steps, seed) for seed, steps in enumerate((3, 5)) for scheduler in SCHEDULERS]

    def run(job: tuple[DiTPipeline, int, int]) -> torch.Tensor:
        pipeline, steps, seed = job
        return draw(pipeline, steps, seed)

    def ready() -> list[tuple[DiTPipeline, int, int]]:
        # Made one after the other: their autoencoders draw from the process's generator.
        return [(pipeline_of(model, scheduler), steps, seed) for scheduler, steps, seed in jobs]

    if planned:
        times = []
        for scheduler, steps, _ in jobs:
            other = scheduler()
            other.set_timesteps(steps)
            times += other.timesteps.tolist()
        model.plan(times, [3, 7, 10])
    expected = [run(job) for job in ready()]
    with ThreadPoolExecutor(4) as pool:
        for actual, wanted in zip(pool.map(run, ready() + ready()), expected * 2, strict=True):
            assert torch.equal(bits(actual), bits(wanted))
