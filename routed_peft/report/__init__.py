"""Pages about checkpoints that were attacked: tables, curves and how each number was made."""
