"""The families whose blocks are of DiT's form: what compiles blocks or gives them static shapes is for these."""

from __future__ import annotations

import pytest

from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.registry import FAMILIES

BACKBONES = [family for family in FAMILIES if issubclass(family.model_class, DynamicTransformer)]

each_backbone = pytest.mark.parametrize("family", BACKBONES, ids=[family.name for family in BACKBONES])
