"""The entry point of `python -m pyro_bayes.demo`."""

import sys

from pyro_bayes.demo import main

if __name__ == "__main__":
    sys.exit(main())
