"""Records of a run on disk: settings, metrics, costs, provenance, and going on after an interruption."""
