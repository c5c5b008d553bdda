"""Records of a run on disk: settings, metrics, cost and provenance; and resuming after an interruption."""
