"""`python -m vqbet_edge_ros`."""

from vqbet_edge_ros.main import main

if __name__ == "__main__":
    main()
