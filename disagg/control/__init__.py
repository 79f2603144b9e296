"""Control: messages between the router and the ranks, and how they survive a broken connection.

messages.py   the message types; session.py numbers messages and resends lost ones
ports.py      the two ends of a conversation over ZeroMQ; address.py parses and resolves addresses
secret.py     who may speak: the keys of a deployment; access.py its flags; refusals.py counts who was refused
pulse.py      heartbeats: how the router notices frozen and stuck ranks

May import disagg/request.py. Knows nothing of the engine.
"""
