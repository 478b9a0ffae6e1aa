"""The same as `fastgpt batch_infer`, from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastgpt_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["batch_infer", *sys.argv[1:]]))
