"""The parts of against_flower.py: both sides' processes, what is measured of them, Flower's environment and app."""
