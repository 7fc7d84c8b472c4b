"""Who calls, and what they may do: keys, sessions, tokens, certificates and policy."""
