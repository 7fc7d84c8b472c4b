"""`python -m edge_client.cli`, which services that were installed earlier run."""

from edge_client.cli.app import main

if __name__ == "__main__":
    main()
