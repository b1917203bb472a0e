"""`python -m newsbert_ray VERB`: the same as `newsbert-ray VERB`."""

import sys

from newsbert_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
