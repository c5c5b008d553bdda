"""Which run a model comes from, and what its recipe was told."""

from __future__ import annotations

"""Arms of a recipe that train without routing."""

"""What says of a model that units of it were silenced, and of which run it was made."""
