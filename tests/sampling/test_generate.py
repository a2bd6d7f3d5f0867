"""Generation: image i depends on (seed, i) alone, batches stream, what was executed is counted, wrong settings are explained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dydit_cli.errors import DyditError
from dydit_cli.execution import CompactExecutor
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.flops import executed_ratio
from dydit_cli.sampling.generate import check_settings, generate
from dydit_cli.sampling.noise import ImageNoise
from dydit_cli.sampling.samplers import SAMPLERS, Sampler, sampler_for
from tests.sampling.test_guidance import rows_of_each_call
from tests.tiny import tiny_model

FAMILY_OF = {"diffusion": "dit", "flow": "sit"}
# FLUX's, which needs prompts, has tests of its own.
OF_CLASSES = [sampler for sampler in SAMPLERS if sampler.objective != "rectified-flow"]
each_sampler = pytest.mark.parametrize("sampler", OF_CLASSES, ids=[sampler.name for sampler in OF_CLASSES])


def model_for(sampler: Sampler, execution: str = "compact") -> DynamicTransformer:
    """A tiny dynamic model; for an adaptive sampler with all tokens on, because it answers a token that rounding flips by
    choosing other steps, and a random model's by giving up."""
    model = tiny_model(FAMILY_OF[sampler.objective]).set_execution(execution)
    if sampler.adaptive:
        with torch.no_grad():
            for block in model.blocks:
                block.token_router.score.bias.fill_(1e3)
    return model


def images(model: DynamicTransformer, **settings: Any) -> Tensor:
    return torch.cat([batch.samples for batch in generate(model, **({"steps": 4} | settings))])


class TestNoise:
    def test_an_image_has_the_same_noise_in_any_batch_bit_for_bit(self) -> None:
        shape, device = (4, 8, 8), torch.device("cpu")
        together = ImageNoise(7, (0, 1, 2, 3), shape, device)
        for index in range(4):
            alone = ImageNoise(7, (index,), shape, device)
            assert torch.equal(alone.start()[0], together.start()[index])
            assert torch.equal(alone.step(5)[0], together.step(5)[index])

    def test_everything_is_a_stream_of_its_own(self) -> None:
        shape, device = (4, 8, 8), torch.device("cpu")
        draws = [
            noise
            for seed in (0, 1)
            for index in (0, 1)
            for noise in (
                ImageNoise(seed, (index,), shape, device).start(),
                ImageNoise(seed, (index,), shape, device).step(0),
                ImageNoise(seed, (index,), shape, device).step(1),
            )
        ]
        assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)

    def test_schedulers_draw_the_same_numbers(self) -> None:
        from diffusers.utils.torch_utils import randn_tensor

        noise = ImageNoise(0, (3, 9), (4, 8, 8), torch.device("cpu"))
        assert torch.equal(randn_tensor((2, 4, 8, 8), generator=noise.generators(6)), noise.step(6))
        alone = ImageNoise(0, (9,), (4, 8, 8), torch.device("cpu"))
        assert torch.equal(randn_tensor((1, 4, 8, 8), generator=alone.generators(6)), alone.step(6))


class TestDeterminism:
    # An adaptive sampler makes one image at a time whatever the batch size: see TestStreaming.
    @pytest.mark.parametrize(
        "sampler", [each for each in OF_CLASSES if not each.adaptive], ids=lambda each: each.name
    )
    def test_an_image_is_the_same_in_any_batch(self, sampler: Sampler) -> None:
        model = model_for(sampler)
        settings: dict[str, Any] = {"num_images": 3, "sampler": sampler.name, "classes": [1, 5]}
        alone = images(model, batch_size=1, **settings)
        for batch_size in (2, 3):
            together = images(model, batch_size=batch_size, **settings)
            torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)

    def test_an_image_does_not_depend_on_how_many_follow(self) -> None:
        model = tiny_model("dit").set_execution("compact")
        many = images(model, num_images=5, batch_size=2)
        torch.testing.assert_close(images(model, num_images=2, batch_size=2), many[:2], rtol=0, atol=0)

    @each_sampler
    def test_seeds_and_images_differ(self, sampler: Sampler) -> None:
        model = model_for(sampler)
        first = images(model, num_images=2, sampler=sampler.name, classes=[0])
        other = images(model, num_images=2, sampler=sampler.name, classes=[0], seed=1)
        assert not torch.allclose(first[0], first[1], atol=0.1)
        assert not torch.allclose(first, other, atol=0.1)

    @each_sampler
    def test_compact_and_dense_agree(self, sampler: Sampler) -> None:
        dense = images(model_for(sampler, "dense"), num_images=2, sampler=sampler.name)
        compact = images(model_for(sampler, "compact"), num_images=2, sampler=sampler.name)
        torch.testing.assert_close(compact, dense, rtol=1e-3, atol=1e-3)

    def test_classes_are_used_in_turn(self) -> None:
        model = tiny_model("dit")
        batches = list(generate(model, classes=[4, 2], num_images=5, batch_size=2, steps=2))
        assert [batch.labels for batch in batches] == [(4, 2), (4, 2), (4,)]
        assert [batch.indices for batch in batches] == [(0, 1), (2, 3), (4,)]
        everything = list(generate(model, num_images=12, batch_size=12, steps=1, sampler="ddim"))
        assert everything[0].labels == (*range(10), 0, 1)

    def test_the_class_matters(self) -> None:
        model = tiny_model("dit")
        one, other = (images(model, classes=[label], num_images=1) for label in (0, 1))
        assert not torch.allclose(one, other, atol=1e-3)


