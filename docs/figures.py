"""Draw the figure of README from results/, for light and dark pages; `--check` compares its data only."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from experiments.tables.page_figures import main

if __name__ == "__main__":
    main(sys.argv[1:])
