"""The events that the client reports. `--json` prints each as a line, which is a public interface: names, keys and the
order of keys stay. docs/events.md is made from these classes by `python -m edge_client.ui.events`.

A new event is a class in the module of its topic, and `screen.say(events.ItsName(...))` where it happens.
"""

# ruff: noqa: F403
from edge_client.ui.events.connecting import *
from edge_client.ui.events.contributing import *
from edge_client.ui.events.event import EVENTS as EVENTS
from edge_client.ui.events.event import Event as Event
from edge_client.ui.events.joining import *
from edge_client.ui.events.receipts import *
from edge_client.ui.events.results import *
from edge_client.ui.events.training import *
from edge_client.ui.events.unattended import *
