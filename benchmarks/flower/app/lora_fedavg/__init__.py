"""Federated averaging of LoRA factors in Flower, with our training function."""
