"""`python -m coordinator.cli`, which services that were installed earlier run."""

from coordinator.cli.app import main

if __name__ == "__main__":
    main()
