"""`python -m stableopd`, the same as the `stableopd` command; what torchrun launches."""

from stableopd.cli import main

if __name__ == "__main__":
    main()
