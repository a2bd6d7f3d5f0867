"""Gates: from logits to masks of exactly 0 and 1."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dydit_cli.dynamic.gates import (
    CompleteGating,
    FrozenWidthGating,
    GumbelGating,
    ImposedGating,
    RoutingNoise,
    ThresholdGating,
)
from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.dynamic.routers import OrderedHeadRouter
from tests.tiny import bits, random_routing

MASKS = ("heads", "groups", "tokens")
GEOMETRY = Geometry(
    hidden_size=48,
    depth=3,
    num_heads=6,
    num_groups=4,
    mlp_hidden=192,
    num_tokens=16,
    patch_size=2,
    in_channels=4,
    out_channels=8,
    sample_size=8,
    num_classes=10,
)


class TestThreshold:
    def test_compares_the_logit_with_zero(self) -> None:
        """Where sigmoid(logit) rounds to 0.5, the logit still has a sign."""
        tiny = torch.tensor([[1e-20, -1e-20, 0.0, -0.0, 1.0, -1.0]])
        assert ThresholdGating().heads(0, tiny).tolist() == [[1, 0, 0, 0, 1, 0]]
        assert (torch.sigmoid(tiny[0, 0]) > 0.5).item() is False

    @pytest.mark.parametrize("kind", ["heads", "groups", "tokens"])
    def test_the_dial_shifts_every_kind(self, kind: str) -> None:
        logits = torch.tensor([[-2.0, -0.5, 0.5, 2.0]])
        for dial, expected in ((0.0, [0, 0, 1, 1]), (1.0, [0, 1, 1, 1]), (-1.0, [0, 0, 0, 1])):
            assert getattr(ThresholdGating(dial), kind)(0, logits).tolist() == [expected]
        assert getattr(ThresholdGating(math.inf), kind)(0, logits).all()
        assert not getattr(ThresholdGating(-math.inf), kind)(0, logits).any()


class TestGumbel:
    @staticmethod
    def noise(batch: int, seed: int = 0) -> RoutingNoise:
        return RoutingNoise.draw(GEOMETRY, seed=seed, step=0, indices=range(batch))

    @pytest.mark.parametrize("kind", ["heads", "groups", "tokens"])
    def test_values_are_exactly_zero_or_one_with_a_soft_gradient(self, kind: str) -> None:
        noise = self.noise(64)
        size = getattr(noise, kind).shape[-1]
        logits = torch.linspace(-20, 40, 64 * size).view(64, size).requires_grad_()
        mask = getattr(GumbelGating(noise), kind)(1, logits)
        assert set(mask.detach().unique().tolist()) == {0.0, 1.0}
        mask.sum().backward()
        noisy = logits.detach() + getattr(noise, kind)[:, 1]
        soft = torch.sigmoid(noisy / 5)
        torch.testing.assert_close(logits.grad, soft * (1 - soft) / 5)
        assert torch.equal(mask.detach(), (noisy > 0).float())

    def test_the_hard_value_is_the_soft_one_at_half(self) -> None:
        """Whatever the temperature: it widens the gradient and leaves the decision."""
        noise, logits = self.noise(64), torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
        masks = [GumbelGating(noise, temperature).heads(0, logits) for temperature in (0.5, 1.0, 5.0)]
        assert torch.equal(masks[0], masks[1])
        assert torch.equal(masks[0], masks[2])

    @pytest.mark.parametrize("kind", MASKS)
    def test_without_noise_it_decides_as_evaluation_does(self, kind: str) -> None:
        noise = self.noise(64)
        size = getattr(noise, kind).shape[-1]
        logits = torch.randn(64, size, generator=torch.Generator().manual_seed(0)).requires_grad_()
        mask = getattr(GumbelGating(noise, scale=0.0), kind)(1, logits)
        assert torch.equal(mask.detach(), getattr(ThresholdGating(), kind)(1, logits.detach()))
        mask.sum().backward()
        soft = torch.sigmoid(logits.detach() / 5)
        torch.testing.assert_close(logits.grad, soft * (1 - soft) / 5)

    def test_gradient_at_the_paper_start(self) -> None:
        """Bias 15: 3e-7 at temperature 1, about 9e-3 at temperature 5 (without noise)."""
        silent = RoutingNoise(torch.zeros(1, 3, 6), torch.zeros(1, 3, 4), torch.zeros(1, 3, 16))
        for temperature, expected in ((1.0, 3.06e-7), (5.0, 9.03e-3)):
            logits = torch.full((1, 5), 15.0, requires_grad=True)
            GumbelGating(silent, temperature).heads(0, logits).sum().backward()
            # 1 - sigmoid(15) has two digits in fp32.
            assert logits.grad.flatten().tolist() == pytest.approx([expected] * 5, rel=0.2)

    @pytest.mark.parametrize("logit", [-2.0, -0.5, 0.0, 1.0, 3.0])
    def test_probability_of_keeping_is_the_sigmoid(self, logit: float) -> None:
        batch = 2000
        noise = self.noise(batch)
        for kind, size in (("heads", 6), ("groups", 4), ("tokens", 16)):
            gating = GumbelGating(noise)
            kept = torch.cat(
                [getattr(gating, kind)(block, torch.full((batch, size), logit)) for block in range(3)]
            )
            probability = 1 / (1 + math.exp(-logit))
            # Five standard deviations of the mean of independent draws.
            margin = 5 * math.sqrt(probability * (1 - probability) / kept.numel())
            assert abs(float(kept.mean()) - probability) < margin
            assert (kept.mean(dim=0) - probability).abs().max() < margin * math.sqrt(size) * 1.2

    def test_an_always_on_unit_uses_no_noise(self) -> None:
        """Router rows are the units 1 ... H - 1, and each has its own noise."""
        noise = self.noise(8)
        logits = torch.zeros(8, 5)
        assert torch.equal(GumbelGating(noise).heads(2, logits), (noise.heads[:, 2, 1:] > 0).float())

    def test_a_single_unit_has_no_router_row(self) -> None:
        noise = RoutingNoise.draw(
            replace(GEOMETRY, num_heads=1, num_groups=1), seed=0, step=0, indices=range(8)
        )
        assert GumbelGating(noise).heads(0, torch.zeros(8, 0)).shape == (8, 0)
        assert GumbelGating(noise).groups(0, torch.zeros(8, 0)).shape == (8, 0)


class TestOrderedWidth:
    """One draw of noise for all heads of a block, one for all groups."""

    ORDERED = replace(GEOMETRY, ordered_width=True)

    def test_one_draw_a_sample_a_block_and_a_kind(self) -> None:
        noise = RoutingNoise.draw(self.ORDERED, seed=0, step=0, indices=range(16))
        for kind in ("heads", "groups"):
            values = getattr(noise, kind)
            assert (values == values[:, :, :1]).all()
            assert len(values[:, :, 0].unique()) == 16 * 3
        assert not torch.equal(noise.heads[:, :, 0], noise.groups[:, :, 0])
        assert len(noise.tokens.unique()) == noise.tokens.numel()

    def test_masks_are_prefixes_and_their_mean_size_is_the_sum_of_probabilities(self) -> None:
        batch, router = 4000, OrderedHeadRouter(48, 6, always_on=True)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in router.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            router.linear.bias[0] += 2
            logits = router(torch.randn(1, 48, generator=generator)).expand(batch, -1)
        noise = RoutingNoise.draw(self.ORDERED, seed=0, step=0, indices=range(batch))
        masks = torch.cat([GumbelGating(noise).heads(block, logits) for block in range(3)])
        assert (masks[:, 1:] <= masks[:, :-1]).all()
        counts = masks.sum(dim=1)
        assert len(counts.unique()) > 3
        expected = float(torch.sigmoid(logits[0]).sum())
        margin = 5 * float(counts.std()) / len(counts) ** 0.5
        assert float(counts.mean()) == pytest.approx(expected, abs=margin)
        assert ThresholdGating().heads(0, logits)[0].sum() == (logits[0] > 0).sum()


class TestRoutingNoise:
    def test_is_a_function_of_seed_step_and_index_alone(self) -> None:
        """Not of the batch that an index stands in, nor of what was drawn before."""
        together = RoutingNoise.draw(GEOMETRY, seed=3, step=7, indices=[4, 9, 1])
        torch.rand(1000)
        for row, index in enumerate((4, 9, 1)):
            alone = RoutingNoise.draw(GEOMETRY, seed=3, step=7, indices=[index])
            for name in MASKS:
                assert torch.equal(bits(getattr(alone, name)[0]), bits(getattr(together, name)[row]))

    def test_leaves_the_global_generator_alone(self) -> None:
        before = torch.get_rng_state()
        RoutingNoise.draw(GEOMETRY, seed=0, step=0, indices=range(4))
        assert torch.equal(torch.get_rng_state(), before)

    def test_differs_in_each_of_them(self) -> None:
        draws = [
            RoutingNoise.draw(GEOMETRY, seed, step, [index]).tokens
            for seed, step, index in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 10, 1), (0, 1, 10))
        ]
        for one in range(len(draws)):
            for other in range(one):
                assert not torch.equal(draws[one], draws[other])

    def test_has_the_logistic_law(self) -> None:
        noise = RoutingNoise.draw(GEOMETRY, seed=0, step=0, indices=range(2000))
        values = torch.cat([getattr(noise, name).flatten() for name in MASKS])
        assert torch.isfinite(values).all()
        assert float(values.mean()) == pytest.approx(0, abs=0.03)
        assert float(values.std()) == pytest.approx(math.pi / math.sqrt(3), rel=0.02)
        shapes = [tuple(getattr(noise, name).shape) for name in MASKS]
        assert shapes == [(2000, 3, 6), (2000, 3, 4), (2000, 3, 16)]


class TestOtherGates:
    def test_complete_ignores_the_logits(self) -> None:
        for kind in ("heads", "groups", "tokens"):
            assert getattr(CompleteGating(), kind)(0, torch.full((2, 3), -9.0)).all()

    def test_imposed_ignores_the_logits(self) -> None:
        routing = random_routing(GEOMETRY, 2)
        gating = ImposedGating(routing)
        assert torch.equal(gating.heads(1, torch.randn(2, 5)), routing.blocks[1].heads)
        assert torch.equal(gating.groups(2, torch.randn(2, 3)), routing.blocks[2].groups)
        assert torch.equal(gating.tokens(0, torch.randn(2, 16)), routing.blocks[0].tokens)

    def test_frozen_widths_leave_tokens_live(self) -> None:
        routing = random_routing(GEOMETRY, 2)
        gating = FrozenWidthGating(routing, ThresholdGating(0.5))
        logits = torch.linspace(-2, 2, 32).view(2, 16)
        assert torch.equal(gating.heads(1, torch.randn(2, 5)), routing.blocks[1].heads)
        assert torch.equal(gating.groups(1, torch.randn(2, 3)), routing.blocks[1].groups)
        assert torch.equal(gating.tokens(1, logits), (logits > -0.5).float())
