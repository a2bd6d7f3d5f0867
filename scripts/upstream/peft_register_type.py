"""peft: `register_peft_method` refuses every method that peft does not have already

It is the function that adds a method, and it checks the name against a closed enumeration.

dydit: TD-LoRA is a `LoraConfig` with a custom module and a `LoraVariant`, hooks that are marked experimental; hence peft's upper bound in
`pyproject.toml`.
"""

from peft import LoraConfig, LoraModel
from peft.utils import register_peft_method

try:
    register_peft_method(name="timed", config_cls=LoraConfig, model_cls=LoraModel)
except Exception as error:
    print(type(error).__name__, error)
