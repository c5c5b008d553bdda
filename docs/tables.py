"""Write the tables of README and of pages in docs/ from results/; `--check` compares them only."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from experiments.tables.pages import main

if __name__ == "__main__":
    main(sys.argv[1:])
