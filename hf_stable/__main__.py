"""`python -m hf_stable` is `hf-stable`, also under `accelerate launch -m hf_stable`."""

import sys

from hf_stable.cli import main

if __name__ == "__main__":
    sys.exit(main())
