"""The parts of one_shot_vs_multi_round.py: bases and tasks, local training, rounds, measures, cells and the report."""
