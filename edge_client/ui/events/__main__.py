"""`python -m edge_client.ui.events > docs/events.md`"""

from edge_client.ui.events import reference

print(reference.document())