class TestStreaming:
    def test_a_batch_is_made_when_it_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model("dit")
        rows = rows_of_each_call(model, monkeypatch)
        batches = generate(model, num_images=1_000_000, batch_size=2, steps=3, guidance=1)
        assert rows == []
        next(batches)
        assert rows == [2, 2, 2]
        next(batches)
        assert rows == [2] * 6

    def test_adaptive_samplers_make_one_image_at_a_time(self) -> None:
        model = tiny_model("sit").set_execution("static")
        batches = generate(model, num_images=2, batch_size=8, sampler="dopri5")
        assert [batch.indices for batch in batches] == [(0,), (1,)]

    def test_progress_rises_to_the_number_of_images(self) -> None:
        done: list[float] = []
        list(generate(tiny_model("dit"), num_images=5, batch_size=2, steps=4, on_progress=done.append))
        assert done == sorted(done)
        assert done[0] == 0.5
        assert done[-1] == 5


class TestCounting:
    @pytest.mark.parametrize("execution", ["dense", "compact"])
    def test_ratio_is_the_mean_over_the_samplers_own_states(self, execution: str) -> None:
        model = tiny_model("sit").set_execution(execution)
        (batch,) = generate(model, classes=[3], num_images=1, steps=3, guidance=1)
        state = ImageNoise(0, (0,), (4, 8, 8), torch.device("cpu")).start()
        ratios = []
        for step in range(3):
            time, label = torch.full((1,), step / 3), torch.tensor([3])
            ratios.append(float(executed_ratio(model.routing(time, state, label), model.geometry)))
            state = state + model(state, time, label).sample / 3
        torch.testing.assert_close(batch.samples, state, rtol=1e-4, atol=1e-4)
        assert float(batch.ratios) == pytest.approx(sum(ratios) / 3, abs=1e-5)
        assert len(set(ratios)) > 1
        assert batch.evaluations == 3

    @each_sampler
    def test_static_is_1(self, sampler: Sampler) -> None:
        model = model_for(sampler, "static")
        for batch in generate(model, num_images=2, steps=3, sampler=sampler.name):
            assert torch.equal(batch.ratios, torch.ones(len(batch.indices)))

    def test_keep_bias_is_a_dial(self) -> None:
        means = []
        for bias in (-2.0, 0.0, 2.0, float("inf")):
            model = tiny_model("dit").set_execution("compact").set_keep_bias(bias)
            (batch,) = generate(model, num_images=1, steps=3)
            means.append(float(batch.ratios))
        assert means == sorted(means)
        assert means[0] < means[1] < means[2]
        assert means[3] == 1

    @pytest.mark.parametrize(
        "sampler", [each for each in OF_CLASSES if each.times], ids=lambda each: each.name
    )
    def test_a_compact_run_asks_no_width_router_twice(self, sampler: Sampler) -> None:
        model = model_for(sampler)
        (batch,) = generate(model, num_images=2, steps=4, sampler=sampler.name)
        executor = model._executor
        assert isinstance(executor, CompactExecutor)
        assert executor.plan is not None
        assert (executor.plan.hits, executor.plan.misses) == (batch.evaluations, 0)


class TestHalfPrecision:
    def test_bfloat16_runs_and_stays_near(self) -> None:
        exact = images(tiny_model("sit").set_execution("static"), num_images=2)
        rounded = images(tiny_model("sit").to(torch.bfloat16).set_execution("static"), num_images=2)
        assert rounded.dtype == torch.float32
        torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.2)

    def test_values_that_are_not_finite_are_an_error(self) -> None:
        model = tiny_model("dit")
        with torch.no_grad():
            model.y_embedder.embedding_table.weight[5] = float("nan")
        with pytest.raises(DyditError, match="Image 1 came out with values that are not finite"):
            list(generate(model, classes=[4, 5], num_images=2, steps=2, guidance=1))


class TestMistakes:
    @pytest.mark.parametrize(
        ("settings", "what"),
        [
            ({"classes": [0, 10]}, "no class 10"),
            ({"classes": [-1]}, "no class -1"),
            ({"classes": []}, "No class"),
            ({"num_images": 0}, "num_images is 0"),
            ({"batch_size": 0}, "batch_size is 0"),
            ({"guidance": -0.5}, "guidance of -0.5"),
            ({"guidance": float("nan")}, "guidance of nan"),
            ({"guidance_channels": "first2"}, "'first2'"),
            ({"sampler": "euler"}, "'euler' does not fit"),
            ({"sampler": "ddmp"}, "no sampler called 'ddmp'"),
            ({"steps": 0}, "0 steps are too few"),
            ({"steps": 1001}, "1001 steps are too many"),
            ({"steps": 1000, "sampler": "dpm++"}, "1000 steps are too many"),
        ],
    )
    def test_each_is_explained_before_any_work(self, settings: dict[str, Any], what: str) -> None:
        with pytest.raises(DyditError) as error:
            generate(tiny_model("dit"), **settings)
        assert what in error.value.what
        assert error.value.why
        assert error.value.fix

    def test_wrong_samplers_name_those_that_fit(self) -> None:
        with pytest.raises(DyditError) as error:
            sampler_for("flow", "ddim")
        assert "euler, heun, dopri5, sde" in error.value.fix
        with pytest.raises(DyditError, match="did you mean 'heun'"):
            sampler_for("flow", "huen")

    def test_defaults_of_the_families(self) -> None:
        assert sampler_for("diffusion").name == "ddpm"
        assert sampler_for("flow").name == "euler"

    def test_sde_needs_two_steps(self) -> None:
        with pytest.raises(DyditError, match="1 steps are too few"):
            check_settings("flow", 10, sampler="sde", steps=1)
        assert check_settings("flow", 10, sampler="euler", steps=5000).steps == 5000
