"""``routed-peft demo``: the method on real text, four arms side by side, in minutes, with a report."""

from routed_peft.demo.run import run_demo
from routed_peft.demo.settings import ARMS, Arm, DemoSettings

__all__ = ["ARMS", "Arm", "DemoSettings", "run_demo"]
