"""TRL's trainers with `routes=`: supervised fine-tuning and GRPO. This is the only place that imports TRL."""

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

SUPPORTED_TRL = ">=1.16,<1.17"
"""The versions whose internals the trainers were written against; ``tests/trl/test_pins.py`` holds them to it."""

try:
    _found = version("trl")
except PackageNotFoundError:
    raise ImportError('`routed_peft.trl` needs TRL: `pip install "routed_peft[trl]"`') from None
if _found not in SpecifierSet(SUPPORTED_TRL):
    raise ImportError(f"`routed_peft.trl` overrides internals of TRL {SUPPORTED_TRL}, and {_found} is installed: they "
                      "may have changed, and rollouts would then train unrouted without an error. `pip install "
                      f'"trl{SUPPORTED_TRL}"`')  # fmt: skip

from routed_peft.trl.config import RoutedGRPOConfig, RoutedSFTConfig  # noqa: E402
from routed_peft.trl.grpo import RoutedGRPOTrainer  # noqa: E402
from routed_peft.trl.rollout_labels import AdvantageLabels, ColumnLabels, EnvironmentLabels, ImperfectDetector  # noqa: E402
from routed_peft.trl.rollout_reward import RolloutReward  # noqa: E402
from routed_peft.trl.rollouts import RolloutLabels, Rollouts  # noqa: E402
from routed_peft.trl.sft import RoutedSFTTrainer  # noqa: E402

__all__ = ["SUPPORTED_TRL", "AdvantageLabels", "ColumnLabels", "EnvironmentLabels", "ImperfectDetector"]
__all__ += ["RolloutLabels", "RolloutReward", "Rollouts", "RoutedGRPOConfig", "RoutedGRPOTrainer", "RoutedSFTConfig"]
__all__ += ["RoutedSFTTrainer"]
