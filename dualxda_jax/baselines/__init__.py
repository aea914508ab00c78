"""The methods that DualDA is compared with, as pure functions behind one protocol."""

from dualxda_jax.baselines.protocol import Context, Method, context

__all__ = ["Context", "Method", "context"]
