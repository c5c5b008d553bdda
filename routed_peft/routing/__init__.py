"""Routes attached to a model: labels decide which parameters a position's gradient reaches."""

from routed_peft.routing.gradient_routing import GradientRouting

__all__ = ["GradientRouting"]
