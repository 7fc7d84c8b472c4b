"""Published models on this machine: pulled, chosen, evaluated, run and served."""
