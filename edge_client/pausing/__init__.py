"""When training pauses for the machine's person: the policy, the sensors, the controller."""
