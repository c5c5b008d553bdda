"""Routes attached to a model: labels decide which parameters the gradient of each position reaches."""

from routed_peft.routing.gradient_routing import GradientRouting

__all__ = ["GradientRouting"]
