"""Pytrees on disk, in Orbax's format, with a fingerprint of what made them.

A checkpoint is a folder: `manifest.json` (structure, checksums, its own among them, fingerprint) and the folder of
Orbax that it names. The manifest is put in place last and in one step: without it nothing loads, and an older
checkpoint at the same path stays whole until that moment.
"""

from dualxda_jax.checkpoint.content import CheckpointError, fingerprint
from dualxda_jax.checkpoint.folder import StaleCheckpoint, load, save

__all__ = ["CheckpointError", "StaleCheckpoint", "fingerprint", "load", "save"]
