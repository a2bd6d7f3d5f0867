"""Fine-tuning a converted model to its target ratio. The only room that imports accelerate; nothing here
prints.

`prepare` checks and opens everything, the run it returns yields a `StepReport` a step and writes the final
artifact.
"""

from __future__ import annotations

from dydit_cli.training.finetuning import FineTuning, fine_tune, prepare
from dydit_cli.training.reports import FinetuneResult, StepReport

__all__ = ["FineTuning", "FinetuneResult", "StepReport", "fine_tune", "prepare"]
